"""Token Recycling: the matrix, the static tree and its filling, by cases made by hand."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from redwood.algorithms.token_recycling import (
    PUBLISHED_LEVELS,
    AdjacencyMatrix,
    best_tokens,
    static_tree,
)
from redwood.errors import ArgumentError
from redwood.tree import Law, depths_of

GUEST, SPEAKER, SPEAK, SPE, AT, FOR, IS, INGS, IN, ERS, EVENT, A, AN = range(13)


def _ranks(parents: list[int], ranks: list[int], node: int) -> tuple[int, ...]:
    """The path of a static node as the ranks on it."""
    path: list[int] = []
    while node > 0:
        path.append(ranks[node])
        node = parents[node]
    return tuple(path[::-1])


def _filled() -> AdjacencyMatrix:
    """The matrix of the paper's figure 2."""
    matrix = AdjacencyMatrix(13, 3)
    rows = [[SPEAKER, SPEAK, SPE], [AT, FOR, IS], [INGS, IN, ERS]]
    matrix.update([GUEST, SPEAKER, SPEAK], np.array(rows))
    return matrix


def test_the_published_tree_has_its_levels_and_its_paths() -> None:
    parents, ranks = static_tree()
    assert Counter(depths_of(parents)) == {0: 1, 1: 8, 2: 21, 3: 25, 4: 15, 5: 8, 6: 3}
    paths = {_ranks(parents, ranks, node) for node in range(len(parents))}
    assert len(paths) == 81
    for level, counts in enumerate(PUBLISHED_LEVELS, start=1):
        # Nodes that stand earlier have more children: the first path is the deepest.
        assert (0,) * level in paths and counts[0] == max(counts)
    assert {(7, 0), (3, 1), (5, 0, 0), (3, 0, 0, 0), (1, 0, 0, 0, 0), (0, 0, 0, 1, 0, 0)} <= paths
    assert not {(7, 1), (3, 2), (6, 0, 0), (4, 0, 0, 0), (2, 0, 0, 0, 0)} & paths
    # A path is there only with its elder siblings and its parent.
    assert all(path[:-1] in paths for path in paths if path)
    assert all((*path[:-1], path[-1] - 1) in paths for path in paths if path and path[-1])


def test_a_draft_is_filled_level_by_level_as_in_the_figure() -> None:
    tree = _filled().draft(GUEST, [(2,), (2, 1)])
    assert tree.token_list == [GUEST, SPEAKER, SPEAK, AT, FOR, INGS]
    assert tree.parent_list == [-1, 0, 0, 1, 1, 2]
    assert set(tree.law_list) == {int(Law.POINT)}


def test_what_is_not_known_is_left_out_with_all_below_it() -> None:
    matrix = _filled()
    assert matrix.draft(AT, [(2,), (2, 1)]).token_list == [AT]
    # SPEAKER has no known grandchildren; SPEAK's child keeps its place all the same.
    tree = matrix.draft(GUEST, [(2,), (1, 1), (3, 3)])
    assert tree.token_list == [GUEST, SPEAKER, SPEAK, AT, INGS]
    matrix.update([INGS], np.array([[A, AN, AT]]))
    tree = matrix.draft(GUEST, [(2,), (1, 1), (3, 3)])
    assert tree.token_list == [GUEST, SPEAKER, SPEAK, AT, INGS, A, AN, AT]
    assert tree.parent_list == [-1, 0, 0, 1, 2, 4, 4, 4]


def test_every_scored_node_overwrites_and_the_last_of_equal_tokens_stays() -> None:
    matrix = _filled()
    news = [[EVENT, A, AN], [A, AN, AT], [AN, AT, A]]
    matrix.update([GUEST, AT, AT], np.array(news))
    assert matrix.successors[GUEST].tolist() == news[0]
    assert matrix.successors[AT].tolist() == news[2]
    assert matrix.successors[SPEAKER].tolist() == [AT, FOR, IS]


def test_a_token_that_follows_itself_is_drafted_to_the_last_level() -> None:
    matrix = AdjacencyMatrix(8, 8)
    matrix.update([3], np.array([[3, 0, 1, 2, 4, 5, 6, 7]]))
    tree = matrix.draft(3)
    chain = [0]
    for _ in PUBLISHED_LEVELS:
        below = [n for n in range(len(tree)) if tree.parent_list[n] == chain[-1]]
        chain.append(next(n for n in below if tree.token_list[n] == 3))
    assert len(chain) == 7


def test_best_tokens_are_ordered_and_equal_ones_by_id() -> None:
    rows = np.array([[0.1, 0.4, 0.2, 0.4], [3.0, -1.0, 3.0, 5.0]])
    assert best_tokens(rows, 3).tolist() == [[1, 3, 2], [3, 0, 2]]


def test_bad_input_is_refused_and_changes_nothing() -> None:
    with pytest.raises(ArgumentError, match="counts for a level"):
        static_tree([(1,), (1, 1)])
    with pytest.raises(ArgumentError, match="children"):
        static_tree([(-1,)])
    with pytest.raises(ArgumentError, match="vocab_size"):
        AdjacencyMatrix(0)
    matrix = _filled()
    with pytest.raises(ArgumentError, match="at most 3"):
        matrix.draft(GUEST, [(4,)])
    before = matrix.successors.copy()
    for tokens, best in (([1], [[1, 2]]), ([1, 2], [[1, 2, 3]]), ([13], [[1, 2, 3]])):
        with pytest.raises(ArgumentError):
            matrix.update(tokens, np.array(best))
    with pytest.raises(ArgumentError, match="outside"):
        matrix.update([1, -1], np.array([[1, 2, 3], [1, 2, 3]]))
    with pytest.raises(ArgumentError, match="outside"):
        matrix.update([1], np.array([[1, 2, -1]]))
    assert (matrix.successors == before).all()
