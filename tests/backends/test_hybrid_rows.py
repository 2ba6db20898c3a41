"""Rows with states: random extends, commits, truncations and forks against a replay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_native import filled, folder_of, path_of, random_tree

from hybrids_kit import hybrid_model
from redwood.backends.base import AcceptedPath, Nodes
from redwood.backends.native.backend import NativeBackend
from redwood.backends.native.load import load_native
from redwood.errors import ArgumentError

pytest.importorskip("redwood._native", reason="installed without a compiler")

NAMES = ("lfm2", "qwen35")


def loaded(name: str, path: Path, every: int = 8, **options: Any) -> NativeBackend:
    folder = folder_of(path, hybrid_model(name, num_hidden_layers=4))
    return load_native(folder, None, threads=1, checkpoint_tokens=every, **options)


class Replay:
    """Logits after a text, decoded one token after another in a row of its own, each text once."""

    def __init__(self, backend: NativeBackend) -> None:
        self.backend, self._known = backend, dict[tuple[int, ...], torch.Tensor]()

    def after(self, text: list[int]) -> torch.Tensor:
        key = tuple(text)
        if key not in self._known:
            row = self.backend.open()
            for end, token in enumerate(text, 1):
                (logits,) = self.backend.extend([Nodes(row, [token])])
                self.backend.commit([AcceptedPath(row, [0])])
                self._known[key[:end]] = logits[0].clone()
            self.backend.release(row)
        return self._known[key]


class Walk:
    """A row with what it holds: committed tokens, and provisional ones with their parents."""

    def __init__(self, row: int, text: list[int]) -> None:
        self.row, self.text = row, text
        self.tokens: list[int] = []
        self.parents: list[int] = []

    def path(self, node: int) -> list[int]:
        return path_of(self.parents, node) if node >= 0 else []

    def said(self, node: int) -> list[int]:
        return self.text + [self.tokens[n] for n in self.path(node)]


def grow(walk: Walk, rng: np.random.Generator) -> tuple[Nodes, int]:
    """New nodes: a tree, a chain behind the last node, or a text that is read."""
    held, kind = len(walk.tokens), rng.random()
    if kind < 0.25:
        count = int(rng.integers(16, 40))
        parents, wanted = list(range(held - 1, held + count - 1)), int(rng.integers(0, 2))
    elif kind < 0.5:
        count = int(rng.integers(1, 6))
        parents, wanted = list(range(held - 1, held + count - 1)), count
    else:
        tree = random_tree(rng, int(rng.integers(1, 9)))
        count = wanted = len(tree)
        root = int(rng.integers(-1, held)) if held else -1
        parents = [root if parent < 0 else held + parent for parent in tree]
    tokens = [int(token) for token in rng.integers(0, 96, count)]
    walk.tokens += tokens
    walk.parents += parents
    return Nodes(walk.row, tokens, parents, wanted), wanted


def act(
    backend: NativeBackend, walks: list[Walk], replay: Replay, rng: np.random.Generator
) -> None:
    what, walk = rng.random(), walks[int(rng.integers(0, len(walks)))]
    if what < 0.5:
        some = [w for w in walks if w is walk or rng.random() < 0.3]
        made = [grow(w, rng) for w in some]
        for w, logits, (_, wanted) in zip(
            some, backend.extend([nodes for nodes, _ in made]), made, strict=True
        ):
            for at in range(wanted):
                node = len(w.tokens) - wanted + at
                assert torch.equal(logits[at], replay.after(w.said(node)))
    elif what < 0.8 and walk.tokens:
        node = int(rng.integers(-1, len(walk.tokens)))
        path = walk.path(node)
        walk.text = walk.said(node)
        backend.commit([AcceptedPath(walk.row, path)])
        walk.tokens, walk.parents = [], []
    elif what < 0.88:
        length = int(rng.integers(0, len(walk.text) + 1))
        backend.truncate(walk.row, length)
        walk.text, walk.tokens, walk.parents = walk.text[:length], [], []
    elif what < 0.95 and len(walks) < 4:
        length = int(rng.integers(0, len(walk.text) + 1))
        if rng.random() < 0.5:
            length = backend.reusable(walk.row, length)
        walks.append(Walk(backend.fork(walk.row, length), walk.text[:length]))
    elif len(walks) > 1:
        walks.remove(walk)
        backend.release(walk.row)


def run(backend: NativeBackend, sequences: int, moves: int = 12) -> None:
    for seed in range(sequences):
        rng, replay = np.random.default_rng(seed), Replay(backend)
        walks = [Walk(backend.open(), [])]
        for _ in range(moves):
            act(backend, walks, replay, rng)
        for walk in walks:  # what every row says in the end
            backend.commit([AcceptedPath(walk.row, [])])
            (logits,) = backend.extend([Nodes(walk.row, [7])])
            assert torch.equal(logits[0], replay.after([*walk.text, 7]))
            backend.release(walk.row)
        assert backend.cache_bytes == 0


@pytest.mark.parametrize("name", NAMES)
def test_random_sequences_equal_a_replay(name: str, tmp_path: Path) -> None:
    run(loaded(name, tmp_path, capacity=600), 60)


def test_without_kept_states_too(tmp_path: Path) -> None:
    run(loaded("qwen35", tmp_path, every=0, capacity=600), 20)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_five_thousand_random_sequences(name: str, tmp_path: Path) -> None:
    run(loaded(name, tmp_path, capacity=600), 5000)


@pytest.mark.parametrize("name", NAMES)
def test_where_a_row_can_be_taken_up(name: str, tmp_path: Path) -> None:
    backend = loaded(name, tmp_path, every=16)
    text = [int(t) for t in np.random.default_rng(0).integers(0, 96, 100)]
    for chunk in (1, 7, 50, 100):
        row = filled(backend, text, chunk=chunk)
        found = [backend.reusable(row, length) for length in (100, 99, 96, 95, 16, 15, 0)]
        assert found == [100, 96, 96, 80, 16, 0, 0]
        made = backend.fork(row, 96)
        (logits,) = backend.extend([Nodes(made, text[96:])])
        assert torch.equal(logits[-1], Replay(backend).after(text))
        for each in (row, made):
            backend.release(each)
    assert backend.cache_bytes == 0


def test_states_are_shared_and_counted(tmp_path: Path) -> None:
    backend = loaded("qwen35", tmp_path, every=16)
    row = filled(backend, [int(t) for t in range(90)], chunk=30)  # states at 16, 32, 48, 64, 80, 90
    pages, state = backend.page_bytes, backend.state_bytes
    assert backend.cache_bytes == 2 * pages + 6 * state
    assert backend.pages([row]) == 2 + -(-6 * state // pages)
    assert backend.cache_bytes <= backend.row_bytes(128)
    other = backend.fork(row, 90)
    assert backend.cache_bytes == 2 * pages + 6 * state
    assert backend.pages([row, other]) == backend.pages([row])
    backend.extend([Nodes(other, [1, 2, 3], [-1, -1, 0])])
    assert backend.cache_bytes == 3 * pages + 6 * state + 3 * backend.node_bytes
    backend.commit([AcceptedPath(other, [1])])  # its last state is its own now
    backend.truncate(other, 91)
    assert backend.cache_bytes == 3 * pages + 7 * state
    assert backend.reusable(row, 90) == 90 and backend.reusable(other, 91) == 91


def test_a_long_chain_that_is_kept_in_part(tmp_path: Path) -> None:
    """A prompt's states are written ahead; what is kept of it may end before, or branch off it."""
    backend = loaded("qwen35", tmp_path, every=8)
    replay, text = Replay(backend), [int(t) for t in np.random.default_rng(1).integers(0, 96, 60)]
    row = backend.open()
    backend.extend([Nodes(row, text, num_logits=0)])
    (logits,) = backend.extend([Nodes(row, [5, 6, 7], [59, 30, 61])])
    assert torch.equal(logits[0], replay.after([*text, 5]))
    assert torch.equal(logits[2], replay.after([*text[:31], 6, 7]))
    backend.commit([AcceptedPath(row, [*range(31), 61])])
    (logits,) = backend.extend([Nodes(row, [9])])
    assert torch.equal(logits[0], replay.after([*text[:31], 6, 9]))


def test_pages_alone_are_no_row(tmp_path: Path) -> None:
    backend = loaded("lfm2", tmp_path)
    row = filled(backend, [3] * 64)
    with pytest.raises(ArgumentError, match="tokens and states are for recurrent layers"):
        backend.restore(backend.open(), [backend.read_page(row, 0)], 64)


def test_states_may_be_kept_further_apart_than_any_row_is_long(tmp_path: Path) -> None:
    backend = loaded("lfm2", tmp_path, every=1 << 70)
    assert backend.reusable(filled(backend, [3] * 40), 39) == 0
