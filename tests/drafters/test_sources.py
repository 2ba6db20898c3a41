"""What drafted a node is noted on it, goes with it, and changes nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from conftest import tiny_llama
from redwood import testing, verify
from redwood.algorithms.sources import Source, source_names
from redwood.algorithms.specinfer import merge_trees
from redwood.algorithms.successors import successor_table
from redwood.backends.load import wrap_model
from redwood.drafters.base import ModelDrafter, NgramDrafter, UnionDrafter
from redwood.drafters.context import Context
from redwood.drafters.prediction import Prediction
from redwood.errors import ArgumentError
from redwood.sampling import GumbelNoise, History, SamplingParams
from redwood.tree import TokenTree

TEXT = [5, 9, 17, 5, 9, 17, 5, 9]


def _context(**more: Any) -> Context:
    params = SamplingParams(**more.pop("params", {}))
    noise = GumbelNoise(1, 300) if params.coupled and params.temperature else None
    rng = np.random.default_rng(1)
    made = Context(1, list(TEXT), params, History(TEXT), 300, rng, noise)
    return replace(made, **more) if more else made


def _by_token(tree: TokenTree) -> dict[int, Source]:
    assert tree.sources is not None and tree.sources[0] == 0
    found = dict[int, Source]()
    for token, bits in zip(tree.token_list[1:], tree.sources[1:], strict=True):
        found[token] = found.get(token, Source(0)) | Source(bits)
    return found


def test_sources_have_names_and_more_may_come() -> None:
    assert source_names(0) == []
    assert source_names(Source.MODEL | Source.TEXT) == ["text", "model"]
    assert source_names(63) == ["text", "datastore", "table", "prediction", "model", "grammar"]
    assert source_names(1 << 20 | 4) == ["table"]


def test_they_go_with_their_nodes() -> None:
    one = TokenTree.point([1, 2, 3], [-1, 0, 1], None, [0, 1, 4])
    other = TokenTree.point([1, 2, 7], [-1, 0, 1], None, [0, 16, 16])
    merged = merge_trees([one, other])
    assert merged.token_list == [1, 2, 3, 7] and merged.sources == [0, 17, 4, 16]
    assert merged.kept([0, 1, 3]).sources == [0, 17, 16]
    assert merged.kept([0, 1]).sources == [0, 17]
    unknown = TokenTree.point([1, 2], [-1, 0])
    assert merge_trees([unknown, one]).sources == [0, 1, 4]
    assert merge_trees([unknown, unknown]).sources is None and unknown.kept([0]).sources is None
    with pytest.raises(ArgumentError, match="sources must have 2 entries"):
        TokenTree.point([1, 2], [-1, 0], None, [0])


def test_free_drafts_name_every_source_of_a_node() -> None:
    table = successor_table()
    rows = np.array([[17, 40]], np.int32), np.array([[0.6, 0.4]], np.float32)
    table.learn([5], [9], [-1], *rows)
    drafter = NgramDrafter(table=table)
    (tree,) = drafter.propose([_context(prediction=Prediction([40, 41]))], [9])
    found = _by_token(tree)
    assert found[17] == Source.TEXT | Source.TABLE
    assert found[40] == Source.TABLE | Source.PREDICTION and found[41] == Source.PREDICTION
    (fixed,) = NgramDrafter().propose([_context(params=_UNSTEERED)], [9])
    assert set(_by_token(fixed).values()) == {Source.TEXT}
    assert set(_by_token(Prediction([7, 8]).tree(5, 3)).values()) == {Source.PREDICTION}


_UNSTEERED = {"temperature": 0.9, "seed": 1, "verifier": "traversal"}


@pytest.mark.parametrize("params", [{}, {"temperature": 0.8}, {"temperature": 0.8, "seed": 1}])
def test_a_union_keeps_them_apart(params: dict[str, Any]) -> None:
    model = ModelDrafter(wrap_model(tiny_llama(3, 1)))
    (alone,) = model.propose([_context(params=params)], [6])
    assert set(_by_token(alone).values()) == {Source.MODEL}
    union = UnionDrafter([NgramDrafter(), model])
    (tree,) = union.propose([_context(params=params)], [12])
    found = set(_by_token(tree).values())
    assert any(Source.MODEL in each for each in found)
    assert any(Source.TEXT in each for each in found)


@pytest.mark.parametrize("rule", [verify.traversal, verify.recursive])
def test_no_rule_reads_them(rule: Any) -> None:
    rng = np.random.default_rng(3)
    for case in testing.random_cases(seed=7, count=30, max_runs=200):
        for draft in testing.drafts(case)[:4]:
            noted = replace(draft.tree, sources=rng.integers(0, 32, len(draft.tree)).tolist())
            uniforms = rng.random(len(draft.tree))
            want = rule(draft.tree, draft.target_probs, uniforms)
            assert rule(noted, draft.target_probs, uniforms) == want
