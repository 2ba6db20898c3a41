"""The drafted tree as a value: shapes that are refused, paths, masks, draft rows."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from redwood.errors import ArgumentError, NumericalError
from redwood.tree import DraftRow, Law, TokenTree, ancestor_mask, children_of, depths_of

PARENTS = [-1, 0, 0, 1, 1, 3]


def tree(**changes: Any) -> TokenTree:
    """A root with two drawn children."""
    fields: dict[str, Any] = {
        "token_ids": [7, 0, 2],
        "parents": [-1, 0, 0],
        "laws": [0, Law.WITHOUT_REPLACEMENT, Law.WITH_REPLACEMENT],
        "draft_rows": [-1, 0, 0],
        "draft_probs": [[0.5, 0.2, 0.3]],
    }
    return TokenTree(**fields | changes)


def test_lists_arrays_and_tensors_are_stored_as_tensors_of_the_stated_types() -> None:
    for kind in (list, np.array, torch.tensor):
        made = tree(token_ids=kind([7, 0, 2]), draft_probs=kind([[0.5, 0.2, 0.3]]))
        assert made.token_ids.dtype == made.parents.dtype == made.draft_rows.dtype == torch.int64
        assert made.laws.dtype == torch.int8
        assert made.draft_probs is not None and made.draft_probs.is_floating_point()
    exact = tree().draft_row(0).probs
    assert exact.tolist() == [0.5, 0.2, 0.3]  # lists are not rounded to float32
    whole_numbers = tree(draft_probs=[[1, 0, 0]])
    assert whole_numbers.draft_probs is not None
    assert whole_numbers.draft_probs.dtype == torch.float64


def test_values_are_as_python_integers_in_the_lists() -> None:
    made = tree()
    assert (made.token_list, made.parent_list) == ([7, 0, 2], [-1, 0, 0])
    assert (made.law_list, made.draft_row_list) == ([0, 1, 2], [-1, 0, 0])
    assert all(type(token) is int for token in made.token_list)
    assert len(made) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": [], "parents": [], "laws": [], "draft_rows": []}, "at least its root"),
        ({"token_ids": 7}, "list of tokens"),
        ({"token_ids": [[7, 0, 2]]}, "list of tokens"),
        ({"parents": [-1, 0]}, "parents must have 3 entries"),
        ({"laws": [0, 1]}, "laws must have 3 entries"),
        ({"draft_rows": [-1, 0, 0, 0]}, "draft_rows must have 3 entries"),
        ({"parents": [0, 0, 0]}, "start with -1"),
        ({"parents": [-1, -1, 0]}, "precede their children"),
        ({"parents": [-1, 2, 0]}, "precede their children"),
        ({"parents": [-1, 1, 0]}, "precede their children"),
        ({"laws": [0, 4, 1]}, "node 1 has unknown law 4"),
        ({"laws": [0, -1, 1]}, "unknown law"),
        ({"draft_rows": [-1, 0, 1]}, "draft row 1, but draft_probs has 1 rows"),
        ({"draft_rows": [-1, -1, 0]}, "draft row -1"),
        ({"draft_probs": None}, "draft_probs has 0 rows"),
        ({"draft_probs": [0.5, 0.2, 0.3]}, "must be a table"),
        ({"draft_ids": [[0, 1]]}, "shape of draft_probs"),
        ({"draft_probs": None, "laws": [0, 0, 0], "draft_ids": [[0, 1]]}, "shape of draft_probs"),
    ],
)
def test_shapes_that_disagree_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        tree(**changes)


def test_the_law_of_the_root_and_draft_rows_of_point_and_coupled_nodes_are_not_looked_at() -> None:
    made = tree(laws=[1, Law.POINT, Law.COUPLED], draft_rows=[-1, -1, -1], draft_probs=None)
    assert made.law_list == [1, 0, 3]


def test_chain_and_point_make_nodes_without_chance() -> None:
    chain = TokenTree.chain([5, 6, 7])
    assert (chain.parent_list, chain.law_list) == ([-1, 0, 1], [0, 0, 0])
    assert (chain.levels, chain.draft_probs) == (3, None)
    alone = TokenTree.chain([5])
    assert (alone.levels, alone.children, len(alone)) == (1, [[]], 1)
    assert TokenTree.point(range(6), PARENTS).parent_list == PARENTS


def test_children_depths_levels_and_paths_agree_with_the_parents() -> None:
    made = TokenTree.point(range(6), PARENTS)
    assert made.children == children_of(PARENTS) == [[1, 2], [3, 4], [], [5], [], []]
    assert made.depths == depths_of(PARENTS) == [0, 1, 1, 2, 2, 3]
    assert made.levels == 4
    assert [made.path(node) for node in (0, 2, 5)] == [[0], [0, 2], [0, 1, 3, 5]]


def test_mask_shows_each_node_itself_and_its_ancestors() -> None:
    rng = np.random.default_rng(0)
    for size in (1, 2, 9, 40):
        parents = [-1, *(int(rng.integers(node)) for node in range(1, size))]
        made = TokenTree.point(range(size), parents)
        expected = np.zeros((size, size), dtype=bool)
        for node in range(size):
            expected[node, made.path(node)] = True
        np.testing.assert_array_equal(ancestor_mask(parents), expected)


def test_mask_of_several_roots_keeps_their_trees_apart() -> None:
    mask = ancestor_mask([-1, -1, 0, 1])
    np.testing.assert_array_equal(mask, [[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1]])
    assert ancestor_mask([]).shape == (0, 0)


def test_draft_rows_come_as_float64_once_each() -> None:
    made = tree(draft_probs=torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float16))
    row = made.draft_row(0)
    assert isinstance(row, DraftRow) and row.ids is None
    assert row.probs.dtype == np.float64 and row.probs.tolist() == [0.5, 0.25, 0.25]
    assert made.draft_row(0) is row


def test_sparse_draft_rows_come_with_their_tokens() -> None:
    probs, ids = tree(draft_probs=[[0.6, 0.4, 0.0]], draft_ids=[[2, 0, 2]]).draft_row(0)
    assert ids is not None and ids.tolist() == [2, 0, 2]
    assert probs.tolist() == pytest.approx([0.6, 0.4, 0.0])


def test_trees_are_compared_by_identity_and_cannot_be_changed() -> None:
    made = tree()
    assert made != tree() and made == made
    with pytest.raises(AttributeError):
        made.parents = torch.zeros(3)  # type: ignore[misc]


@pytest.mark.parametrize(
    "changes",
    [
        {"token_ids": [5, 6, 7.5, 8]},
        {"token_ids": ["a", "b", "c", "d"]},
        {"token_ids": None},
        {"parents": None},
        {"laws": [0, 256, 0, 0]},
        {"laws": np.array([0, 256, 0, 0])},
        {"laws": [0, 0.5, 0, 0]},
        {"token_ids": [5, -6, 7, 8]},
    ],
)
def test_numbers_that_would_be_bent_to_fit_are_refused(changes: dict[str, Any]) -> None:
    given = {"token_ids": [5, 6, 7, 8], "parents": [-1, 0, 1, 2], "laws": [0] * 4}
    with pytest.raises(ArgumentError):
        TokenTree(**{**given, "draft_rows": [-1] * 4, **changes})


def test_the_roots_law_is_not_read() -> None:
    assert len(TokenTree([5, 6], [-1, 0], [9, 0], [-1, -1])) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize("probs", ["abc", [[0.5], [0.5, 0.5]]])
def test_draft_rows_that_are_no_table_of_numbers_are_refused(probs: Any) -> None:
    given: Any = ([5, 6], [-1, 0], [0, 1], [-1, 0])
    with pytest.raises(ArgumentError):
        TokenTree(*given, probs)


@pytest.mark.parametrize(
    ("probs", "ids", "error"),
    [
        ([[-0.5, 1.5]], None, NumericalError),
        ([[0.5, np.nan]], None, NumericalError),
        ([[0.5, 0.5]], [[3, 3]], ArgumentError),
        ([[0.5, 0.5]], [[-1, 3]], ArgumentError),
    ],
)
def test_draft_rows_that_are_no_law_are_refused(
    probs: Any, ids: Any, error: type[Exception]
) -> None:
    given: Any = ([5, 6], [-1, 0], [0, 1], [-1, 0])
    with pytest.raises(error, match="draft row 0"):
        TokenTree(*given, probs, ids).draft_row(0)


@pytest.mark.parametrize(
    "changes",
    [{"token_ids": [7, 2**70, 2]}, {"laws": [300, 1, 2]}, {"parents": [-(2**63) - 1, 0, 0]}],
)
def test_numbers_that_fit_no_tensor_are_refused_at_once(changes: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match="must hold whole numbers"):
        tree(**changes)


def test_a_tree_of_lists_is_that_of_tensors_and_keeps_its_own_copy() -> None:
    tokens, parents = [7, 0, 2], [-1, 0, 0]
    made = TokenTree.point(tokens, parents)
    fields: dict[str, Any] = {"laws": [0, 0, 0], "draft_rows": [-1, -1, -1]}
    fields |= {"token_ids": tokens, "parents": parents}
    tensors = TokenTree(**{name: torch.tensor(value) for name, value in fields.items()})
    listed = TokenTree(**fields)
    tokens[1] = 9
    for one in (made, listed, copy.deepcopy(made), pickle.loads(pickle.dumps(listed))):
        for name in fields:
            own, other = getattr(one, name), getattr(tensors, name)
            assert own.tolist() == other.tolist() and getattr(one, name) is own
        assert one.laws.dtype == torch.int8 and one.token_ids.dtype == torch.int64
        assert one.token_list == [7, 0, 2] and one.depths == [0, 1, 1]
    with pytest.raises(AttributeError, match="has no nodes"):
        getattr(made, "nodes")  # noqa: B009
