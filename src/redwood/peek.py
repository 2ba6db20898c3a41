"""What n-grams promise for the next step, known before it is decided who drafts.

What an arm gave on the average says little of n-grams: they give nothing for a while and then, in
a passage that stands in the prompt, everything. Where asking them costs next to nothing, they are
asked at every step. They draw no coins, so that a tree may be thrown away.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import NamedTuple

from redwood.context import Context
from redwood.drafting import NgramDrafter
from redwood.pacing import Mean, StepTimes
from redwood.tree import TokenTree

_SHARE = 0.02  # of a plain pass may asking take,
_AGAIN = 256  # or else it is tried again after so many steps
_FADE = 0.9


class Seen(NamedTuple):
    """Trees by row, the tokens that the step is then expected to give, and what its pass takes."""

    trees: list[TokenTree]
    tokens: float
    ms: float


class Peek:
    """Asks an n-gram drafter, as long as that is cheap beside a pass of the target."""

    def __init__(self, drafter: NgramDrafter) -> None:
        self._drafter = drafter
        self._known: set[int] = set()  # texts it has read: the first time takes longer
        self._cost = Mean()
        self._wait = 0

    def ask(
        self, contexts: Sequence[Context], budgets: Sequence[int], times: StepTimes, speed: float
    ) -> Seen | None:
        """Returns what the n-grams promise; None if they are not to be asked, or cannot answer.

        Args:
            budgets: nodes of each row at most; a row with 1 gets a bare root.
            times: of the step; not changed.
            speed: time now, in units of the curve's.
        """
        if self._wait:
            self._wait -= 1
            return None
        start = perf_counter()
        try:
            trees = self._drafter.propose(contexts, budgets)
        except Exception:  # it says so again where it is known for whom, if it is to draft
            return None
        took = 1e3 * (perf_counter() - start) / speed
        if self._known.issuperset(context.key for context in contexts):
            self._cost.add(took / times.of(times.rows), _FADE)
            if self._cost.value(0.0, 1.0) > _SHARE:
                self._wait, self._cost = _AGAIN, Mean()
        self._known.update(context.key for context in contexts)
        step = StepTimes(times.rows, times.times)
        step.trim(trees, 0.0)
        return Seen(trees, step.tokens, step.of(step.nodes))

    def release(self, key: int) -> None:
        """Forgets a request."""
        self._known.discard(key)
