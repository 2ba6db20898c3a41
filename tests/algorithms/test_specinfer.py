"""Expansion trees, merged trees and i.i.d. draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from redwood.algorithms.specinfer import (
    draw_with_replacement,
    expansion_tree,
    merge_trees,
)
from redwood.errors import ArgumentError
from redwood.tree import Law, TokenTree, depths_of

WOR, WITH, POINT, COUPLED = (
    Law.WITHOUT_REPLACEMENT,
    Law.WITH_REPLACEMENT,
    Law.POINT,
    Law.COUPLED,
)


def test_expansion_trees_have_the_published_sizes() -> None:
    assert expansion_tree([2, 2, 1]) == [-1, 0, 0, 1, 1, 2, 2, 3, 4, 5, 6]
    assert expansion_tree([]) == [-1]
    default = expansion_tree([1, 1, 3, 1, 1, 1, 1, 1])
    assert len(default) == 1 + 20 and max(depths_of(default)) == 8
    with pytest.raises(ArgumentError, match="width"):
        expansion_tree([2, 0])


def _drawn(tokens: list[int], parents: list[int], law: Law, rows: list[int], r: int) -> TokenTree:
    probs = torch.full((r, 8), 1 / 8, dtype=torch.float64)
    return TokenTree(tokens, parents, [int(law)] * len(tokens), rows, probs)  # type: ignore[arg-type]


def _paths(tree: TokenTree) -> set[tuple[int, ...]]:
    return {tuple(tree.token_list[n] for n in tree.path(i)) for i in range(len(tree))}


def test_the_merged_tree_has_the_paths_of_all_trees() -> None:
    a = TokenTree.point([5, 1, 2, 3], [-1, 0, 1, 0])
    b = TokenTree.point([5, 1, 4, 6], [-1, 0, 1, 2])
    merged = merge_trees([a, b])
    assert _paths(merged) == _paths(a) | _paths(b)
    assert len(merged) == len(_paths(merged))  # equal siblings of POINT nodes are one


def test_drawn_siblings_stay_separate_trials_with_their_own_rows() -> None:
    a = _drawn([5, 1, 2], [-1, 0, 0], WOR, [-1, 0, 0], 1)
    b = _drawn([5, 1, 3], [-1, 0, 1], WITH, [-1, 0, 1], 2)
    merged = merge_trees([a, b])
    assert merged.token_list == [5, 1, 2, 1, 3]
    assert merged.parent_list == [-1, 0, 0, 0, 3]
    assert merged.draft_row_list == [-1, 0, 0, 1, 2]
    assert merged.law_list[1:] == [WOR, WOR, WITH, WITH]
    assert merged.draft_probs is not None and merged.draft_probs.shape == (3, 8)


def test_point_nodes_join_drawn_ones_and_hang_their_children_below() -> None:
    a = _drawn([5, 1], [-1, 0], WOR, [-1, 0], 1)
    b = TokenTree.point([5, 1, 7, 2], [-1, 0, 1, 0])
    merged = merge_trees([a, b])
    assert merged.token_list == [5, 1, 7, 2]
    assert merged.parent_list == [-1, 0, 1, 0]
    assert merged.law_list[1:] == [WOR, POINT, POINT]
    # The other way round the drawn node is a trial of its own and must stay.
    assert len(merge_trees([b, a])) == 5


def test_coupled_nodes_join_coupled_and_point_ones_only() -> None:
    coupled = TokenTree([5, 1], [-1, 0], [0, int(COUPLED)], [-1, -1])  # type: ignore[arg-type]
    assert len(merge_trees([coupled, coupled])) == 2
    assert len(merge_trees([TokenTree.point([5, 1], [-1, 0]), coupled])) == 2
    assert len(merge_trees([_drawn([5, 1], [-1, 0], WITH, [-1, 0], 1), coupled])) == 3


def test_dense_and_sparse_rows_are_stacked_without_changing_a_law() -> None:
    dense = TokenTree([0, 3], [-1, 0], [0, 1], [-1, 0], [[0.1, 0.2, 0.3, 0.4]])  # type: ignore[arg-type]
    sparse = TokenTree([0, 2], [-1, 0], [0, 1], [-1, 0], [[0.9, 0.1]], [[2, 0]])  # type: ignore[arg-type]
    merged = merge_trees([dense, sparse])
    laws = []
    for row in (0, 1):
        probs, ids = merged.draft_row(row)
        assert ids is not None
        law = np.zeros(4)
        np.add.at(law, ids, probs)
        laws.append(law)
    np.testing.assert_allclose(laws, [[0.1, 0.2, 0.3, 0.4], [0.1, 0, 0.9, 0]])


def test_trees_with_other_roots_are_refused() -> None:
    with pytest.raises(ArgumentError, match="root"):
        merge_trees([TokenTree.chain([1, 2]), TokenTree.chain([2, 2])])
    with pytest.raises(ArgumentError):
        merge_trees([])


def test_draws_with_replacement_follow_the_row() -> None:
    probs = np.array([0.0, 0.25, 0.0, 0.75])
    grid = (np.arange(1000) + 0.5) / 1000
    drawn = np.array(draw_with_replacement(probs, grid.tolist()))
    assert (drawn == 1).sum() == 250 and (drawn == 3).sum() == 750
    ids = np.array([9, 8, 7, 6])
    assert set(draw_with_replacement(probs, [0.0, 0.999999], ids)) == {8, 6}


@pytest.mark.parametrize("widths", [None, 3, ["2"], [2.5], [True], "12"])
def test_expansion_widths_that_are_no_counts_are_refused(widths: object) -> None:
    with pytest.raises(ArgumentError, match="expansion width"):
        expansion_tree(widths)  # type: ignore[arg-type]
