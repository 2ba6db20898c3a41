"""The curve of forward times: through its points, rising, and right for rows and contexts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redwood.errors import ArgumentError
from redwood.profiling.latency import LatencyModel, LatencyPoint

COUNTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48, 64)


def point(nodes: int, ms: float, *, rows: int = 1, context: int = 128) -> LatencyPoint:
    return LatencyPoint(rows, nodes, context, ms, 0.9 * ms, 1.1 * ms)


def curve(ms: list[float], counts: tuple[int, ...] = COUNTS) -> LatencyModel:
    return LatencyModel(tuple(point(n, t) for n, t in zip(counts, ms, strict=False)))


def made_up(rows: int, nodes: int, context: int) -> float:
    """Milliseconds of a machine with a step between 4 and 5 nodes."""
    total = rows * nodes
    attention = rows * (1e-4 * nodes + 2e-3) * context
    return 20.0 + 0.3 * total + (9.0 if total > 4 else 0.0) + attention + 0.8 * (rows - 1)


@pytest.fixture
def machine() -> LatencyModel:
    kinds = [(1, n, 128) for n in COUNTS]
    kinds += [(1, n, context) for n in (1, 4, 16, 64) for context in (1024, 4096)]
    kinds += [(rows, n, 128) for rows in (2, 4) for n in (1, 4, 16)]
    return LatencyModel(
        tuple(point(n, made_up(r, n, c), rows=r, context=c) for r, n, c in reversed(kinds))
    )


@pytest.mark.parametrize(
    ("rows", "nodes", "context"),
    [(1, 1, 128), (1, 4, 0), (1, 5, 500), (1, 64, 4096), (1, 100, 128), (2, 8, 700), (4, 3, 128)],
)
def test_a_machine_of_this_form_is_found_again(
    machine: LatencyModel, rows: int, nodes: int, context: int
) -> None:
    wanted = made_up(rows, nodes, context)
    assert machine.ms([nodes] * rows, [context] * rows) == pytest.approx(wanted, rel=1e-3)


def test_rows_of_different_size_add_up(machine: LatencyModel) -> None:
    wanted = 20.0 + 0.3 * 9 + 9.0 + 0.8
    wanted += (1e-4 * 7 + 2e-3) * 300 + (1e-4 * 2 + 2e-3) * 900
    assert machine.ms([7, 2], [300, 900]) == pytest.approx(wanted, rel=1e-3)


def test_the_curve_goes_through_its_points_and_straight_between_them() -> None:
    made = curve([10.0, 11.0, 12.0, 30.0, 31.0, 32.0, 40.0])
    assert made.ms([1], [128]) == 10.0
    assert made.ms([4], [128]) == 30.0
    assert made.ms([3], [0]) == 12.0  # one context tells nothing of others
    assert made.ms([7], [128]) == pytest.approx(36.0)


def test_past_the_end_the_last_half_goes_on() -> None:
    made = curve([10.0, 10.0, 10.0, 16.0], (1, 2, 4, 8))
    assert made.ms([12], [128]) == pytest.approx(22.0)
    assert curve([10.0]).ms([3], [128]) == pytest.approx(30.0)  # in proportion: nothing else known


def test_times_that_fall_share_their_mean() -> None:
    made = curve([10.0, 14.0, 12.0, 20.0])
    assert [made.ms([n], [128]) for n in (1, 2, 3, 4)] == pytest.approx([10.0, 13.0, 13.0, 20.0])


points = st.lists(st.floats(0.1, 1000.0), min_size=1, max_size=len(COUNTS))


@settings(max_examples=60, deadline=None)
@given(points, st.lists(st.floats(0.1, 2000.0), max_size=4), st.integers(1, 4))
def test_more_never_takes_less(ms: list[float], longer: list[float], rows: int) -> None:
    further = [point(n, t, context=1024) for n, t in zip((1, 4, 16, 64), longer, strict=False)]
    beside = [point(n, 2 * t, rows=2) for n, t in zip((1, 4), longer, strict=False)]
    made = LatencyModel((*curve(ms).points, *further, *beside))
    for length in (0, 128, 3000):
        times = [made.ms([n] * rows, [length] * rows) for n in range(1, 80)]
        assert times[0] > 0.0
        assert all(b >= a - 1e-9 * b for a, b in zip(times, times[1:], strict=False))
        assert made.ms([2] * rows, [length + 50] * rows) >= times[1] - 1e-9
        assert made.ms([2] * (rows + 1), [length] * (rows + 1)) >= times[1] - 1e-9


@settings(max_examples=30, deadline=None)
@given(points, st.integers(0, 5000), st.integers(1, 100))
def test_times_are_those_of_single_forwards(ms: list[float], length: int, most: int) -> None:
    made = LatencyModel((*curve(ms).points, point(1, ms[0] + 1.0, context=1024)))
    times = made.times(length, most)
    assert times.shape == (most + 1,) and times.dtype == np.float64 and times[0] == 0.0
    wanted = [made.ms([n], [length]) for n in range(1, most + 1)]
    assert times[1:].tolist() == pytest.approx(wanted)


@settings(max_examples=30, deadline=None)
@given(points, st.lists(st.integers(0, 4000), min_size=1, max_size=4), st.integers(0, 70))
def test_growth_is_that_of_rows_of_mean_length(
    ms: list[float], lengths: list[int], most: int
) -> None:
    further = [point(1, ms[0] + 1.0, context=1024), point(2, ms[0] + 5.0, rows=2)]
    made = LatencyModel((*curve(ms).points, *further))
    growth = made.growth(lengths, most)
    assert growth.shape == (most + 1,)
    assert growth[0] == pytest.approx(made.ms([1] * len(lengths), lengths), rel=0.01)
    assert (np.diff(growth) >= -1e-9).all()


@pytest.mark.parametrize(
    "points",
    [
        (),
        (point(2, 5.0),),
        (point(1, 5.0, rows=2),),
        (point(1, 5.0), point(2, 6.0), point(2, 7.0)),
    ],
    ids=["none", "no single node", "no single row", "twice"],
)
def test_points_that_make_no_curve_are_refused(points: tuple[LatencyPoint, ...]) -> None:
    with pytest.raises(ArgumentError):
        LatencyModel(points)


@pytest.mark.parametrize(
    "values",
    [
        (0, 1, 0, 1.0, 1.0, 1.0),
        (1, 0, 0, 1.0, 1.0, 1.0),
        (1, 1, -1, 1.0, 1.0, 1.0),
        (1, 1, 0, 0.0, 1.0, 1.0),
        (1, 1, 0, float("nan"), 1.0, 1.0),
        (1, 1, 0, 1.0, float("inf"), 1.0),
    ],
)
def test_points_that_cannot_be_are_refused(
    values: tuple[int, int, int, float, float, float],
) -> None:
    with pytest.raises(ArgumentError):
        LatencyPoint(*values)


def test_a_table_needs_a_size() -> None:
    with pytest.raises(ArgumentError, match="most 0"):
        curve([1.0]).times(0, 0)
