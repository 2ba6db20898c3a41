"""Looks up what followed the last tokens of a text, with back-off, at a sample of the places.

Source: SSSD (arXiv 2411.05894), its datastore as released: the longest context first, shorter ones
until enough continuations were found; of many places, an equally spaced sample. Suffixes are sorted
by what follows, so such a sample has each continuation in proportion. Differences: the places of
all chunks are sampled as one list, to its end (with an integer step, the last ones are never taken
where there are fewer than twice as many), and no continuation crosses the end of a document.
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
    """Continuations of a context at a sample of the places where it occurs; for `algorithms.sssd`.

    Args:
        found: (match length, rows of values [R, depth]), longest first; END ends a row.
    """

    def __init__(self, found: Sequence[tuple[int, list[list[int]]]]) -> None:
        self._found = found

    def by_match(self) -> list[tuple[int, list[list[int]]]]:
        """Returns (match length, token ids of every continuation), the longest match first."""
        made = []
        for length, rows in self._found:
            ended = (row[: row.index(END)] if END in row else row for row in rows)
            lists = [[value - 1 for value in row] for row in ended if row]
            if lists:
                made.append((length, lists))
        return made

    def token_lists(self) -> list[list[int]]:
        """Returns every continuation, as token ids up to the end of its document.

        One that was found with two match lengths is returned twice.
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
    return Continuations(found)


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
