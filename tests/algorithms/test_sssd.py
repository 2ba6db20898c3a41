"""The index of prompt and output, and the candidate tree grown from it."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from datastore_kit import store_of
from redwood.algorithms.sssd import (
    DECAYS,
    PROMPT_WEIGHT,
    Candidate,
    TextIndex,
    budget_by_batch,
    candidate_tree,
    tree_bounds,
)
from redwood.datastore.search import look_up
from redwood.errors import ArgumentError


def _paths(tree: list[Candidate]) -> list[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = [()]
    for candidate in tree:
        paths.append((*paths[candidate.parent], candidate.token_id))
    return paths[1:]


def test_the_only_continuation_is_followed_to_the_end_of_the_text() -> None:
    text = [1, 2, 3, 4, 5, 6, 7, 1, 2]
    tree = candidate_tree(TextIndex(text), text[-4:], 100)
    assert _paths(tree)[-1][:5] == (3, 4, 5, 6, 7)


def test_nothing_is_drafted_for_a_new_token_or_a_budget_of_one() -> None:
    assert candidate_tree(TextIndex([1, 2, 3]), [3], 10) == []
    assert candidate_tree(TextIndex([1, 2, 1]), [1], 1) == []
    assert candidate_tree(TextIndex(), [], 10) == []


def test_longer_matches_come_first() -> None:
    # After (7, 8) came 1; after 8 alone came 2, twice.
    text = [7, 8, 1, 0, 5, 8, 2, 0, 6, 8, 2, 0, 7, 8]
    tree = candidate_tree(TextIndex(text), text[-2:], 3)
    assert tree[0].token_id == 1 and tree[1].token_id in (0, 2)


def test_priorities_are_the_published_ones() -> None:
    text = [1, 2, 9, 1, 3, 9, 1, 2, 8, 1]
    tree = candidate_tree(TextIndex(text), [1], 4)
    by_path = dict(zip(_paths(tree), tree, strict=True))
    assert abs(by_path[(2,)].priority - PROMPT_WEIGHT * 2 / 3) < 1e-12
    assert abs(by_path[(2, 9)].priority - PROMPT_WEIGHT * 2 / 3 * DECAYS[0] * 1 / 2) < 1e-12


def test_a_node_found_by_two_match_lengths_is_one_node() -> None:
    text = [4, 5, 6, 4, 5, 6, 4, 5]
    tree = candidate_tree(TextIndex(text), text[-4:], 50)
    assert len(set(_paths(tree))) == len(tree)


def test_branches_and_budget_are_bounded() -> None:
    rng = random.Random(0)
    text = [rng.randrange(6) for _ in range(400)]
    for budget in (1, 2, 7, 40):
        tree = candidate_tree(TextIndex(text), text[-4:], budget, max_branch=2)
        assert len(tree) <= max(0, budget - 1)
        assert all(c.parent <= i for i, c in enumerate(tree))
        widths = Counter(c.parent for c in tree)
        assert max(widths.values(), default=0) <= 2


def test_growing_by_tokens_equals_building_at_once_and_the_trie_of_the_paper() -> None:
    rng = random.Random(1)
    for _ in range(30):
        text = [rng.randrange(4) for _ in range(rng.randint(1, 60))]
        grown = TextIndex()
        for token in text:
            grown.extend([token])
        once = TextIndex(text)
        assert candidate_tree(grown, text[-4:], 30) == candidate_tree(once, text[-4:], 30)
        # Counts are those of a trie of all windows: occurrences of the context that go on.
        for length, places in once.matches(text[-4:]):
            context = text[-length:]
            counts = Counter(
                text[i + length]
                for i in range(len(text) - length)
                if text[i : i + length] == context
            )
            assert Counter({t: len(p) for t, p in once.followers(places).items()}) == counts


# Entries of the authors' unit test, in chunks of 12 tokens without separators: so one document each
# here, which is what runs on there.
ENTRIES = [[1, 2, 3, 4, 1, 2, 31, 41, 5, 6, 7, 8], list(range(9, 17))]


@pytest.mark.parametrize(
    ("query", "want"),
    [
        ([9, 10], {(11,), (11, 12), (11, 12, 13)}),
        (
            [1, 2],
            {(3,), (3, 4), (3, 4, 1), (31,), (31, 41), (31, 41, 5)},
        ),
        ([5, 6], {(7,), (7, 8)}),
    ],
)
def test_the_datastore_gives_what_the_authors_do(
    tmp_path: Path, query: list[int], want: set[tuple[int, ...]]
) -> None:
    """Black-box vectors of their unit test: branch 3, eight nodes."""
    store = store_of(tmp_path / "s", ENTRIES)
    found = look_up(store.chunks, query, depth=3).token_lists()
    tree = candidate_tree(TextIndex(), query, 8, continuations=found)
    assert set(_paths(tree)) == want


def test_self_output_gives_what_the_authors_do() -> None:
    """Their window of six tokens is bounded here by the budget; ours need not be complete."""
    index = TextIndex([0, 24, 21, 2, 12])
    index.extend([13, 14, 15, 16])
    assert _paths(candidate_tree(index, [24, 21], 6))[-1] == (2, 12, 13, 14, 15)


def test_priorities_of_the_datastore_are_the_published_ones() -> None:
    """Shares of all continuations, no weight of the source and no decay; paths are products."""
    rows = [[1, 2, 3], [1, 2, 4], [1, 5], [6]]
    tree = candidate_tree(TextIndex(), [0], 10, continuations=rows)
    chances = {path: c.priority for path, c in zip(_paths(tree), tree, strict=True)}
    want = {(1,): 3 / 4, (6,): 1 / 4, (1, 2): 3 / 4 * 2 / 3, (1, 5): 3 / 4 / 3}
    want |= {(1, 2, 3): 1 / 4, (1, 2, 4): 1 / 4}
    assert chances == pytest.approx(want)


def test_sources_join_by_the_larger_priority_and_pay_for_a_node_once() -> None:
    text = [7, 1, 2, 9, 7, 1, 2]  # 9 follows by matches of 3, 2, 1: 0.6
    rows = [[9, 8], [3]]  # 9 has 1/2 here, and 8 follows it
    tree = candidate_tree(TextIndex(text), text[-4:], 4, continuations=rows)
    assert _paths(tree) == [(9,), (9, 7), (9, 8)]  # 0.6, 0.6 x 0.9, 1/2 before 0.6 x 0.9 x 0.9
    assert tree[0].priority == pytest.approx(PROMPT_WEIGHT)
    whole = candidate_tree(TextIndex(text), text[-4:], 50, continuations=rows)
    paths = _paths(whole)
    assert len(set(paths)) == len(paths) and {(9, 8), (3,)} <= set(paths)
    at = dict(zip(paths, whole, strict=True))
    # The datastore's child hangs below the shared node, by the priority of its own entry.
    assert at[(9, 8)].priority == pytest.approx(1 / 2)


BATCHES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)


@pytest.mark.parametrize(
    ("ratio", "want"),
    [
        (76.0, (32, 32, 16, 8, 4, 2, 2, 1, 1, 1, 1)),  # RTX 3090
        (153.0, (32, 32, 24, 16, 8, 5, 4, 2, 2, 1, 1)),  # A100
        (164.0, (32, 32, 24, 20, 10, 6, 5, 3, 2, 1, 1)),  # RTX 4090
        (295.0, (32, 32, 24, 24, 12, 8, 6, 4, 3, 2, 1)),  # H100
        (206.0, (32, 32, 24, 24, 12, 8, 6, 4, 3, 2, 1)),  # H200
    ],
)
def test_budgets_by_batch_are_those_of_the_released_code(
    ratio: float, want: tuple[int, ...]
) -> None:
    assert tuple(budget_by_batch(batch, ratio) for batch in BATCHES) == want


def test_budgets_by_batch_fall_with_the_batch_and_rise_with_the_machine() -> None:
    for batch in range(1, 200):
        sizes = [budget_by_batch(batch, ratio) for ratio in (0.5, 4, 15, 16, 40, 100, 192, 1e9)]
        assert sizes == sorted(sizes) and sizes[0] == 1
        if batch > 8:
            assert budget_by_batch(batch, 500.0) >= budget_by_batch(batch + 1, 500.0)


@pytest.mark.parametrize(
    ("batch", "ratio"), [(0, 100.0), (-1, 100.0), (1.5, 100.0), (1, 0.0), (1, float("inf"))]
)
def test_budgets_by_batch_refuse_what_cannot_be(batch: Any, ratio: float) -> None:
    with pytest.raises(ArgumentError):
        budget_by_batch(batch, ratio)


def test_tree_bounds_are_those_of_the_released_code() -> None:
    sizes = (1, 2, 3, 5, 6, 8, 9, 32, 33, 48, 49)
    depths = (0, 1, 2, 4, 5, 5, 6, 6, 8, 8, 10)
    branches = (0, 1, 2, 4, 5, 5, 5, 5, 5, 5, 5)
    assert [tree_bounds(size) for size in sizes] == list(zip(depths, branches, strict=True))
