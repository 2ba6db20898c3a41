"""Every outcome of code that uses chance, with its probability: by a script, or by bisection.

No tree is drawn here and no law compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from redwood.errors import RedwoodError
from redwood.tree import TokenTree
from redwood.verify import Acceptance, Chance

Row = NDArray[np.float64]
Rule = Callable[[TokenTree, Row, Chance], Acceptance]
UniformsRule = Callable[[TokenTree, Row, Row], Acceptance]
T = TypeVar("T")

_FINEST = 2.0**-50  # boxes thinner than this are not cut again
_PROBES = 2  # points per box from which borders are looked for, along every axis


class ExactnessError(RedwoodError, AssertionError):
    """A rule that changes the target's law, or uses its chance in a way that no proof covers."""


class Script:
    """Answers every choice of one run, first as a plan says, then always the first option."""

    def __init__(self) -> None:
        self._forks: list[_Fork] = []
        self._asked = 0

    def choose(self, probs: Sequence[float]) -> int:
        """Returns an index into `probs`, which sum to 1; never one of probability 0."""
        if self._asked == len(self._forks):
            self._forks.append(_Fork(probs))
        fork = self._forks[self._asked]
        if fork.probs != probs:
            raise ExactnessError("replayed, the rule asks for other chances: it has its own chance")
        self._asked += 1
        return fork.options[fork.taken]

    @property
    def probability(self) -> float:
        """Probability of the choices made so far in this run."""
        result = 1.0
        for fork in self._forks[: self._asked]:
            result *= fork.probs[fork.options[fork.taken]]
        return result

    def next_run(self) -> bool:
        """Plans the next run in depth-first order; False when all are done."""
        if self._asked != len(self._forks):
            raise ExactnessError("replayed, the rule stops earlier: it has chance of its own")
        self._asked = 0
        while self._forks:
            self._forks[-1].taken += 1
            if self._forks[-1].taken < len(self._forks[-1].options):
                return True
            self._forks.pop()
        return False


class _Fork:
    def __init__(self, probs: Sequence[float]) -> None:
        self.probs = probs
        self.options = [i for i, probability in enumerate(probs) if probability > 0.0]
        self.taken = 0
        if not self.options:
            raise ExactnessError(f"there is nothing to choose from in {list(probs)}")


def runs(program: Callable[[Script], T]) -> Iterator[tuple[float, T]]:
    """Yields (probability, result) of every run of `program`, which is started anew for each."""
    script = Script()
    while True:
        result = program(script)
        yield script.probability, result
        if not script.next_run():
            return


class ScriptedChance:
    """A `verify.Chance` that takes every branch in turn, for one step.

    Raises:
        ExactnessError: a coin asked twice for one node, a second draw, a chance that is none: a
            rule that does so uses one random number for two purposes.
    """

    def __init__(self, script: Script) -> None:
        self._script = script
        self._coins: set[int] = set()
        self._drawn = False

    def coin(self, node: int, probability: float) -> bool:
        """Returns whether the coin of `node` falls below `probability`."""
        if node in self._coins:
            raise ExactnessError(f"the coin of node {node} was asked twice")
        self._coins.add(node)
        if not -1e-9 <= probability <= 1.0 + 1e-9:
            raise ExactnessError(f"the coin of node {node} has probability {probability}")
        chance = min(1.0, max(0.0, float(probability)))
        return self._script.choose([chance, 1.0 - chance]) == 0

    def draw(self, probs: Row) -> int:
        """Returns the extra token, drawn from `probs` [V] (unnormalised)."""
        if self._drawn:
            raise ExactnessError("the extra token was drawn twice")
        self._drawn = True
        row = np.asarray(probs, dtype=np.float64)
        mass = float(row.sum())
        if not (0.0 < mass < np.inf and bool((row >= 0.0).all())):
            raise ExactnessError(f"the extra token was to be drawn from {row}")
        return self._script.choose((row / mass).tolist())


def outcomes(rule: Rule, tree: TokenTree, target_probs: Row) -> list[tuple[float, Acceptance]]:
    """Returns (probability, acceptance) for every way that the rule's chance can fall on one tree.

    Args:
        rule: see the package docstring.
        target_probs: [N, V] float64.

    Raises:
        ExactnessError: chance used twice, or chance of the rule's own.
    """
    return list(runs(lambda script: rule(tree, target_probs, ScriptedChance(script))))


def bisected(rule: UniformsRule) -> Rule:
    """Returns a rule for this kit that behaves as a rule reading plain numbers does.

    The cube [0, 1)^N is cut into boxes on which the rule always answers the same; every border is
    found by bisection to the last bit. Slow: some hundred calls per outcome, once per tree.

    Args:
        rule: (tree, target_probs [N, V], uniforms [N] float64) -> Acceptance, without other chance.
    """
    known: WeakKeyDictionary[TokenTree, tuple[Row, list[Acceptance]]] = WeakKeyDictionary()

    def by_boxes(tree: TokenTree, target_probs: Row, chance: Chance) -> Acceptance:
        if tree not in known:
            shares = _box_shares(
                lambda uniforms: _key(rule(tree, target_probs, uniforms)), len(tree)
            )
            found = [Acceptance(list(nodes), token) for nodes, token in shares]
            known[tree] = np.array(list(shares.values())), found
        weights, found = known[tree]
        return found[chance.draw(weights)]

    return by_boxes


_Key = tuple[tuple[int, ...], int]
_Answer = Callable[[Row], _Key]


def _key(acceptance: Acceptance) -> _Key:
    return tuple(acceptance.nodes), int(acceptance.next_token)


def _box_shares(answer: _Answer, size: int) -> dict[_Key, float]:
    """Volume of the part of the cube on which each answer is given."""
    shares: dict[_Key, float] = {}
    boxes = [(np.zeros(size), np.ones(size))]
    while boxes:
        low, high = boxes.pop()
        cut = _find_cut(answer, low, high)
        if cut is None:
            key = answer((low + high) / 2)
            shares[key] = shares.get(key, 0.0) + float(np.prod(high - low))
            continue
        axis, border = cut
        below, above = high.copy(), low.copy()
        below[axis] = above[axis] = border
        boxes += [(low, below), (above, high)]
    return shares


def _find_cut(answer: _Answer, low: Row, high: Row) -> tuple[int, float] | None:
    """An axis and a border on it where the answer changes inside the box, if one is found."""
    size = len(low)
    for probe in range(_PROBES):
        # The centre, then points of a lattice that no simple threshold falls on.
        at = (0.5 + probe * (0.618 + 0.414 * np.arange(size))) % 1.0
        point = low + (high - low) * at
        here = answer(point)
        for axis in [*range(1, size), 0]:  # the draw last: its borders depend on the coins
            width = high[axis] - low[axis]
            if width <= _FINEST:
                continue
            ends = (low[axis], np.nextafter(high[axis], 0.0), low[axis] + 0.23 * width)
            for end in ends:
                moved = point.copy()
                moved[axis] = end
                if answer(moved) != here:
                    return axis, _border(answer, here, point, axis, float(end))
    return None


def _border(answer: _Answer, here: _Key, point: Row, axis: int, other: float) -> float:
    """The least number on the far side of a change of answer between the point and `other`."""
    same, moved = float(point[axis]), point.copy()
    while abs(other - same) > _FINEST / 16:
        moved[axis] = middle = (same + other) / 2
        if middle in (same, other):
            break
        if answer(moved) == here:
            same = middle
        else:
            other = middle
    return max(same, other)
