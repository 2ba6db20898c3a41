"""Tree size by latency: what more nodes and more levels of a step cost, as the machine runs now."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from redwood.profiling.latency import LatencyModel
from redwood.tree import Law, TokenTree

_SPEED_RATE, _SHAPE_RATE = 0.2, 0.08  # learning rates: of the machine's speed, of the curve's shape
_MAX_SHAPE = math.log(1.5)  # bound of the shape's correction, as a logarithm
_POINT, _COUPLED = int(Law.POINT), int(Law.COUPLED)


@dataclass
class DecayedMean:
    """An exponentially decayed mean: each new entry scales the weight of older ones by a factor."""

    total: float = 0.0
    weight: float = 0.0

    def add(self, value: float, fade: float) -> None:
        """Adds an entry, after scaling the earlier ones by `fade`."""
        self.total = self.total * fade + value
        self.weight = self.weight * fade + 1.0

    def value(self, prior: float, belief: float) -> float:
        """Returns the mean, with a prior that counts for `belief` entries."""
        return (belief * prior + self.total) / (belief + self.weight)


class LatencyCorrection:
    """Online correction of a latency model: the machine's current speed, and the curve's shape.

    The speed moves within seconds and concerns all tree sizes alike; the shape is kept per power of
    two of nodes and moves slowly.
    """

    def __init__(self) -> None:
        self._log_speed = 0.0
        self._shape: dict[int, float] = {}
        self._applied: tuple[Any, Any, NDArray[np.float64]] | None = None  # the last answer

    @property
    def speed(self) -> float:
        """Current time of a pass over that of the latency model."""
        return math.exp(self._log_speed)

    def apply(self, times: NDArray[np.float64], first: int) -> NDArray[np.float64]:
        """Returns times [M], of `first` and more nodes, with the shape corrected.

        The shape is rounded to a percent: it seldom moves by that in a step, so the last answer can
        be reused.

        Guarantee: never falls with more nodes.
        """
        if not self._shape:
            return times
        shapes = [(size, round(shape, 2)) for size, shape in self._shape.items()]
        known = first, shapes
        if self._applied is None or self._applied[0] is not times or self._applied[1] != known:
            corrected = times.copy()
            for size, shape in shapes:
                low, high = (1 << size) // 2 - first, (1 << size) - first
                corrected[max(0, low) : max(0, high)] *= math.exp(shape)
            self._applied = times, known, np.maximum.accumulate(corrected)
        return self._applied[2]

    def learn(self, nodes: int, ms: float, expected: float) -> None:
        """Learns that a pass over these nodes took `ms` where `apply` predicted `expected`."""
        error = math.log(ms / expected) - self._log_speed
        self._log_speed += _SPEED_RATE * error
        size = nodes.bit_length()
        shape = self._shape.get(size, 0.0) + _SHAPE_RATE * max(-_MAX_SHAPE, min(_MAX_SHAPE, error))
        self._shape[size] = max(-_MAX_SHAPE, min(_MAX_SHAPE, shape))


@dataclass
class StepBudget:
    """Latency and expected tokens of one step; milliseconds are the latency model's.

    Attributes:
        rows: roots to be scored.
        times: [M + 1] of a pass over the roots and i more nodes.
        nodes: scored in the end, roots included.
        tokens: expected of them, by the estimates of the drafts.
        levels_ms: of drafting, as predicted.
        drafting_ms: of drafting, as measured.
    """

    rows: int
    times: NDArray[np.float64]
    nodes: int = 0
    tokens: float = 0.0
    levels_ms: float = 0.0
    drafting_ms: float = 0.0

    def of(self, nodes: int) -> float:
        """Latency for this many nodes, roots included; extrapolated past the last known time."""
        last, added = len(self.times) - 1, max(0, nodes - self.rows)
        if added <= last:
            return float(self.times[added])
        return float(self.times[last]) + self._slope * (added - last)

    def growth(self, nodes: int, more: int) -> list[float]:
        """Latency for `nodes`, nodes + 1, ..., nodes + `more` nodes; see `of`."""
        first = max(0, nodes - self.rows)
        known: list[float] = self.times[first : first + more + 1].tolist()
        return known + [self.of(self.rows + first + i) for i in range(len(known), more + 1)]

    @cached_property
    def _slope(self) -> float:
        """Milliseconds per node past the known ones; in proportion where these cost the same."""
        last = len(self.times) - 1
        for first in (last // 2, 0):
            if self.times[first] < self.times[last]:
                return float(self.times[last] - self.times[first]) / (last - first)
        return float(self.times[last]) / (self.rows + last)

    def trim(self, trees: Sequence[TokenTree], drafting_ms: float) -> list[TokenTree]:
        """Returns the trees without the nodes whose scoring does not pay.

        Drawn nodes and nodes without an estimate stay, and so do their ancestors.

        Args:
            drafting_ms: time of this step so far.
        """
        self.drafting_ms = drafting_ms
        if sum(map(len, trees)) == len(trees):  # the quick way: plain steps are frequent
            self.nodes, self.tokens = len(trees), float(len(trees))
            return list(trees)
        free, sure = [], 0.0
        for row, tree in enumerate(trees):
            estimates = () if tree.estimates is None else tree.estimates
            stays = _above_drawn(tree)
            for node, (chance, law) in enumerate(zip(estimates, tree.law_list, strict=False)):
                if node and law in (_POINT, _COUPLED) and node not in stays:
                    free.append((-chance, row, node))
                elif node:
                    sure += chance
        free.sort()
        size = sum(map(len, trees))
        times = self.growth(size - len(free), len(free))
        gains = [-entry[0] for entry in free]
        count = best_count(gains, times, drafting_ms, len(trees) + sure)
        self.tokens = len(trees) + sure - sum(entry[0] for entry in free[:count])
        pruned: list[set[int]] = [set() for _ in trees]
        for _, row, node in free[count:]:
            pruned[row].add(node)
        trimmed = [
            tree.kept([n for n in range(len(tree)) if n not in nodes]) if nodes else tree
            for tree, nodes in zip(trees, pruned, strict=True)
        ]
        self.nodes = sum(map(len, trimmed))
        return trimmed


def _above_drawn(tree: TokenTree) -> set[int]:
    """The ancestors of drawn nodes, without the root."""
    found: set[int] = set()
    if set(tree.law_list[1:]) <= {_POINT, _COUPLED}:
        return found
    for node, law in enumerate(tree.law_list):
        above = tree.parent_list[node] if law not in (_POINT, _COUPLED) else 0
        while above > 0 and above not in found:
            found.add(above)
            above = tree.parent_list[above]
    return found


def best_count(gains: Sequence[float], times: Sequence[float], sunk: float, sure: float) -> int:
    """Returns how many of the nodes to keep for the most tokens per time.

    Args:
        gains: acceptance rate of each node from the root, best first.
        times: [len(gains) + 1], of a pass that scores i of them beside those that stay anyway.
        sunk: time of this step that is spent in any case, same unit.
        sure: tokens expected without them: at least one for each root.
    """
    best, most = 0, sure / (times[0] + sunk)
    for count, gain in enumerate(gains, start=1):
        sure += gain
        rate = sure / (times[count] + sunk)
        if rate > most:
            best, most = count, rate
    return best


@dataclass
class LevelBudget:
    """The `LevelPolicy` of a model drafter in one step.

    Args:
        step: the step; the time of levels is added there.
        curve: latency model of the drafter.
        length: committed tokens of a row.
        factor: time of drafting over that of the latency model.
        idle: rows of the step that draft nothing.
    """

    step: StepBudget
    curve: LatencyModel
    length: int
    factor: float
    idle: int = 0
    _spent: float = field(default=0.0, init=False)

    def num_expansions(
        self,
        tokens: float,
        nodes: int,
        free: Sequence[float],
        gains: Sequence[float],
        added: Sequence[int],
        widths: Sequence[int],
    ) -> int:
        """See `LevelPolicy.num_expansions`: as many offers as give the most tokens per time."""
        tokens, nodes = tokens + self.idle, nodes + self.idle
        chances = sorted(free, reverse=True)
        times = self.step.growth(nodes, len(chances))
        scored = best_count(chances, times, self._spent, tokens)
        gained, size = tokens + sum(chances[:scored]), nodes + scored
        best, best_rate, cost = 0, gained / (self._spent + self.step.of(size)), 0.0
        passed = [width for width in widths if width]  # the others were scored in passes before
        levels, ms = self.curve.running(passed, [self.length] * len(passed)), 0.0
        for offers, (gain, more, width) in enumerate(zip(gains, added, widths, strict=True), 1):
            ms = next(levels) if width else ms
            gained, size = gained + gain, size + more
            level = self.factor * ms
            rate = gained / (self._spent + level + self.step.of(size))
            if rate > best_rate:
                best, best_rate, cost = offers, rate, level
        self._spent += cost
        self.step.levels_ms += cost / self.factor
        return best
