"""Times within one step: what more nodes and more levels would cost, as the machine runs now."""

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

_QUICK, _SLOW = 0.2, 0.08  # weight of a new time: in the machine's speed, in the curve's shape
_WIDEST = math.log(1.5)  # the shape is believed within this factor
_POINT, _COUPLED = int(Law.POINT), int(Law.COUPLED)


@dataclass
class DecayedMean:
    """A mean whose older entries fade by a factor for every new one."""

    total: float = 0.0
    weight: float = 0.0

    def add(self, value: float, fade: float) -> None:
        """Adds an entry."""
        self.total = self.total * fade + value
        self.weight = self.weight * fade + 1.0

    def value(self, prior: float, belief: float) -> float:
        """Returns the mean together with `belief` entries of `prior`."""
        return (belief * prior + self.total) / (belief + self.weight)


class LatencyCorrection:
    """What steps really take, against the curve: the machine's speed now, and the curve's shape.

    The speed moves within seconds and concerns all sizes alike; the shape is kept per power of two
    of nodes and moves slowly.
    """

    def __init__(self) -> None:
        self._log_speed = 0.0
        self._shape: dict[int, float] = {}
        self._applied: tuple[Any, Any, NDArray[np.float64]] | None = None  # the last answer

    @property
    def speed(self) -> float:
        """Time now, in units of the curve's time."""
        return math.exp(self._log_speed)

    def apply(self, times: NDArray[np.float64], first: int) -> NDArray[np.float64]:
        """Returns times [M], of `first` and more nodes, with the shape put right.

        The shape is taken to a percent: it seldom moves by that in a step, and where nothing did
        the last answer holds.

        Guarantee: never falls with more nodes.
        """
        if not self._shape:
            return times
        shapes = [(size, round(shape, 2)) for size, shape in self._shape.items()]
        known = first, shapes
        if self._applied is None or self._applied[0] is not times or self._applied[1] != known:
            made = times.copy()
            for size, shape in shapes:
                low, high = (1 << size) // 2 - first, (1 << size) - first
                made[max(0, low) : max(0, high)] *= math.exp(shape)
            self._applied = times, known, np.maximum.accumulate(made)
        return self._applied[2]

    def learn(self, nodes: int, ms: float, expected: float) -> None:
        """Notes that a pass over these nodes took `ms` where `apply` had said `expected`."""
        off = math.log(ms / expected) - self._log_speed
        self._log_speed += _QUICK * off
        size = nodes.bit_length()
        shape = self._shape.get(size, 0.0) + _SLOW * max(-_WIDEST, min(_WIDEST, off))
        self._shape[size] = max(-_WIDEST, min(_WIDEST, shape))


@dataclass
class StepBudget:
    """The times of one step.

    Attributes:
        rows: roots to be scored.
        times: [M + 1] of a pass over the roots and i more nodes, in the curve's milliseconds.
        nodes: scored in the end, roots included.
        tokens: expected of them, as far as anything is believed of the drafts.
        levels_ms: of drafting, as the curves say.
        drafting_ms: of drafting, as it was.
    """

    rows: int
    times: NDArray[np.float64]
    nodes: int = 0
    tokens: float = 0.0
    levels_ms: float = 0.0
    drafting_ms: float = 0.0

    def of(self, nodes: int) -> float:
        """The time of a pass over this many nodes, roots included.

        Past the last known time it goes on as over the last half.
        """
        last, added = len(self.times) - 1, max(0, nodes - self.rows)
        if added <= last:
            return float(self.times[added])
        return float(self.times[last]) + self._slope * (added - last)

    def growth(self, nodes: int, more: int) -> list[float]:
        """The times of passes over so many nodes, and over up to `more` further ones; see `of`."""
        first = max(0, nodes - self.rows)
        known: list[float] = self.times[first : first + more + 1].tolist()
        return known + [self.of(self.rows + first + i) for i in range(len(known), more + 1)]

    @cached_property
    def _slope(self) -> float:
        """Milliseconds of a node past the known ones; in proportion where these cost the same."""
        last = len(self.times) - 1
        for first in (last // 2, 0):
            if self.times[first] < self.times[last]:
                return float(self.times[last] - self.times[first]) / (last - first)
        return float(self.times[last]) / (self.rows + last)

    def trim(self, trees: Sequence[TokenTree], drafting_ms: float) -> list[TokenTree]:
        """Returns the trees less the nodes whose scoring would not pay.

        Nodes that were drawn, or of which nothing is believed, stay, and so does what they hang
        from.

        Args:
            drafting_ms: that this step has cost so far, in the curve's milliseconds.
        """
        self.drafting_ms = drafting_ms
        if sum(map(len, trees)) == len(trees):  # plain steps come often, and small models are quick
            self.nodes, self.tokens = len(trees), float(len(trees))
            return list(trees)
        free, sure = [], 0.0
        for row, tree in enumerate(trees):
            believed = () if tree.estimates is None else tree.estimates
            stays = _staying(tree)
            for node, (chance, law) in enumerate(zip(believed, tree.law_list, strict=False)):
                if node and law in (_POINT, _COUPLED) and node not in stays:
                    free.append((-chance, row, node))
                elif node:
                    sure += chance
        free.sort()
        size = sum(map(len, trees))
        times = self.growth(size - len(free), len(free))
        count = best_count([-entry[0] for entry in free], times, drafting_ms, len(trees) + sure)
        self.tokens = len(trees) + sure - sum(entry[0] for entry in free[:count])
        out: list[set[int]] = [set() for _ in trees]
        for _, row, node in free[count:]:
            out[row].add(node)
        made = [
            tree.kept([n for n in range(len(tree)) if n not in left]) if left else tree
            for tree, left in zip(trees, out, strict=True)
        ]
        self.nodes = sum(map(len, made))
        return made


def _staying(tree: TokenTree) -> set[int]:
    """The nodes above drawn ones, the root left out."""
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
        gains: chance of each node to be accepted, best first.
        times: of a pass that scores i of them beside those that stay anyway, [len(gains) + 1].
        sunk: time of this step that is spent anyway, same unit.
        sure: tokens expected without them: one for each root, at least.
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
        step: what it belongs to; the time of levels is noted there.
        curve: of the drafter's own forward.
        length: committed tokens of a row.
        factor: drafting takes this times what the curve says.
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
        levels = self.curve.running(widths, [self.length] * len(widths))
        for offers, (gain, more, ms) in enumerate(zip(gains, added, levels, strict=True), start=1):
            gained, size = gained + gain, size + more
            level = self.factor * ms
            rate = gained / (self._spent + level + self.step.of(size))
            if rate > best_rate:
                best, best_rate, cost = offers, rate, level
        self._spent += cost
        self.step.levels_ms += cost / self.factor
        return best
