"""What drafters promise: budgets, laws, rows, and keeping up with the text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from conftest import tiny_llama
from redwood.algorithms.specinfer import expansion_tree
from redwood.backends.load import wrap_model
from redwood.drafters.base import ModelDrafter, NgramDrafter, NoDrafter, UnionDrafter
from redwood.drafters.context import Context
from redwood.errors import ArgumentError, NumericalError
from redwood.sampling import GumbelNoise, History, SamplingParams
from redwood.tree import Law

TEXT = [5, 9, 17, 5, 9, 17, 5, 9]


def _context(key: int = 1, text: list[int] = TEXT, **params: Any) -> Context:
    made = SamplingParams(**params)
    noise = GumbelNoise(1, 300) if made.coupled and made.temperature else None
    return Context(key, list(text), made, History(text), 300, np.random.default_rng(key), noise)


def _model(**more: Any) -> ModelDrafter:
    return ModelDrafter(wrap_model(tiny_llama(3, 1)), **more)


@pytest.mark.parametrize("budget", [1, 2, 7, 20])
def test_trees_start_at_the_last_token_and_keep_the_budget(budget: int) -> None:
    union = UnionDrafter([NgramDrafter(), _model(width=20)])
    for drafter in (NoDrafter(), NgramDrafter(), _model(), union):
        for temperature in (0.0, 0.7):
            (tree,) = drafter.propose([_context(temperature=temperature)], [budget])
            assert tree.token_list[0] == TEXT[-1]
            assert 1 <= len(tree) <= budget
            drafter.release(1)
            drafter.release(99)


@pytest.mark.parametrize(
    ("law", "params", "want"),
    [
        ("without_replacement", {"temperature": 1.0}, Law.WITHOUT_REPLACEMENT),
        ("with_replacement", {"temperature": 1.0}, Law.WITH_REPLACEMENT),
        ("point", {"temperature": 1.0}, Law.POINT),
        ("without_replacement", {"temperature": 0.0}, Law.POINT),
        ("without_replacement", {"temperature": 1.0, "seed": 1}, Law.COUPLED),
    ],
)
def test_the_law_of_every_node_is_written_on_it(
    law: str, params: dict[str, Any], want: Law
) -> None:
    drafter = _model(tree=expansion_tree([3, 2]), law=law, width=10)
    (tree,) = drafter.propose([_context(**params)], [10])
    assert set(tree.law_list[1:]) == {int(want)}
    drawn = want in (Law.WITHOUT_REPLACEMENT, Law.WITH_REPLACEMENT)
    assert (tree.draft_probs is not None) == drawn
    if drawn:
        assert tree.draft_probs is not None and tree.draft_probs.shape == (4, 10)
        assert tree.draft_row_list == [-1, 0, 0, 0, 1, 1, 2, 2, 3, 3]
        torch.testing.assert_close(tree.draft_probs.sum(1), torch.ones(4, dtype=torch.float64))


def test_tokens_that_truncation_leaves_out_are_drawn_last() -> None:
    star = [-1, 0, 0, 0]
    (best,) = _model(tree=star).propose([_context(temperature=0.0)], [4])
    cold = {"temperature": 1.5e-3, "top_p": 1e-6}  # the law is one token, then as good as a ranking
    for more in ({}, {"top_k": 1}, {"min_p": 0.9}):
        (tree,) = _model(tree=star).propose([_context(**cold, **more)], [4])
        assert tree.token_list == best.token_list
        assert tree.draft_probs is not None and tree.draft_probs[0].sum() == pytest.approx(1.0)


def test_drafts_keep_up_with_any_text_and_equal_those_of_a_fresh_drafter() -> None:
    """Whatever was accepted, the drafter's KV equals a recomputation."""
    drafter = _model(tree=expansion_tree([2, 2, 1]), law="point")
    rng = np.random.default_rng(0)
    context = _context(temperature=0.0)
    for _ in range(25):
        (tree,) = drafter.propose([context], [11])
        (fresh,) = _model(tree=expansion_tree([2, 2, 1]), law="point").propose([context], [11])
        assert tree.token_list == fresh.token_list
        path = tree.path(int(rng.integers(len(tree))))[1:]
        context.token_ids += [tree.token_list[n] for n in path] + [int(rng.integers(300))]


