"""Looking up what followed the last tokens of a text: back-off, and a sample of the places.

Source: SSSD (arXiv 2411.05894), its datastore as released: the longest context first, shorter ones
until enough continuations were found, of many places an equally spaced sample. Suffixes stand in
the order of what follows, so such a sample is a fair share of every continuation. Differences: the
places of all chunks are sampled as one list, spread to its end (a whole-number step would take the
first ones of fewer than twice as many), and nothing runs across the end of a document.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from redwood.datastore.chunk import END, Chunk

LONGEST_MATCH = 4
MOST_PLACES = 100
ENOUGH = 50
DEPTH = 8  # tokens of a continuation


class Continuations:
    """What followed a context, at a sample of places; a source of `algorithms.sssd`.

    A place is a number: of a continuation, and how far it was followed.

    Args:
        found: (match length, rows of values [R, depth]), longest first; END ends a row.
    """

    def __init__(self, found: Sequence[tuple[int, list[list[int]]]], depth: int = DEPTH) -> None:
        self._width = depth + 1
        self._rows = [[*row, END] for _, rows in found for row in rows]
        self._found: list[tuple[int, list[int]]] = []
        first = 0
        for length, rows in found:
            places = range(first, first + len(rows))
            self._found.append((length, [i * self._width for i in places if self._rows[i][0]]))
            first += len(rows)

    def matches(self, suffix: Sequence[int]) -> list[tuple[int, list[int]]]:
        """Returns (match length, places) as they were looked up, longest first."""
        return [(length, places) for length, places in self._found if places]

    def followers(self, places: Sequence[int]) -> dict[int, list[int]]:
        """Returns the tokens at these places, each with the places behind it."""
        grouped: dict[int, list[int]] = {}
        rows, width = self._rows, self._width
        for place in places:
            value = rows[place // width][place % width]
            if value != END:
                grouped.setdefault(value - 1, []).append(place + 1)
        return grouped

    def by_match(self) -> list[tuple[int, list[list[int]]]]:
        """Returns (match length, token ids of every continuation), the longest match first."""
        made = []
        for length, places in self.matches(()):
            rows = [self._rows[place // self._width] for place in places]
            made.append((length, [[value - 1 for value in row[: row.index(END)]] for row in rows]))
        return made

    def token_lists(self) -> list[list[int]]:
        """Returns every continuation, as token ids up to the end of its document.

        One that was found by two match lengths stands there twice.
        """
        return [row for _, rows in self.by_match() for row in rows]


def look_up(
    chunks: Sequence[Chunk],
    suffix: Sequence[int],
    *,
    most_places: int = MOST_PLACES,
    enough: int = ENOUGH,
    depth: int = DEPTH,
    vocab_size: int | None = None,
) -> Continuations:
    """Returns what followed the last tokens of `suffix` in these chunks.

    O(LONGEST_MATCH x chunks x log N), and a row of `depth` values for every place.

    Args:
        suffix: token ids, the last ones of a text; `LONGEST_MATCH` are compared at first.
        most_places: sampled for every match length.
        enough: shorter contexts are looked up until so many continuations were found.
        depth: tokens of a continuation.
        vocab_size: a continuation ends before a token that is not below this; None: no bound.
    """
    values = [token + 1 for token in suffix[-LONGEST_MATCH:]]
    found: list[tuple[int, list[list[int]]]] = []
    count = 0
    while values and count < enough:
        rows = _sample(chunks, values, most_places, depth, vocab_size)
        if rows:
            found.append((len(values), rows))
            count += len(rows)
        values = values[1:]
    return Continuations(found, depth)


def _sample(
    chunks: Sequence[Chunk],
    gram: Sequence[int],
    most: int,
    depth: int,
    vocab_size: int | None,
) -> list[list[int]]:
    """Continuations of an equally spaced sample of the places where `gram` stands."""
    ranges = [(chunk, *chunk.find(gram)) for chunk in chunks]
    total = sum(end - first for _, first, end in ranges)
    if total == 0:
        return []
    wanted = np.arange(min(most, total)) * total // min(most, total)
    rows: list[list[int]] = []
    before = 0
    for chunk, first, end in ranges:
        if end > first:
            low, high = np.searchsorted(wanted, (before, before + end - first))
            ranks = wanted[low:high] - before + first
            behind = chunk.behind(ranks, len(gram), depth)
            if vocab_size is not None:
                behind[behind > vocab_size] = END  # a value is its token + 1
            rows += behind.tolist()
            before += end - first
    return rows
