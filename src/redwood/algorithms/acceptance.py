"""Learned acceptance rates: how likely a drafted node is to be accepted.

A static tree knows ranks alone. Here each node gets an estimate from its features (match length and
share of an n-gram, probability of a draft model), calibrated by the outcomes of such nodes before.
Estimates only steer what is drafted. Verification never sees them, and they are fixed before the
random numbers of a step are drawn, so the law of the text is unchanged.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from redwood.errors import ArgumentError

_MEMORY = 512.0  # trials after which the counts of a bin are halved, since texts change
_BELIEF = 8.0  # weight of a prior, in trials


class AcceptanceTable:
    """Acceptance rate by bin: a prior, updated by outcomes.

    Args:
        prior: rate per bin, in [0, 1].

    Raises:
        ArgumentError: no bins, or a rate outside [0, 1].
    """

    def __init__(self, prior: Iterable[float]) -> None:
        # Lists: single numbers of an array are slow to change.
        self._prior = [float(chance) for chance in prior]
        if not self._prior or not all(0.0 <= chance <= 1.0 for chance in self._prior):
            raise ArgumentError("a prior needs chances in [0, 1]")
        self._hits, self._trials = [0.0] * len(self._prior), [0.0] * len(self._prior)
        self.rates = list(self._prior)
        """Current rate per bin."""

    def count(self, index: int, hit: bool) -> None:
        """Counts one node of a bin whose parent was accepted; hit: it was accepted, too."""
        if self._trials[index] >= _MEMORY:
            self._hits[index] *= 0.5
            self._trials[index] *= 0.5
        self._hits[index] += hit
        self._trials[index] += 1.0
        seen = _BELIEF + self._trials[index]
        self.rates[index] = (_BELIEF * self._prior[index] + self._hits[index]) / seen

    def child(self) -> AcceptanceTable:
        """Returns a table for one text, whose prior is the rates of this one."""
        return AcceptanceTable(self.rates)

    def to_dict(self) -> dict[str, Any]:
        """Returns the counts, as plain values for JSON."""
        return {"hits": list(self._hits), "trials": list(self._trials)}

    def load(self, seen: Mapping[str, Any]) -> None:
        """Loads counts from `to_dict`.

        Raises:
            ArgumentError: another number of bins, or counts that cannot be.
        """
        try:
            hits, trials = (np.array(seen[name], np.float64) for name in ("hits", "trials"))
        except (KeyError, TypeError, ValueError) as error:
            raise ArgumentError(f"a reliability table needs hits and trials: {error}") from error
        if not hits.shape == trials.shape == (len(self._prior),):
            raise ArgumentError(f"a reliability table must have {len(self._prior)} bins")
        if not ((hits >= 0.0) & (hits <= trials) & (trials < np.inf)).all():
            raise ArgumentError("a reliability table has counts that cannot be")
        self._hits, self._trials = hits.tolist(), trials.tolist()
        rates = (_BELIEF * np.array(self._prior) + hits) / (_BELIEF + trials)
        self.rates = rates.tolist()


_MODEL_EDGES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.995)
MODEL_BINS = len(_MODEL_EDGES) + 1


def model_bin(prob: float) -> int:
    """Returns the bin of a token with this draft probability."""
    return bisect_left(_MODEL_EDGES, prob)


def model_prior() -> list[float]:
    """Returns the prior per bin: the draft probability, less 5 %."""
    edges = (0.0, *_MODEL_EDGES, 1.0)
    middles = [(low + high) / 2.0 for low, high in zip(edges, edges[1:], strict=False)]
    return [0.95 * middle for middle in middles]


def learn_below(
    news: Sequence[int],
    children: Callable[[int], Sequence[int]],
    token_ids: Sequence[int],
    bins: Sequence[int],
    tables: Sequence[AcceptanceTable],
) -> int:
    """Follows new text through a drafted tree and counts in all tables which children it took.

    No message about accepted nodes is needed: a child was accepted if it is the next token.

    Args:
        news: [L] tokens of the text after the tree's root.
        children: of a node, in index order; node 0 is the root.
        token_ids, bins: [N]; nodes of bin -1 are not counted.

    Returns: the length of the path that the text took.
    """
    at = depth = 0
    for token in news:
        taken = 0
        for node in children(at):
            hit = token_ids[node] == token
            for table in tables if bins[node] >= 0 else ():
                table.count(bins[node], hit)
            taken = node if hit else taken
        if not taken:
            break
        at, depth = taken, depth + 1
    return depth
