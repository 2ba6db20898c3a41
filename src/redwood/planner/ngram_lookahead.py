"""What n-grams promise for the next step, known before it is decided who drafts.

What an arm gave on the average says little of n-grams: they give nothing for a while and then, in
a passage that stands in the prompt, everything. So they are asked before every step, as long as
that saves more time than it takes, and in vain for half a percent of all time. They draw no coins,
so that a tree may be thrown away.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import NamedTuple

import numpy as np

from redwood.drafters.base import NgramDrafter
from redwood.drafters.context import Context
from redwood.drafters.limits import Limits
from redwood.drafters.proposing import proposals
from redwood.planner.budget import StepBudget
from redwood.tree import TokenTree

_SHARE = 0.005  # of the target's time may go to asking in vain
_ALL = 8  # every so many answers have nodes that cannot pay as well: a low rate must not stay so


class Preview(NamedTuple):
    """Trees by row, less the nodes that would not pay, and what is then expected of the step.

    No trees: they were not asked for this step, and are not to draft.
    """

    trees: list[TokenTree]
    times: StepBudget

    @property
    def tokens(self) -> float:
        """Of all rows."""
        return self.times.tokens

    @property
    def ms(self) -> float:
        """Of the target's pass."""
        return self.times.of(self.times.nodes)


class NgramLookahead:
    """Asks an n-gram drafter: at every step while that pays, else as often as time allows."""

    def __init__(self, drafter: NgramDrafter) -> None:
        self._drafter = drafter
        self._known: set[int] = set()  # texts it has read: the first time takes longer
        self._answers = 0
        self._cost = self._owed = 0.0  # of the last answer, and to be waited for; in plain passes

    def ask(
        self, contexts: Sequence[Context], budgets: Sequence[int], times: StepBudget, speed: float
    ) -> Preview:
        """Returns what the n-grams promise.

        Args:
            budgets: nodes of each row at most; a row with 1 gets a bare root.
            times: of the step; not changed.
            speed: time now, in units of the curve's.
        """
        plain_ms, self._cost = times.of(times.rows), 0.0
        self.rest()
        if self._owed > 0.0:
            return Preview([], StepBudget(times.rows, times.times, nodes=times.rows))
        self._owed = 0.0
        self._answers += 1
        start = perf_counter()
        least = _least_paying(times) if self._answers % _ALL else 0.0
        trees = proposals(self._drafter, contexts, budgets, Limits(least=least))
        if self._known.issuperset(context.key for context in contexts):
            self._cost = 1e3 * (perf_counter() - start) / (speed * plain_ms)
        self._known.update(context.key for context in contexts)
        step = StepBudget(times.rows, times.times)
        return Preview(step.trim(trees, 0.0), step)

    def settle(self, saved: float) -> None:
        """Notes what the last answer is expected to save, in plain passes; 0: it is not used."""
        self._owed = max(0.0, self._owed + self._cost - saved)

    @property
    def waits(self) -> int:
        """Steps to come in which they would not be asked, whatever is judged."""
        return max(0, int(self._owed / _SHARE))

    def rest(self) -> None:
        """Lets a step pass in which they are not asked."""
        self._owed -= _SHARE

    def release(self, key: int) -> None:
        """Forgets a request."""
        self._known.discard(key)


def _least_paying(times: StepBudget) -> float:
    """The chance that nodes must have to give more tokens per time than plain decoding does."""
    plain_ms, more_ms = times.times[0], times.times[1:] - times.times[0]
    cheapest = (more_ms / np.arange(1, len(more_ms) + 1)).min(initial=np.inf)
    return float(times.rows * cheapest / plain_ms)
