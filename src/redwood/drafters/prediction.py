"""Predicted outputs: the answer that the caller expects, drafted while the text follows it.

The caller knows most of the answer, such as a file to be edited. A cursor runs along the prediction
while the answer follows it. Where they differ, the answer's last tokens are looked up in the
prediction; until they are found, the cursor moves on token by token, as after a substitution.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul

import numpy as np
from numpy.typing import NDArray

from redwood.algorithms.acceptance import AcceptanceTable
from redwood.algorithms.source_rates import RUN_PRIOR
from redwood.algorithms.sources import Source
from redwood.tree import TokenTree

_LEAST_MATCH = 2  # tokens of a match that moves the cursor
_BEGINNING = len(RUN_PRIOR) - 1  # bin of the first token


class Prediction:
    """A predicted answer, and a cursor in it.

    Args:
        token_ids: of the prediction, at least one.
    """

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._tokens = list(token_ids)
        self._array = np.array(self._tokens, np.int64)
        self._rates = AcceptanceTable(RUN_PRIOR)
        self._tail: list[int] = []
        self._at, self._run = 0, _BEGINNING
        self._seen: set[int] = set()  # positions of the prediction that occurred in the answer

    def upcoming(self, count: int) -> tuple[list[int], int]:
        """Returns the next predicted tokens, at most `count`, and how many before were right."""
        return self._tokens[self._at : self._at + max(0, count)], self._run

    def tree(self, root: int, size: int) -> TokenTree:
        """Returns a chain of at most `size` nodes below and with `root`, the last committed token.

        Its estimates are the acceptance rates in this text so far.
        """
        tokens, _ = self.upcoming(size - 1)
        rates = self._rates.rates
        chances = [rates[min(self._run + i, len(rates) - 1)] for i in range(len(tokens))]
        return TokenTree.point(
            [root, *tokens],
            range(-1, len(tokens)),
            [1.0, *accumulate(chances, mul)],
            [0] + [int(Source.PREDICTION)] * len(tokens),
        )

    def follow(self, news: Sequence[int]) -> int:
        """Moves the cursor along new tokens of the answer; returns how many more of the prediction
        occurred in it.

        Later drafts depend on the text alone.
        """
        before = len(self._seen)
        for token in news:
            self._tail = [*self._tail[-3:], token]
            if self._at >= len(self._tokens):
                self._find()
                continue
            hit = self._tokens[self._at] == token
            self._rates.count(min(self._run, len(RUN_PRIOR) - 1), hit)
            if hit:
                self._seen.add(self._at)
                self._at, self._run = self._at + 1, self._run + 1
            else:
                self._run = 0
                self._at += 1
                self._find()
        return len(self._seen) - before

    def _find(self) -> None:
        """Re-aligns the cursor behind the longest match of the answer's last tokens.

        Of several the nearest is taken; of two as near, the one ahead. The whole prediction is
        searched: in repetitive files the latest matches of an index are far ahead.
        """
        length, places = self._matches()
        if length >= _LEAST_MATCH:
            away = np.abs(places - self._at)
            near = places[away == away.min()]
            self._at, self._run = int(near[-1]), length
            self._seen.update(range(self._at - length, self._at))

    def _matches(self) -> tuple[int, NDArray[np.int64]]:
        """Length of the longest match of the answer's last tokens, and the positions behind it.

        The end of the prediction is not among them: nothing follows there.
        """
        found, length = np.arange(1, len(self._array)), 0
        for token in reversed(self._tail):
            more = found[(found > length) & (self._array[found - 1 - length] == token)]
            if not len(more):
                break
            found, length = more, length + 1
        return length, found
