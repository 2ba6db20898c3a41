"""N-gram lookahead: the n-gram tree of the next step, made before an arm is chosen.

An average predicts n-grams badly: they match nothing for a while and then, in a passage that is
copied from the prompt, every token. So they are queried before every step while that saves more
time than it takes on average; queries that save nothing may take half a percent of the time. The
tree is made without randomness, so it may be thrown away.
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

_SHARE = 0.005  # of the target's time may go to queries that save nothing
_CREDIT = 1.0  # plain passes that earlier savings, at first a prior, may pay for later queries
_FULL_EVERY = 8  # queries; these also return nodes that cannot pay, so that low rates can recover


class Preview(NamedTuple):
    """Trees by row, without the nodes that do not pay, and the expectation of the step.

    No trees: the lookahead skips this step, and n-grams do not draft in it.
    """

    trees: list[TokenTree]
    times: StepBudget
    whole: Sequence[TokenTree] = ()  # before nodes that do not pay were left out

    @property
    def tokens(self) -> float:
        """Expected, of all rows."""
        return self.times.tokens

    @property
    def ms(self) -> float:
        """Of the target's pass."""
        return self.times.of(self.times.nodes)


class NgramLookahead:
    """Queries an n-gram drafter: at every step while that pays, else as often as its share of time
    allows.

    Args:
        drafter: to query.
    """

    def __init__(self, drafter: NgramDrafter) -> None:
        self._drafter = drafter
        self._indexed: set[int] = set()  # texts that were read: the first query takes longer
        self._queries = 0
        # Cost of the last query, and of all queries beyond what they saved; unit: one plain pass.
        self._cost, self._debt = 0.0, -_CREDIT

    def query(
        self, contexts: Sequence[Context], budgets: Sequence[int], times: StepBudget, speed: float
    ) -> Preview:
        """Returns the trees of a step and what to expect of them; none while a debt is paid off.

        Args:
            budgets: most nodes of each row; a row with 1 gets a bare root.
            times: of the step; not changed.
            speed: current time of a pass over that of the latency model.
        """
        plain_ms, self._cost = times.of(times.rows), 0.0
        self.skip()
        if self._debt > 0.0:
            return Preview([], StepBudget(times.rows, times.times, nodes=times.rows))
        self._queries += 1
        start = perf_counter()
        least = _least_paying(times) if self._queries % _FULL_EVERY else 0.0
        trees = proposals(self._drafter, contexts, budgets, Limits(least=least))
        if self._indexed.issuperset(context.key for context in contexts):
            self._cost = 1e3 * (perf_counter() - start) / (speed * plain_ms)
        self._indexed.update(context.key for context in contexts)
        step = StepBudget(times.rows, times.times)
        return Preview(step.trim(trees, 0.0), step, trees)

    def settle(self, saved: float) -> None:
        """Credits the expected saving of the last query, in plain passes; 0: its tree is unused."""
        self._debt = max(-_CREDIT, self._debt + self._cost - saved)

    @property
    def waits(self) -> int:
        """Steps to come that are skipped in any case, to pay off the debt."""
        return max(0, int(self._debt / _SHARE))

    def skip(self) -> None:
        """Pays off the share of one step."""
        self._debt = max(-_CREDIT, self._debt - _SHARE)

    def release(self, key: int) -> None:
        """Forgets a request."""
        self._indexed.discard(key)


def _least_paying(times: StepBudget) -> float:
    """The acceptance rate from which a node gives more tokens per time than plain decoding."""
    plain_ms, more_ms = times.times[0], times.times[1:] - times.times[0]
    cheapest = (more_ms / np.arange(1, len(more_ms) + 1)).min(initial=np.inf)
    return float(times.rows * cheapest / plain_ms)
