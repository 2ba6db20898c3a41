"""Predicted outputs: a text that the answer is expected to be, drafted as long as it fits.

The caller knows most of the answer beforehand, such as a file that shall be edited. A cursor runs
along the prediction while the answer follows it. Where they part, the last tokens of the answer are
looked up in the prediction; until they are found, one token for one is taken to have changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul

import numpy as np
from numpy.typing import NDArray

from redwood.algorithms.acceptance import AcceptanceTable
from redwood.tree import TokenTree

_LEAST_MATCH = 2  # tokens in a row that show where the answer goes on
_PRIOR = (0.4, 0.7, 0.85, 0.9, 0.95)  # chance of the next token by tokens right in a row: 0, 1, ..
_BEGINNING = len(_PRIOR) - 1  # what is believed of the first token


class Prediction:
    """A predicted answer and how far the text has come in it.

    Args:
        token_ids: of the prediction, at least one.
    """

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._tokens = list(token_ids)
        self._array = np.array(self._tokens, np.int64)
        self._rates = AcceptanceTable(_PRIOR)
        self._tail: list[int] = []
        self._at, self._run = 0, _BEGINNING
        self._seen: set[int] = set()  # places of the prediction that the answer has said

    def tree(self, root: int, size: int) -> TokenTree:
        """Returns a chain of at most `size` nodes below and with `root`, the last committed token.

        Its estimates are what came of such tokens in this text so far.
        """
        tokens = self._tokens[self._at : self._at + max(0, size - 1)]
        rates = self._rates.rates
        chances = [rates[min(self._run + i, len(rates) - 1)] for i in range(len(tokens))]
        return TokenTree.point(
            [root, *tokens], range(-1, len(tokens)), [1.0, *accumulate(chances, mul)]
        )

    def follow(self, news: Sequence[int]) -> int:
        """Moves on with new tokens of the answer; returns how many more of the prediction it said.

        Only the text is looked at, so what is drafted next depends on nothing else.
        """
        before = len(self._seen)
        for token in news:
            self._tail = [*self._tail[-3:], token]
            if self._at >= len(self._tokens):
                self._find()
                continue
            hit = self._tokens[self._at] == token
            self._rates.count(min(self._run, len(_PRIOR) - 1), hit)
            if hit:
                self._seen.add(self._at)
                self._at, self._run = self._at + 1, self._run + 1
            else:
                self._run = 0
                self._at += 1
                self._find()
        return len(self._seen) - before

    def _find(self) -> None:
        """Moves the cursor behind the longest match of the answer's end, to the nearest of them.

        Of two as near the one ahead is taken. The whole prediction is looked through: in a file of
        similar lines the latest places of an index are at its far end.
        """
        length, places = self._matches()
        if length >= _LEAST_MATCH:
            away = np.abs(places - self._at)
            near = places[away == away.min()]
            self._at, self._run = int(near[-1]), length
            self._seen.update(range(self._at - length, self._at))

    def _matches(self) -> tuple[int, NDArray[np.int64]]:
        """The longest tail of the answer that stands in the prediction, and the places behind it.

        The end of the prediction is no place: nothing follows there.
        """
        found, length = np.arange(1, len(self._array)), 0
        for token in reversed(self._tail):
            more = found[(found > length) & (self._array[found - 1 - length] == token)]
            if not len(more):
                break
            found, length = more, length + 1
        return length, found
