"""Sequoia's trees against every tree, its choice of a size, and the exact law of its draws."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redwood.algorithms import sequoia
from redwood.algorithms.sequoia import (
    best_first_tree,
    choose_tree,
    draw_without_replacement,
    dynamic_program_tree,
    expected_tokens,
    optimal_tree,
)
from redwood.errors import ArgumentError

Rates = list[float] | list[list[float]]

# Published acceptance vectors: counts of 667 trials in float32, and arXiv 2402.12374, App. E.
COUNTS = [423, 72, 38, 15, 13, 10, 3, 2, 8, 3, 5, 3, 4, 2, 1, 2, 1, 2, 0, 2, 2, 2, 0, 1, 0, 1]
SHIPPED = [float(np.float32(count / 667)) for count in [*COUNTS, 0, 0, 0, 1, 1, 1]]
APPENDIX_E = [
    *(0.7732, 0.1039, 0.0402, 0.0206, 0.0128, 0.0081, 0.0064, 0.0043, 0.0035, 0.0026, 0.0025),
    *(0.0021, 0.0016, 0.0014, 0.0010, 0.0010, 0.0010, 0.0007, 0.0007, 0.0006, 0.0007, 0.0006),
    *(0.0004, 0.0004, 0.0005, 0.0006, 0.0004, 0.0003, 0.0002, 0.0004, 0.0001),
]
DEMO_TIMES = {1: 10.0, 2: 10.0, 4: 10.0, 8: 12.0, 16: 14.0, 32: 18.0}
JUST_BELOW_ONE = math.nextafter(1.0, 0.0)


def is_matrix(rates: Rates) -> bool:
    return bool(rates) and isinstance(rates[0], list)


def depths_of(parents: Sequence[int]) -> list[int]:
    depths = [0]
    for parent in parents[1:]:
        depths.append(depths[parent] + 1)
    return depths


def levels_of(parents: Sequence[int]) -> int:
    return max(depths_of(parents)) + 1


def branch_of(parents: Sequence[int]) -> int:
    return max((parents.count(node) for node in range(len(parents))), default=0)


# ---------------------------------------------------------------- every ordered tree

Tree = tuple["Tree", ...]  # the subtrees of the children, by rank


@cache
def forests(size: int) -> list[Tree]:
    """All ordered forests of `size` nodes; as children of a root, all trees of size + 1 nodes."""
    if size == 0:
        return [()]
    return [
        (first, *rest)
        for share in range(1, size + 1)
        for first in forests(share - 1)
        for rest in forests(size - share)
    ]


def height(tree: Tree) -> int:
    return 1 + max(map(height, tree), default=0)


def width(tree: Tree) -> int:
    return max(len(tree), *map(width, tree)) if tree else 0


def value(tree: Tree, row: Callable[[int], Sequence[float]], depth: int = 0) -> float:
    rates = row(depth)
    return 1.0 + sum(
        rates[rank] * value(child, row, depth + 1)
        for rank, child in enumerate(tree)
        if rank < len(rates)
    )


def best_value(rates: Rates, size: int, levels: int | None, branch: int | None) -> float | None:
    """The most expected tokens over every tree within the bounds; None if there is none."""

    def row(depth: int) -> Sequence[float]:
        if not is_matrix(rates):
            return rates  # type: ignore[return-value]
        return rates[depth] if depth < len(rates) else []  # type: ignore[return-value]

    fitting = [
        tree
        for tree in forests(size - 1)
        if (levels is None or height(tree) <= levels) and (branch is None or width(tree) <= branch)
    ]
    return max((value(tree, row) for tree in fitting), default=None)


def check_tree(
    parents: list[int], rates: Rates, size: int, levels: int | None, branch: int | None
) -> None:
    assert len(parents) == size
    assert levels is None or levels_of(parents) <= levels
    assert branch is None or branch_of(parents) <= branch
    expected = best_value(rates, size, levels, branch)
    assert expected is not None
    assert expected_tokens(parents, rates) == pytest.approx(expected, rel=1e-13)


def random_rates(rng: np.random.Generator, *, ordered: bool, by_level: bool) -> Rates:
    def vector() -> list[float]:
        length = int(rng.integers(0, 7))
        row = rng.random(length) * rng.choice([0.4, 1.0])
        row[rng.random(length) < 0.3] = 0.0
        return [float(rate) for rate in (sorted(row, reverse=True) if ordered else row)]

    return [vector() for _ in range(int(rng.integers(1, 6)))] if by_level else vector()


@pytest.mark.parametrize("by_level", [False, True])
@pytest.mark.parametrize("ordered", [False, True])
def test_optimal_tree_equals_the_best_of_all_trees(ordered: bool, by_level: bool) -> None:
    rng = np.random.default_rng(2 * ordered + by_level)
    for _ in range(25):
        rates = random_rates(rng, ordered=ordered, by_level=by_level)
        size = int(rng.integers(1, 9))
        for levels in (None, 1, 2, 3, 4, 8):
            for branch in (None, 1, 2, 3):
                if best_value(rates, size, levels, branch) is None:
                    with pytest.raises(ArgumentError, match="does not fit"):
                        optimal_tree(rates, size, max_levels=levels, max_branch=branch)
                    continue
                for build in (optimal_tree, dynamic_program_tree):
                    parents = build(rates, size, max_levels=levels, max_branch=branch)
                    check_tree(parents, rates, size, levels, branch)
                if ordered:
                    parents = best_first_tree(rates, size, max_levels=levels, max_branch=branch)
                    check_tree(parents, rates, size, levels, branch)


@pytest.mark.parametrize("rates", [[], [0.0], [0.0, 0.5], [1.0], [[]], [[0.0], [1.0]], [[1.0]]])
def test_degenerate_rates_still_give_the_best_tree_of_full_size(rates: Rates) -> None:
    for size in range(1, 7):
        for levels, branch in ((None, None), (None, 1), (3, None), (3, 2)):
            check_tree(
                optimal_tree(rates, size, max_levels=levels, max_branch=branch),
                *(rates, size, levels, branch),
            )


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(0, 1, allow_subnormal=False), max_size=12),
    st.integers(1, 60),
    st.none() | st.integers(6, 10),
    st.none() | st.integers(2, 6),
)
def test_best_first_search_equals_the_program(
    entries: list[float], size: int, levels: int | None, branch: int | None
) -> None:
    rates = sorted(entries, reverse=True)
    found, solved = (
        build(rates, size, max_levels=levels, max_branch=branch)
        for build in (best_first_tree, dynamic_program_tree)
    )
    assert expected_tokens(found, rates) == pytest.approx(expected_tokens(solved, rates), rel=1e-12)


def test_best_first_search_equals_the_program_with_rates_by_level() -> None:
    rng = np.random.default_rng(5)
    rates = [[float(rate) for rate in sorted(rng.random(6) / 2, reverse=True)] for _ in range(7)]
    for size, levels, branch in ((50, None, None), (80, 5, 4), (40, 4, None)):
        found, solved = (
            expected_tokens(build(rates, size, max_levels=levels, max_branch=branch), rates)
            for build in (best_first_tree, dynamic_program_tree)
        )
        assert found == pytest.approx(solved, rel=1e-13)


def test_rates_by_level_that_are_all_alike_equal_a_vector() -> None:
    for levels in (2, 4, 6):
        rows = [SHIPPED] * (levels - 1)
        assert expected_tokens(optimal_tree(rows, 40), rows) == pytest.approx(
            expected_tokens(optimal_tree(SHIPPED, 40, max_levels=levels), SHIPPED), rel=1e-13
        )


def test_a_larger_bound_never_lowers_the_value() -> None:
    values = [
        expected_tokens(optimal_tree(SHIPPED, 30, max_levels=levels, max_branch=branch), SHIPPED)
        for levels, branch in ((3, 6), (4, 6), (4, 9), (8, 9), (30, 9), (30, 29), (None, None))
    ]
    assert values == sorted(values)


# ---------------------------------------------------------------- shapes and published values


@pytest.mark.parametrize("bounds", [(None, None), (6, None), (None, 3), (6, 3)])
def test_prefix_of_a_best_first_tree_is_optimal(bounds: tuple[int | None, int | None]) -> None:
    levels, branch = bounds
    rates = [0.5, 0.2, 0.1, 0.1, 0.05]
    parents = optimal_tree(rates, 60, max_levels=levels, max_branch=branch)
    for size in range(1, 61):
        assert parents[:size] == optimal_tree(rates, size, max_levels=levels, max_branch=branch)
        solved = dynamic_program_tree(rates, size, max_levels=levels, max_branch=branch)
        assert expected_tokens(parents[:size], rates) == pytest.approx(
            expected_tokens(solved, rates), rel=1e-13
        )


def test_max_branch_can_make_rates_sorted() -> None:
    rates = [0.5, 0.2, 0.3]
    parents = optimal_tree(rates, 20, max_branch=2)
    assert parents == best_first_tree(rates, 20, max_branch=2)
    with pytest.raises(ArgumentError, match="use optimal_tree"):
        best_first_tree(rates, 20)


@pytest.mark.parametrize("build", [best_first_tree, dynamic_program_tree])
def test_one_rank_gives_a_chain(build: Callable[[list[float], int], list[int]]) -> None:
    parents = build([0.6], 12)
    assert parents == list(range(-1, 11))
    assert expected_tokens(parents, [0.6]) == pytest.approx((1 - 0.6**12) / 0.4, rel=1e-14)


@pytest.mark.parametrize("build", [best_first_tree, dynamic_program_tree])
def test_two_equal_ranks_give_a_complete_binary_tree(
    build: Callable[[list[float], int], list[int]],
) -> None:
    parents = build([0.3, 0.3], 31)
    assert sorted(depths_of(parents)) == [depth for depth in range(5) for _ in range(2**depth)]
    expected = sum(0.6**depth for depth in range(5))
    assert expected_tokens(parents, [0.3, 0.3]) == pytest.approx(expected, rel=1e-14)


def test_expected_tokens_follows_ranks_and_levels() -> None:
    parents = [-1, 0, 0, 1, 2, 2, 3]
    vector = [0.5, 0.25]
    assert expected_tokens(parents, vector) == pytest.approx(
        1 + 0.5 + 0.25 + 0.5**2 + 0.25 * 0.5 + 0.25**2 + 0.5**3, rel=1e-15
    )
    matrix = np.array([[0.5, 0.25], [0.75, 0.125]])
    assert expected_tokens(parents, matrix) == pytest.approx(
        1 + 0.5 + 0.25 + 0.5 * 0.75 + 0.25 * 0.75 + 0.25 * 0.125, rel=1e-15
    )
    assert expected_tokens([-1], []) == 1.0


def test_padding_goes_where_the_bounds_allow() -> None:
    parents = optimal_tree([0.0, 0.9], 7, max_levels=3, max_branch=2)
    assert sorted(depths_of(parents)) == [0, 1, 1, 2, 2, 2, 2]
    assert levels_of(optimal_tree([], 50)) == 2
    assert optimal_tree([0.1, 0.9], 5, max_branch=1) == [-1, 0, 1, 2, 3]


def test_shipped_vector_gives_the_chain_of_four() -> None:
    for levels in (4, 10, None):
        parents = optimal_tree(SHIPPED, 4, max_levels=levels)
        assert parents == [-1, 0, 1, 2]
        assert expected_tokens(parents, SHIPPED) == pytest.approx(2.291431676, abs=1e-9)


@pytest.mark.parametrize(
    ("size", "levels", "tokens"), [(8, 8, 3.84593), (16, 11, 4.53762), (32, 14, 5.21989)]
)
def test_appendix_e_vector_without_bounds(size: int, levels: int, tokens: float) -> None:
    parents = optimal_tree(APPENDIX_E, size)
    assert levels_of(parents) == levels
    assert expected_tokens(parents, APPENDIX_E) == pytest.approx(tokens, abs=5e-6)


def test_appendix_e_vector_at_the_size_used_for_offloading() -> None:
    parents = optimal_tree(APPENDIX_E, 768, max_levels=18)
    assert (len(parents), levels_of(parents)) == (768, 18)
    assert expected_tokens(parents, APPENDIX_E) == pytest.approx(8.33740, abs=5e-6)


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


# ---------------------------------------------------------------- draws


def law(probs: np.ndarray, earlier: list[float], **kwargs: object) -> dict[int, float]:
    """Exact law of the draw after the `earlier` uniforms, by bisecting its thresholds.

    Asserts on the way that the tokens come in one interval each.
    """

    def last(uniform: float) -> int:
        return draw_without_replacement(probs, [*earlier, uniform], **kwargs)[-1]  # type: ignore[arg-type]

    lengths: dict[int, float] = {}
    start = 0.0
    while True:
        token = last(start)
        assert token not in lengths
        if last(JUST_BELOW_ONE) == token:
            lengths[token] = 1.0 - start
            return lengths
        low, high = start, JUST_BELOW_ONE
        while math.nextafter(low, 1.0) < high:
            middle = (low + high) / 2
            low, high = (middle, high) if last(middle) == token else (low, middle)
        lengths[token] = high - start
        start = high


def check_law(probs: np.ndarray, earlier: list[float]) -> None:
    """Compare with the renormalised row, computed by exactly rounded sums."""
    drawn = draw_without_replacement(probs, earlier)
    rest = {i: float(p) for i, p in enumerate(probs) if i not in drawn and p > 0}
    scale = max(rest.values())
    total = math.fsum(p / scale for p in rest.values())
    lengths = law(probs, earlier)
    assert list(lengths) == sorted(lengths)
    assert lengths.keys() <= rest.keys()
    for token, p in rest.items():
        assert lengths.get(token, 0.0) == pytest.approx(p / scale / total, abs=1e-13)


ROWS = {
    "plain": [0.1, 0.0, 0.4, 0.2, 0.0, 0.3, 0.0],
    "not normalised": [3.0, 1.0, 7.0, 0.0, 2.0],
    "certain but for traces": [2e-15, 1 - 1e-12, 1e-15, 0.0, 5e-16, 3e-15],
    "geometric": [10.0**-i for i in range(0, 300, 40)],
    "geometric rising": [10.0**-i for i in (300, 200, 20, 3, 0)],
    "subnormal": [5e-324, 0.0, 1e-323, 1.5e-323],
    "huge": [1e308, 1.5e308, 0.0, 1e308],
}


@pytest.mark.parametrize("name", ROWS)
def test_law_of_each_draw_is_the_renormalised_row(name: str) -> None:
    probs = np.array(ROWS[name])
    rng = np.random.default_rng(3)
    for num_earlier in range(np.count_nonzero(probs)):
        for _ in range(3):
            check_law(probs, rng.random(num_earlier).tolist())
        check_law(probs, [0.0] * num_earlier)
        check_law(probs, [JUST_BELOW_ONE] * num_earlier)


def test_law_holds_over_several_blocks_of_the_running_sum() -> None:
    rng = np.random.default_rng(4)
    probs = np.zeros(700)
    support = [0, 1, 254, 255, 256, 257, 300, 511, 512, 513, 699]
    probs[support] = rng.dirichlet(np.ones(len(support)))
    for num_earlier in (0, 1, 4, 8):
        check_law(probs, rng.random(num_earlier).tolist())


def test_first_draw_inverts_the_distribution_of_a_large_row() -> None:
    rng = np.random.default_rng(6)
    probs = rng.dirichlet(np.full(150_000, 0.05))
    ends = np.array([math.fsum(probs[: i + 1]) for i in (5_000, 70_000, 149_000)])
    for end, index in zip(ends / math.fsum(probs), (5_000, 70_000, 149_000), strict=True):
        assert draw_without_replacement(probs, [end - 1e-13])[0] <= index
        assert draw_without_replacement(probs, [end + 1e-13])[0] > index


def test_laws_are_coherent_over_all_draws() -> None:
    """The chance of each ordered pair, integrated over a grid of the first uniform's intervals."""
    probs = np.array([0.5, 0.3, 0.2])
    for first, share in law(probs, []).items():
        start = float(probs[:first].sum())
        for second, length in law(probs, [start + share / 2]).items():
            expected = probs[second] / (1 - probs[first])
            assert share * length == pytest.approx(probs[first] * expected, abs=1e-13)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 1e-320, 1e-200, 1e-17, 1e-9, 0.1, 1 / 3, 0.9]), min_size=1),
    st.data(),
)
def test_draws_are_distinct_and_use_up_the_support_first(
    row: list[float], data: st.DataObject
) -> None:
    extreme = st.sampled_from([0.0, 5e-324, 0.5, JUST_BELOW_ONE])
    chance = extreme | st.floats(0, 1, exclude_max=True)
    uniforms = data.draw(st.lists(chance, min_size=len(row), max_size=len(row)))
    tokens = draw_without_replacement(np.array(row), uniforms)
    assert sorted(tokens) == list(range(len(row)))
    support = sum(p > 0 for p in row)
    assert all(row[token] > 0 for token in tokens[:support])


