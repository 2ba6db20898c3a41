"""Draws without replacement."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redwood.algorithms import sequoia
from redwood.algorithms.sequoia import (
    draw_without_replacement,
    optimal_tree,
)
from redwood.errors import ArgumentError
from sequoia_kit import (
    JUST_BELOW_ONE,
)

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