@pytest.mark.parametrize("beforehand", [True, False])
@pytest.mark.parametrize("length", [2, 9, 10, 11, 40])
def test_a_window_reads_the_first_few_and_the_last_tokens(length: int, beforehand: bool) -> None:
    """Its drafts are those of a drafter that was given the shorter text."""
    how: dict[str, Any] = {"tree": expansion_tree([2, 2, 1]), "law": "point"}
    drafter = _model(window=6, **how)
    rng = np.random.default_rng(0)
    text = rng.integers(0, 300, length).tolist()
    skipped = max(0, length - 10)
    context = _context(text=text, temperature=0.0)
    assert drafter.reads(length) == length - skipped
    if beforehand:
        drafter.prefill([context])
    for _ in range(12):
        (tree,) = drafter.propose([context], [11])
        short = context.token_ids[:4] + context.token_ids[4 + skipped :]
        (fresh,) = _model(**how).propose([_context(text=short, temperature=0.0)], [11])
        assert tree.token_list == fresh.token_list
        path = tree.path(int(rng.integers(len(tree))))[1:]
        context.token_ids += [tree.token_list[n] for n in path] + [int(rng.integers(300))]


def test_a_window_serves_texts_beyond_the_drafters_own_context() -> None:
    model = tiny_llama(3, 1)
    drafter = ModelDrafter(wrap_model(model, capacity=32), window=10)
    context = _context(text=list(range(100)), temperature=0.0)
    drafter.prefill([context])
    assert len(drafter.propose([context], [8])[0]) == 8
    whole = ModelDrafter(wrap_model(model, capacity=32))
    whole.prefill([context])
    assert len(whole.propose([context], [8])[0]) == 1


def test_rows_are_drafted_together_as_alone() -> None:
    texts = [TEXT, [4], list(range(50, 90))]
    shape = expansion_tree([2, 1])
    together = _model(tree=shape).propose(
        [_context(i, text, temperature=0.0) for i, text in enumerate(texts)], [5, 3, 5]
    )
    for i, text in enumerate(texts):
        (alone,) = _model(tree=shape).propose([_context(i, text, temperature=0.0)], [[5, 3, 5][i]])
        assert together[i].token_list == alone.token_list


def test_a_union_holds_drawn_and_point_nodes() -> None:
    union = UnionDrafter([NgramDrafter(), _model(tree=[-1, 0, 0, 1])])
    (tree,) = union.propose([_context(temperature=1.0)], [12])
    laws = set(tree.law_list[1:])
    assert laws == {int(Law.WITHOUT_REPLACEMENT), int(Law.POINT)}
    drawn = [i for i, law in enumerate(tree.law_list) if i and law]
    assert drawn == [1, 2, 3]  # drawn nodes stand before POINT nodes
    assert union.name == "ngram+model"


def test_wrong_settings_are_refused() -> None:
    backend = wrap_model(tiny_llama(3, 1))
    few = wrap_model(tiny_llama(3, 1, vocab_size=20))
    for bad in (
        lambda: ModelDrafter(backend, law="magic"),
        lambda: ModelDrafter(backend, width=0),
        lambda: ModelDrafter(backend, window=0),
        lambda: ModelDrafter(backend, [-1, 3]),
        lambda: UnionDrafter([]),
        lambda: ModelDrafter(few, [-1] + [0] * 25).propose([_context(text=[5])], [26]),
    ):
        with pytest.raises(ArgumentError):
            bad()


def test_a_broken_drafter_is_an_error_not_a_draft() -> None:
    model = tiny_llama(3, 1)
    drafter = ModelDrafter(wrap_model(model))
    with torch.no_grad():
        model.lm_head.weight[3, 3] = float("nan")
    with pytest.raises(NumericalError):
        drafter.propose([_context(temperature=1.0)], [4])


def test_drafters_refuse_sizes_that_are_no_counts() -> None:
    with pytest.raises(ArgumentError, match="max_branch"):
        NgramDrafter(max_branch=0)
    backend = wrap_model(tiny_llama())
    with pytest.raises(ArgumentError, match="max_levels"):
        ModelDrafter(backend, max_levels=1)
    with pytest.raises(ArgumentError, match="tree"):
        ModelDrafter(backend, 2.5)  # type: ignore[arg-type]
