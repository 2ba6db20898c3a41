"""Sequoia's trees: the optimum against brute force and published values."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redwood.algorithms.sequoia import (
    best_first_tree,
    dynamic_program_tree,
    expected_tokens,
    optimal_tree,
)
from redwood.errors import ArgumentError
from sequoia_kit import (
    APPENDIX_E,
    SHIPPED,
    Rates,
    best_value,
    check_tree,
    depths_of,
    levels_of,
    random_rates,
)


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