def test_extreme_uniforms_take_the_first_and_the_last_token_left() -> None:
    probs = np.array([0.0, 0.1, 0.7, 0.0, 0.1, 0.1, 0.0])
    assert draw_without_replacement(probs, [0.0] * 4) == [1, 2, 4, 5]
    assert draw_without_replacement(probs, [JUST_BELOW_ONE] * 4) == [5, 4, 2, 1]


def test_earlier_draws_do_not_depend_on_later_uniforms() -> None:
    rng = np.random.default_rng(8)
    probs = rng.dirichlet(np.full(50, 0.1))
    uniforms = rng.random(30)
    tokens = draw_without_replacement(probs, uniforms)
    assert all(draw_without_replacement(probs, uniforms[:k]) == tokens[:k] for k in range(31))


def test_row_is_left_as_it_was() -> None:
    probs = np.array([0.9, 0.05, 0.05, 0.0])
    draw_without_replacement(probs, [0.5] * 4)
    assert probs.tolist() == [0.9, 0.05, 0.05, 0.0]


def test_fallback_is_uniform_over_the_tokens_not_drawn() -> None:
    probs = np.array([0.0, 0.6, 0.0, 0.4, 0.0, 0.0])
    lengths = law(probs, [0.1, 0.1])
    assert list(lengths) == [0, 2, 4, 5]
    assert list(lengths.values()) == pytest.approx([0.25] * 4, abs=1e-15)
    assert list(law(probs, [0.1, 0.1, 0.3])) == [0, 4, 5]
    assert list(law(probs, [0.1, 0.1, 0.3, 0.0, 0.9])) == [4]
    assert list(law(np.zeros(3), [0.5])) == [0, 2]


