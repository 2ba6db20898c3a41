"""What tests of the planner share."""

from __future__ import annotations

from redwood.profiling.latency import LatencyModel, LatencyPoint


def curve(slope: float, base: float = 10.0) -> LatencyModel:
    """A pass of n nodes takes base + slope (n - 1)."""
    sizes = (1, 2, 4, 8, 16)
    times = [base + slope * (n - 1) for n in sizes]
    points = (LatencyPoint(1, n, 0, ms, ms, ms) for n, ms in zip(sizes, times, strict=True))
    return LatencyModel(tuple(points))
