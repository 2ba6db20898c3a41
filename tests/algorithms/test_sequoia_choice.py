"""The choice of a size, and what is refused."""

import math
from collections.abc import Iterator

import numpy as np
import pytest

from redwood.algorithms import sequoia
from redwood.algorithms.sequoia import (
    choose_tree,
    expected_tokens,
    optimal_tree,
)
from redwood.errors import ArgumentError
from sequoia_kit import (
    APPENDIX_E,
    DEMO_TIMES,
    SHIPPED,
    Rates,
    branch_of,
    levels_of,
    random_rates,
)

# ---------------------------------------------------------------- the choice of a size


def test_choice_for_the_demo_times() -> None:
    plan = choose_tree(SHIPPED, DEMO_TIMES, 0.3, max_levels=10)
    assert (plan.size, plan.levels, plan.parents) == (4, 4, [-1, 0, 1, 2])
    assert plan.expected_tokens == pytest.approx(2.291431676, abs=1e-9)
    assert plan.time_per_token == pytest.approx(4.887773927, abs=1e-9)
    assert plan.speedup == pytest.approx(2.045921139, abs=1e-9)


def every_pair(
    rates: Rates, times: dict[int, float], draft_time: float, bounds: dict[str, int | None]
) -> Iterator[tuple[float, int, int]]:
    """(time per token, size, levels) with a tree built for each pair on its own."""
    yield times[1], 1, 1
    for size in sorted(times.keys() - {1}):
        for levels in range(2, (bounds["max_levels"] or size) + 1):
            try:
                parents = optimal_tree(
                    rates, size, max_levels=levels, max_branch=bounds["max_branch"]
                )
            except ArgumentError:
                continue
            time = (times[size] + levels * draft_time) / expected_tokens(parents, rates)
            yield time, size, levels


@pytest.mark.parametrize("by_level", [False, True])
@pytest.mark.parametrize("ordered", [False, True])
def test_choice_equals_a_search_over_all_pairs(ordered: bool, by_level: bool) -> None:
    rng = np.random.default_rng(7 + 2 * ordered + by_level)
    for draft_time in (0.0, 0.01, 0.1, 0.4, 5.0):
        for levels, branch in ((None, None), (5, None), (None, 2), (3, 2)):
            rates = random_rates(rng, ordered=ordered, by_level=by_level)
            times = {n: 1.0 + 0.05 * n * float(rng.random()) for n in (1, 2, 3, 5, 8, 13)}
            bounds = {"max_levels": levels, "max_branch": branch}
            pairs = list(every_pair(rates, times, draft_time, bounds))
            fastest = min(pairs)[0]
            size, deep = min(pair[1:] for pair in pairs if pair[0] <= fastest * (1 + 1e-12))
            plan = choose_tree(rates, times, draft_time, **bounds)
            assert (plan.size, plan.levels) == (size, deep)
            assert plan.time_per_token == pytest.approx(fastest, rel=1e-12)
            assert plan.speedup == pytest.approx(times[1] / fastest, rel=1e-12)
            assert plan.expected_tokens == expected_tokens(plan.parents, rates)
            assert (len(plan.parents), levels_of(plan.parents)) == (size, deep)
            assert branch is None or branch_of(plan.parents) <= branch


def test_plain_decoding_is_chosen_where_drafting_does_not_pay() -> None:
    plan = choose_tree(SHIPPED, DEMO_TIMES, 100.0)
    assert plan == sequoia.Plan([-1], 1, 1, 1.0, 10.0, 1.0)
    assert choose_tree([], {1: 2, 8: 2}, 0.0).size == 1
    assert choose_tree(SHIPPED, {1: 3.0}, 0.1).time_per_token == 3.0


def test_choice_leaves_out_sizes_that_do_not_fit() -> None:
    times = dict.fromkeys((1, 2, 3, 64), 1.0)
    assert choose_tree([0.5, 0.4], times, 0.0, max_levels=2, max_branch=2).size == 3
    assert choose_tree([0.5, 0.4], times, 0.0, max_levels=1).size == 1
    assert choose_tree([0.4, 0.5], times, 0.0, max_branch=2).size == 64


def test_choice_is_the_same_in_any_unit() -> None:
    in_ms = choose_tree(APPENDIX_E, DEMO_TIMES, 0.3)
    in_s = choose_tree(APPENDIX_E, {n: t / 1000 for n, t in DEMO_TIMES.items()}, 0.0003)
    assert in_ms.parents == in_s.parents
    assert in_ms.speedup == pytest.approx(in_s.speedup, rel=1e-12)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "parents", [[], [0], [-1, -1], [-1, 1], [-1, 0, 2], [-1, 0, -2], [0, 0], [-1, 0, 3, 0]]
)
def test_lists_that_are_no_tree_are_refused(parents: list[int]) -> None:
    with pytest.raises(ArgumentError, match="parent"):
        expected_tokens(parents, [0.5])


@pytest.mark.parametrize(
    "rates", [[-0.1], [1.1], [math.nan], [0.5, math.inf], [[0.5], [2.0]], [[0.5], 0.5], 0.5, "ab"]
)
def test_rates_outside_the_unit_interval_are_refused(rates: Rates) -> None:
    with pytest.raises(ArgumentError, match="acceptance"):
        optimal_tree(rates, 4)
    with pytest.raises(ArgumentError, match="acceptance"):
        expected_tokens([-1], rates)


def test_bounds_without_room_name_the_maximum() -> None:
    assert len(optimal_tree(SHIPPED, 13, max_levels=3, max_branch=3)) == 13
    with pytest.raises(ArgumentError, match="at most 13 nodes"):
        optimal_tree(SHIPPED, 14, max_levels=3, max_branch=3)
    with pytest.raises(ArgumentError, match="at most 1 nodes"):
        optimal_tree(SHIPPED, 2, max_levels=1)


@pytest.mark.parametrize(
    "wrong", [{"size": 0}, {"size": 3, "max_levels": 0}, {"size": 3, "max_branch": -1}]
)
def test_counts_below_one_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ArgumentError, match="must be at least 1"):
        optimal_tree([0.5], **wrong)


@pytest.mark.parametrize(
    ("times", "draft_time"),
    [
        ({}, 0.1),
        ({2: 1.0}, 0.1),
        ({1: 0.0}, 0.1),
        ({1: 1.0, 2: math.inf}, 0.1),
        ({1: 1.0, 2: math.nan}, 0.1),
        ({1: 1.0, 0: 1.0}, 0.1),
        ({1: 1.0}, -0.1),
        ({1: 1.0}, math.nan),
    ],
)
def test_impossible_times_are_refused(times: dict[int, float], draft_time: float) -> None:
    with pytest.raises(ArgumentError):
        choose_tree([0.5], times, draft_time)
