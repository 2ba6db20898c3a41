"""Rows that share pages: any history of them has the bits of a replay from nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from test_native import filled, folder_of, path_of, random_tree

from decoder_kit import tiny_model
from redwood.backends.base import AcceptedPath, Nodes, SharingBackend
from redwood.backends.native.backend import NativeBackend
from redwood.backends.native.load import load_native
from redwood.errors import ArgumentError

VOCAB = 96


def _one_step(backend: NativeBackend, rows: dict[int, list[int]], rng: np.random.Generator) -> None:
    """Extend and commit, fork (between the two as well), truncate or release a random row."""
    row = int(rng.choice(list(rows)))
    text, what = rows[row], rng.random()
    if what < 0.25 and len(rows) < 6:
        length = int(rng.integers(0, len(text) + 1))
        rows[backend.fork(row, length)] = text[:length]
    elif what < 0.4:
        rows[row] = text[: int(rng.integers(0, len(text) + 1))]
        backend.truncate(row, len(rows[row]))
    elif what < 0.5 and len(rows) > 1:
        backend.release(row)
        del rows[row]
    else:
        tree = random_tree(rng, int(rng.integers(1, 24)))
        tokens = [int(t) for t in rng.integers(0, VOCAB, len(tree))]
        first = int(rng.integers(1, len(tree) + 1))
        backend.extend([Nodes(row, tokens[:first], tree[:first])])
        if rng.random() < 0.4 and len(rows) < 6:
            rows[backend.fork(row, len(text))] = list(text)
        if first < len(tree):
            backend.extend([Nodes(row, tokens[first:], tree[first:])])
        path = path_of(tree, int(rng.integers(0, len(tree))))
        backend.commit([AcceptedPath(row, path)])
        rows[row] = text + [tokens[node] for node in path]


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_random_histories_have_the_bits_of_a_replay(architecture: str, tmp_path: Path) -> None:
    backend = load_native(
        folder_of(tmp_path, tiny_model(architecture, max_position_embeddings=2048)), None, threads=2
    )
    for seed in range(40):
        rng = np.random.default_rng(seed)
        start = [int(t) for t in rng.integers(0, VOCAB, rng.integers(1, 150))]
        rows = {filled(backend, start): start}
        for _ in range(25):
            _one_step(backend, rows, rng)
        for row, text in rows.items():
            fresh = filled(backend, text, chunk=int(rng.integers(1, 70)))
            (new,) = backend.extend([Nodes(fresh, [7, 8])])
            (old,) = backend.extend([Nodes(row, [7, 8])])
            assert torch.equal(new, old)
            backend.release(fresh)
            backend.release(row)
        assert backend.cache_bytes == 0


def test_pages_are_shared_until_written_to(tmp_path: Path) -> None:
    backend = load_native(
        folder_of(tmp_path, tiny_model("llama", max_position_embeddings=2048)), None, threads=1
    )
    assert isinstance(backend, SharingBackend)
    row = filled(backend, list(range(90)) + list(range(40)))  # 130 tokens, 3 pages
    other = backend.fork(row, 130)
    assert backend.pages([row, other]) == backend.pages([other]) == 3
    backend.extend([Nodes(other, [5])])
    assert backend.pages([row, other]) == 4
    backend.release(row)
    assert backend.pages([other]) == 3
    with pytest.raises(ArgumentError, match="fork: length"):
        backend.fork(other, 131)
    with pytest.raises(ArgumentError, match="not open"):
        backend.fork(row, 1)
