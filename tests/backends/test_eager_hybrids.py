"""Recurrent layers on the eager backend: trees, batches, commits and histories, of every family."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from eager_hybrids_kit import FORMS, HYBRIDS, REFUSED, tiny_hybrid
from redwood.backends.base import AcceptedPath, Nodes
from redwood.backends.cuda_graph.backend import with_graphs
from redwood.backends.eager.backend import EagerBackend
from redwood.backends.load import wrap_model
from redwood.errors import UnsupportedError

PROMPT = [5, 9, 17, 33, 65, 29, 2, 77, 54, 21]
NEAR = {"atol": 1e-4, "rtol": 1e-4}

_MADE: dict[str, tuple[Any, EagerBackend]] = {}


@pytest.fixture(params=sorted(HYBRIDS))
def made(request: pytest.FixtureRequest) -> tuple[Any, EagerBackend]:
    """A model, and the backend around it."""
    family: str = request.param
    if family not in _MADE:
        model = tiny_hybrid(family)
        _MADE[family] = model, wrap_model(model)
        assert _MADE[family][1].recurrent.form == FORMS.get(family, "any")
    return _MADE[family]


def _plain(model: Any, tokens: list[int]) -> torch.Tensor:
    """Logits [tokens, V] of the stock module."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    model.set_attn_implementation(before)
    return logits


def _filled(backend: EagerBackend, tokens: list[int], chunk: int = 1000) -> int:
    row = backend.open()
    for start in range(0, len(tokens), chunk):
        part = tokens[start : start + chunk]
        backend.extend([Nodes(row, part, num_logits=1)])
        backend.commit([AcceptedPath(row, range(len(part)))])
    return row


def _tree(size: int, seed: int) -> tuple[list[int], list[int]]:
    draw = random.Random(seed)
    parents = [-1, *(draw.randrange(max(-1, i - 4), i) for i in range(1, size))]
    return [draw.randrange(96) for _ in range(size)], parents


def _path(node: int, parents: list[int]) -> list[int]:
    path: list[int] = []
    while node >= 0:
        path.insert(0, node)
        node = parents[node]
    return path


def _check(model: Any, text: list[int], tree: tuple[list[int], list[int]], got: Any) -> None:
    tokens, parents = tree
    for node in range(len(tokens)):
        path = [tokens[i] for i in _path(node, parents)]
        torch.testing.assert_close(got[node], _plain(model, text + path)[-1], **NEAR)


@pytest.mark.parametrize("size", [1, 2, 6, 16])
def test_a_tree_has_the_logits_of_its_paths(made: tuple[Any, EagerBackend], size: int) -> None:
    model, backend = made
    for chunk in (1000, 4, 1):
        row, tree = _filled(backend, PROMPT, chunk), _tree(size, size)
        _check(model, PROMPT, tree, backend.extend([Nodes(row, *tree)])[0])
        backend.release(row)


def test_a_tree_may_be_the_first_that_a_row_sees(made: tuple[Any, EagerBackend]) -> None:
    model, backend = made
    tree = _tree(7, 0)
    _check(model, [], tree, backend.extend([Nodes(backend.open(), *tree)])[0])


def test_trees_grow_level_by_level_and_by_chains(made: tuple[Any, EagerBackend]) -> None:
    model, backend = made
    tokens, parents = [3, 8, 5, 7, 2, 9, 4], [-1, 0, 1, 1, 2, -1, 4]
    row = _filled(backend, PROMPT)
    parts = [
        backend.extend([Nodes(row, tokens[a:b], parents[a:b])])[0]
        for a, b in ((0, 1), (1, 2), (2, 4), (4, 6), (6, 7))
    ]
    _check(model, PROMPT, (tokens, parents), torch.cat(parts))


def test_rows_in_company_equal_rows_alone(made: tuple[Any, EagerBackend]) -> None:
    model, backend = made
    texts = [PROMPT, PROMPT[:3], PROMPT * 3, [7]]
    trees = [_tree(8, 1), _tree(1, 2), _tree(3, 3), _tree(12, 4)]
    rows = [_filled(backend, text) for text in texts]
    for seed in range(2):  # what is committed, too
        together = backend.extend([Nodes(row, *t) for row, t in zip(rows, trees, strict=True)])
        for text, tree, logits in zip(texts, trees, together, strict=True):
            _check(model, text, tree, logits)
        kept = [_path(len(t[0]) - 1 - seed if len(t[0]) > 1 else 0, t[1]) for t in trees]
        backend.commit([AcceptedPath(r, k) for r, k in zip(rows, kept, strict=True)])
        for text, tree, nodes in zip(list(texts), trees, kept, strict=True):
            texts[texts.index(text)] = text + [tree[0][node] for node in nodes]


