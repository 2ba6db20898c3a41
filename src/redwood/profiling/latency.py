"""The latency model: the time of one forward, fitted to measured points. No clock inside.

The time of a forward of rows r with n_r new nodes behind L_r committed tokens is modelled as

    base(sum of n_r)  +  sum over rows of (a n_r + b) L_r  +  c (rows - 1)

`base` is linear between measured numbers of nodes, so that the steps of the hardware show in it.
The second term is attention, which reads the keys and values of a row, once per row and once per
node; the third is the overhead of a further row.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from redwood.errors import ArgumentError

_LEAST_MS = 1e-6  # times are divisors: never 0


@dataclass(frozen=True)
class LatencyPoint:
    """Measurements of one kind of forward.

    Args:
        rows: rows in the forward, at least 1.
        nodes: new nodes of each row, at least 1.
        context: committed tokens of each row.
        ms: median milliseconds.
        low, high: quartiles.

    Raises:
        ArgumentError: counts out of range, times that are not positive and finite.
    """

    rows: int
    nodes: int
    context: int
    ms: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if min(self.rows, self.nodes) < 1 or self.context < 0:
            raise ArgumentError(f"{self} must have rows and nodes of at least 1, a context from 0")
        if not all(0.0 < ms < math.inf for ms in (self.ms, self.low, self.high)):
            raise ArgumentError(f"{self} must have times that are positive and finite")


@dataclass(frozen=True)
class LatencyModel:
    """Milliseconds of one forward of a backend, fitted to measured points.

    The base is fitted to the points of one row at the context that has most of them; further
    contexts and rows give the other terms, each 0 without measurements.

    Guarantee: non-decreasing in nodes, in the length of rows and in their number.

    Raises:
        ArgumentError: no point for one row with one node, or the same forward twice.
    """

    points: tuple[LatencyPoint, ...]

    def __post_init__(self) -> None:
        if not any(point.rows == point.nodes == 1 for point in self.points):
            raise ArgumentError("a time curve needs the time of one row with one node")
        kinds = Counter((point.rows, point.nodes, point.context) for point in self.points)
        twice = [kind for kind, count in kinds.items() if count > 1]
        if twice:
            raise ArgumentError(f"the forward of (rows, nodes, context) {twice[0]} stands twice")

    def ms(self, nodes: Sequence[int], lengths: Sequence[int]) -> float:
        """Returns the milliseconds of one forward. A few microseconds for a few rows.

        Past the largest measured number of nodes the base is extrapolated by the slope of its last
        half.

        Args:
            nodes: [R] new nodes of each row, each at least 1.
            lengths: [R] committed tokens of each row.
        """
        return list(self.running(nodes, lengths))[-1]

    def running(self, nodes: Sequence[int], lengths: Sequence[int]) -> Iterator[float]:
        """Yields the milliseconds of one forward of the first row, the first two, and so on.

        Args: see `ms`.
        """
        fit = self._fit
        total, attention, last = 0, 0.0, len(fit.base) - 1
        for others, (count, length) in enumerate(zip(nodes, lengths, strict=True)):
            total += count
            attention += (fit.per_node * count + fit.per_token) * length
            base = fit.base[total] if total <= last else fit.base[last] + fit.slope * (total - last)
            yield base + attention + fit.per_row * others

    def times(self, length: int, most: int) -> NDArray[np.float64]:
        """Returns the milliseconds for one row behind `length` tokens.

        Returns: float64 [most + 1] by number of nodes; [0] is 0.

        Raises:
            ArgumentError: most below 1.
        """
        if most < 1:
            raise ArgumentError(f"most {most} must be at least 1")
        fit, nodes = self._fit, np.arange(most + 1)
        known = np.array(fit.base[: most + 1])
        further = fit.base[-1] + fit.slope * np.arange(1, most + 2 - len(fit.base))
        made: NDArray[np.float64] = np.concatenate([known, further])
        made += (fit.per_node * nodes + fit.per_token) * length
        made[0] = 0.0
        return made

    def growth(self, lengths: Sequence[int], most: int) -> NDArray[np.float64]:
        """Returns the milliseconds of one forward of all rows as drafted nodes are added.

        A node costs the same in every row: as in a row of mean length.

        Args:
            lengths: [R] committed tokens of each row, at least one row.
            most: nodes to add.

        Returns: float64 [most + 1] by nodes added to the R roots.
        """
        rows, whole, fit = len(lengths), sum(lengths), self._fit
        made: NDArray[np.float64] = self.times(whole // rows, rows + most)[rows:]
        return made + (rows - 1) * (fit.per_token * whole / rows + fit.per_row)

    @cached_property
    def _fit(self) -> _Fit:
        return _fitted(self.points)


class _Fit(NamedTuple):
    """The terms of the model in milliseconds: `base` by nodes, its slope past the end, the rest."""

    base: list[float]
    slope: float
    per_node: float
    per_token: float
    per_row: float


def _fitted(points: Sequence[LatencyPoint]) -> _Fit:
    single = [point for point in points if point.rows == 1]
    sizes = Counter(point.context for point in single if _has_plain(single, point.context))
    context = min(sizes, key=lambda each: (-sizes[each], each))
    chosen = sorted((p.nodes, p.ms) for p in single if p.context == context)
    counts = np.array([count for count, _ in chosen])
    times = np.array([ms for _, ms in chosen])
    per_node, per_token = _attention(
        [
            (p.nodes, p.context - context, p.ms - float(np.interp(p.nodes, counts, times)), p.ms)
            for p in single
            if p.context != context
        ]
    )
    rest = np.maximum(times - (per_node * counts + per_token) * context, _LEAST_MS)
    steps = _isotonic(rest.tolist())
    base = [0.0, *np.interp(np.arange(1, counts[-1] + 1), counts, steps).tolist()]
    curve = _Fit(base, _last_slope(base, counts.tolist()), per_node, per_token, 0.0)
    return curve._replace(per_row=_per_row(curve, [p for p in points if p.rows > 1]))


def _has_plain(points: Sequence[LatencyPoint], context: int) -> bool:
    return any(point.nodes == 1 and point.context == context for point in points)


def _attention(more: Sequence[tuple[int, int, float, float]]) -> tuple[float, float]:
    """Milliseconds per (node, token) and per token, neither negative, by least squares.

    Args:
        more: nodes, further tokens, further milliseconds, milliseconds in all; errors are relative
            to the last.
    """
    if not more:
        return 0.0, 0.0
    nodes, tokens, further, whole = (np.array(column, float) for column in zip(*more, strict=True))
    terms = np.stack([nodes * tokens, tokens], 1) / whole[:, None]
    aim = further / whole
    both = np.linalg.lstsq(terms, aim, rcond=None)[0]
    alone = np.maximum(terms.T @ aim / np.maximum((terms**2).sum(0), _LEAST_MS**2), 0.0)
    tries = [np.array([alone[0], 0.0]), np.array([0.0, alone[1]])]
    if both.min() >= 0.0:
        tries = [both]
    best = min(tries, key=lambda made: float(((terms @ made - aim) ** 2).sum()))
    return float(best[0]), float(best[1])


def _isotonic(values: Sequence[float]) -> list[float]:
    """Isotonic (non-decreasing) least-squares fit, by pool-adjacent-violators."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        mean, size = value, 1
        while blocks and blocks[-1][0] > mean:
            earlier, count = blocks.pop()
            mean, size = (earlier * count + mean * size) / (count + size), count + size
        blocks.append((mean, size))
    return [mean for mean, size in blocks for _ in range(size)]


def _last_slope(base: Sequence[float], counts: Sequence[int]) -> float:
    """Milliseconds per node over the last half; in proportion with a single number of nodes."""
    last = counts[-1]
    half = max((count for count in counts if count <= last / 2), default=0)
    return (base[last] - base[half]) / (last - half)


def _per_row(curve: _Fit, points: Sequence[LatencyPoint]) -> float:
    """Milliseconds of a further row: the median residual of the other terms, at least 0."""
    residuals = []
    for p in points:
        total, last = p.rows * p.nodes, len(curve.base) - 1
        base = curve.base[min(total, last)] + curve.slope * max(0, total - last)
        attention = p.rows * p.context * (curve.per_node * p.nodes + curve.per_token)
        residuals.append((p.ms - base - attention) / (p.rows - 1))
    return max(0.0, median(residuals)) if residuals else 0.0