def test_fallback_knows_the_whole_vocabulary() -> None:
    assert list(law(np.array([1.0]), [0.5], vocab_size=4)) == [1, 2, 3]
    ids = np.array([7, 2])
    assert law(np.array([0.25, 0.75]), [], ids=ids, vocab_size=9) == {7: 0.25, 2: 0.75}
    lengths = law(np.array([0.25, 0.75]), [0.9, 0.9], ids=ids, vocab_size=9)
    assert list(lengths) == [0, 1, 3, 4, 5, 6, 8]
    assert list(lengths.values()) == pytest.approx([1 / 7] * 7, abs=1e-15)
    everything = draw_without_replacement(
        np.array([0.0, 1.0, 0.0]), [0.5] * 9, ids=np.array([4, 1, 8]), vocab_size=9
    )
    assert everything[0] == 1
    assert sorted(everything) == list(range(9))


def test_no_uniforms_give_no_tokens() -> None:
    assert draw_without_replacement(np.array([0.5, 0.5]), []) == []


@pytest.mark.parametrize(
    ("probs", "uniforms"),
    [
        ([0.5, 0.5], [0.1] * 3),
        ([0.5, 0.5], [1.0]),
        ([0.5, 0.5], [-0.1]),
        ([0.5, 0.5], [math.nan]),
        ([0.5, 0.5], [[0.5]]),
        ([0.5, -0.5], [0.1]),
        ([0.5, math.nan], [0.1]),
        ([0.5, math.inf], [0.1]),
        ([[0.5, 0.5]], [0.1]),
        ([], []),
    ],
)
def test_wrong_rows_and_uniforms_are_refused(probs: list[float], uniforms: list[float]) -> None:
    with pytest.raises(ArgumentError):
        draw_without_replacement(np.array(probs, dtype=np.float64), uniforms)