def test_a_prompt_may_be_filled_beside_a_tree(made: tuple[Any, EagerBackend]) -> None:
    model, backend = made
    row, tree, other = _filled(backend, PROMPT), _tree(5, 5), backend.open()
    long = [(7 * i) % 96 for i in range(40)]
    logits, read = backend.extend([Nodes(row, *tree), Nodes(other, long)])
    _check(model, PROMPT, tree, logits)
    torch.testing.assert_close(read, _plain(model, long), **NEAR)


def test_a_failed_forward_leaves_rows_as_they_were(
    made: tuple[Any, EagerBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, backend = made
    row, tree = _filled(backend, PROMPT), _tree(6, 1)
    backend.extend([Nodes(row, *tree)])
    kept = _path(5, tree[1])
    backend.commit([AcceptedPath(row, kept)])
    text = PROMPT + [tree[0][node] for node in kept]

    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:  # behind some of the layers
        patch.setattr(model.get_output_embeddings(), "forward", fails)
        with pytest.raises(RuntimeError, match="no memory"):
            backend.extend([Nodes(row, [1, 2, 3])])
    assert backend.length(row) == len(text)
    _check(model, text, tree, backend.extend([Nodes(row, *tree)])[0])


def test_random_histories_equal_a_replay(made: tuple[Any, EagerBackend]) -> None:
    model, backend = made
    draw = random.Random(1)
    row, text, tokens, parents = backend.open(), [], list[int](), list[int]()
    for step in range(60):
        move = draw.choice(["extend", "extend", "commit", "truncate", "fork"])
        if move == "extend" and len(text) + len(tokens) < 200:
            new, grown = _tree(draw.randrange(1, 9), step)
            shift = len(tokens)
            above = draw.randrange(-1, shift) if shift else -1
            parents += [above if parent < 0 else parent + shift for parent in grown]
            tokens += new
            (logits,) = backend.extend([Nodes(row, new, parents[shift:])])
            leaf = len(tokens) - 1
            whole = text + [tokens[node] for node in _path(leaf, parents)]
            torch.testing.assert_close(logits[-1], _plain(model, whole)[-1], **NEAR)
            continue
        kept: list[int] = []
        if move == "commit" and tokens:
            kept = _path(draw.randrange(len(tokens)), parents)
            backend.commit([AcceptedPath(row, kept)])
            text = text + [tokens[node] for node in kept]
        elif move == "truncate":
            text = text[: max(0, len(text) - draw.randrange(6))]
            backend.truncate(row, len(text))
        elif move == "fork":
            text = text[: max(0, len(text) - draw.choice([0, 0, 1, 7]))]
            old, row = row, backend.fork(row, len(text))
            backend.release(old)
        else:
            backend.commit([AcceptedPath(row, [])])
        tokens, parents = [], []
    assert backend.length(row) == len(text)


# What is refused


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_what_cannot_be_had_is_refused_with_the_reason(family: str) -> None:
    model = tiny_hybrid(family)
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedError, match=REFUSED[family][2]):
        wrap_model(model)
    assert model.config._attn_implementation == before


def test_backends_that_do_not_run_recurrent_layers_say_so() -> None:
    model = tiny_hybrid("lfm2")
    with pytest.raises(UnsupportedError, match="Lfm2ForCausalLM has recurrent layers, .*eager"):
        with_graphs(wrap_model(model))

    class Other(EagerBackend):
        pass

    with pytest.raises(UnsupportedError, match="recurrent layers, which the eager backend alone"):
        wrap_model(model, 64, Other)


def test_a_model_with_wrong_states_is_refused() -> None:
    model = tiny_hybrid("qwen3_next")
    layer = type(model.model.layers[0].linear_attn)

    class Forgets(layer):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: Any, cache: Any = None, **given: Any) -> Any:
            made = super().forward(hidden_states, cache=cache, **given)
            if cache is not None:
                cache.update_recurrent_state(
                    0.9 * cache.get_recurrent_state(self.layer_idx), self.layer_idx
                )
            return made

    for part in model.modules():
        if type(part) is layer:
            part.__class__ = Forgets
    with pytest.raises(UnsupportedError, match="other logits in a tree than on its paths"):
        wrap_model(model)
