"""Rows of a tree that lie on a device: the same numbers, in few copies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from redwood import verify
from redwood.algorithms.specinfer import expansion_tree
from redwood.errors import NumericalError
from redwood.sampling import History, PathRows, SamplingParams, host_rows
from redwood.sampling.host_rows import HostRows
from redwood.sampling.noise import GumbelNoise
from redwood.tree import Law, TokenTree

VOCAB = 300


class Copies:
    """Counts the copies from a device that the tests make believe."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[int] = []
        usual = host_rows.to_host

        def to_host(rows: Tensor) -> Tensor:
            self.rows.append(len(rows))
            return usual(rows)

        monkeypatch.setattr(host_rows, "to_host", to_host)
        monkeypatch.setattr(host_rows, "on_host", lambda rows: False)


def _tree(shape: str) -> TokenTree:
    rng = np.random.default_rng(5)
    parents = {
        "chain": [-1, *range(23)],
        "bushy": [-1, *(int(rng.integers(max(0, i - 6), i)) for i in range(1, 24))],
        "star": [-1] + [0] * 23,
    }[shape]
    tokens = rng.permutation(VOCAB)[:24].tolist()
    return TokenTree(tokens, parents, [Law.POINT] * 24, [-1] * 24)


def _logits(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(24, VOCAB, generator=torch.Generator().manual_seed(3)).to(dtype) * 3


PARAMS: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 0.8},
    "truncated": {"temperature": 1.0, "top_p": 0.9, "top_k": 40},
    "penalties": {"temperature": 0.7, "repetition_penalty": 1.3, "frequency_penalty": 0.2},
    "bias": {"temperature": 0.0, "logit_bias": {7: 2.0}},
    "greedy": {"temperature": 0.0},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", sorted(PARAMS))
def test_a_device_changes_no_bit(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree, params, logits = _tree("bushy"), SamplingParams(**PARAMS[kind]), _logits(dtype)
    here = PathRows(logits, tree, params, History([3, 4]))
    copies = Copies(monkeypatch)
    there = PathRows(logits, tree, params, History([3, 4]))
    noise = GumbelNoise(5, VOCAB)
    for node in np.random.default_rng(0).permutation(24).tolist():
        (want, mass), (got, got_mass) = here.weights(node), there.weights(node)
        assert np.array_equal(got, want) and got_mass == mass
        assert torch.equal(there.scores(node), here.scores(node))
        assert there.best(node) == here.best(node)
        assert there.choice(node, noise, 9) == here.choice(node, noise, 9)
    assert sum(copies.rows) == 24  # none comes twice


@pytest.mark.parametrize("shape", ["chain", "bushy", "star"])
@pytest.mark.parametrize("rule", [verify.traversal, verify.recursive])
def test_a_small_tree_is_one_copy_for_every_rule(
    rule: Any, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree, params = _tree(shape), SamplingParams(temperature=0.9)
    uniforms = np.random.default_rng(1).random(24)
    want = rule(tree, PathRows(_logits(), tree, params, History([3])), uniforms)
    copies = Copies(monkeypatch)
    assert rule(tree, PathRows(_logits(), tree, params, History([3])), uniforms) == want
    assert copies.rows == [24]


def test_arg_max_of_a_tree_waits_once_and_says_what_is_not_finite(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Copies(monkeypatch)
    waits, tree, params = [0], _tree("chain"), SamplingParams()
    for name in ("tolist", "item", "__bool__", "cpu"):
        usual = getattr(Tensor, name)

        def read(self: Tensor, usual: Any = usual) -> Any:
            waits[0] += 1
            return usual(self)

        monkeypatch.setattr(Tensor, name, read)
    rows = PathRows(_logits(), tree, params, History([3]))
    best = [rows.best(node) for node in range(24)]
    assert waits[0] == 1
    assert best == _logits().argmax(-1).tolist()
    for wrong in (float("nan"), float("inf"), -float("inf")):
        logits = _logits()
        logits[20, 7] = wrong
        with pytest.raises(NumericalError, match="NaN or infinite"):
            PathRows(logits, tree, params, History([3])).best(0)


def test_a_descent_through_a_large_tree_takes_a_copy_for_many_nodes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copies = Copies(monkeypatch)
    monkeypatch.setattr(host_rows, "_COPY_BYTES", 6 * VOCAB * 4)
    rows = HostRows(_logits(), _tree("chain"))
    for node in range(24):
        assert np.array_equal(rows[node], _logits()[node].numpy())
    assert copies.rows == [6] * 4


def test_leaf_to_root_verification_of_drawn_trees_takes_few_copies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parents = expansion_tree([3, 2, 2])
    count = len(parents)
    rng = np.random.default_rng(2)
    tree = TokenTree(
        rng.permutation(VOCAB)[:count].tolist(),
        parents,
        [Law.POINT] + [Law.WITH_REPLACEMENT] * (count - 1),
        parents,
        torch.from_numpy(rng.dirichlet(np.full(VOCAB, 0.2), count)),
    )
    logits, params = _logits()[:1].repeat(count, 1), SamplingParams(temperature=1.0)
    uniforms = rng.random(count)
    want = verify.traversal(tree, PathRows(logits, tree, params, History([3])), uniforms)
    copies = Copies(monkeypatch)
    monkeypatch.setattr(host_rows, "_COPY_BYTES", 8 * VOCAB * 4)
    got = verify.traversal(tree, PathRows(logits, tree, params, History([3])), uniforms)
    assert got == want
    assert len(copies.rows) <= -(-count // 8)