def test_wrong_ids_and_dtypes_are_refused() -> None:
    probs = np.array([0.5, 0.5])
    for ids in ([1, 1], [0], [-1, 0], [0, 5]):
        with pytest.raises(ArgumentError, match="ids must be"):
            draw_without_replacement(probs, [0.1], ids=np.array(ids), vocab_size=5)
    with pytest.raises(ArgumentError, match="2 probabilities for 1 tokens"):
        draw_without_replacement(probs, [0.1], vocab_size=1)
    with pytest.raises(ArgumentError, match="float64"):
        draw_without_replacement(probs.astype(np.float32), [0.1])


@pytest.mark.parametrize("size", ["4", None, 2.5, True, [4]])
def test_sizes_that_are_no_whole_numbers_are_refused(size: object) -> None:
    with pytest.raises(ArgumentError, match="size"):
        optimal_tree([0.5, 0.3], size)  # type: ignore[arg-type]


@pytest.mark.parametrize("times", [None, {1: "a"}, {1: None}, {1: 1.0, 2.5: 1.2}])
def test_times_that_are_no_numbers_are_refused(times: object) -> None:
    with pytest.raises(ArgumentError, match="target_times"):
        sequoia.choose_tree([0.5], times, 0.1)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="draft_time"):
        sequoia.choose_tree([0.5], {1: 1.0}, None)  # type: ignore[arg-type]
