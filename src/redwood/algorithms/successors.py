"""The successor table: what a model itself said after the last one to three tokens of any text.

Each pass of the target scores every node of a tree, and verification reads one token of a row. The
best few tokens of all those rows are kept here, accepted node or not, as an average by key: what
the target is likely to say when it meets these tokens again. Token Recycling (arXiv 2408.08696)
keeps the last row of each single token; longer keys, averages and a life beyond one text are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from redwood.errors import ArgumentError

try:
    from redwood import _native

    _native.SuccessorTable  # noqa: B018  # an extension built from older sources lacks it
    compiled = True
except (ImportError, AttributeError):
    compiled = False

BEST = 4
"""Tokens of a row that are learned; more bring nothing."""
MAX_BYTES = 128 << 20
"""Default bound of a table: 2 million keys, some 500,000 tokens of answers."""
LEAST_BYTES = 1 << 19
ENTRY = np.dtype(
    [
        *(("key", "<u8"), ("stamp", "<u4"), ("rows", "<u4")),
        *(("tokens", "<u4", 6), ("probs", "<f4", 6)),
    ]
)
"""One entry of 64 bytes: a hash of its key, when it changed last, rows averaged, the best tokens
and their probabilities, descending; 0: no token."""

ORDERS = 3
"""Tokens of the longest key."""
_WAYS, _KEPT = 8, 6
_NEWEST = np.float32(0.4)  # weight of the newest row
_OLDER = np.float32(1.0) - _NEWEST
_WORD = (1 << 64) - 1
_LATEST = (1 << 32) - 1


class SuccessorTable:
    """Averaged rows by key, in bounded memory. The reference of the compiled one.

    A hash table of buckets of 8 entries, which doubles while its bound allows it; then a new key
    takes the place of the entry of its bucket that changed longest ago.

    Args:
        max_bytes: bound of its memory, at least 512 KiB.

    Attributes:
        rows: rows that were learned.

    Raises:
        ValueError: a smaller bound.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        if max_bytes < LEAST_BYTES:
            raise ValueError("a table takes at least 512 KiB")
        self.max_bytes = max_bytes
        self.clear()

    def __len__(self) -> int:
        return sum(map(len, self._buckets))

    @property
    def nbytes(self) -> int:
        """Memory that its entries take, empty ones included."""
        return len(self._buckets) * _WAYS * ENTRY.itemsize

    def clear(self) -> None:
        """Forgets everything."""
        self.rows = 0
        self._buckets: list[list[_Entry]] = [[] for _ in range(LEAST_BYTES // 64 // _WAYS)]

    def learn(
        self,
        tail: Sequence[int],
        token_ids: Sequence[int],
        parents: Sequence[int],
        ids: NDArray[np.int32],
        probs: NDArray[np.float32],
    ) -> None:
        """Averages in the rows after the nodes of a tree.

        Args:
            tail: tokens before the tree, the last ones are enough.
            token_ids, parents: [N], parents before children; -1 stands for the end of `tail`.
            ids, probs: [N, K], the best K <= 6 tokens after each node, best first.

        Raises:
            ValueError: shapes or parents that do not fit, a token that is no 32-bit number.
        """
        if not len(token_ids) == len(parents) == len(ids) == len(probs) or ids.shape != probs.shape:
            raise ValueError("a row of ids and of probs for every token")
        if ids.shape[1] > _KEPT:
            raise ValueError("a row has at most 6 tokens")
        if not all(-1 <= parent < node for node, parent in enumerate(parents)):
            raise ValueError("a parent must come before its child")
        if not all(0 <= token <= _LATEST for token in (*token_ids, *tail)):
            raise ValueError("a token must be from 0 to 2^32 - 1")
        for node in range(len(token_ids)):
            latest, at = list[int](), node
            while at >= 0 and len(latest) < ORDERS:
                latest.append(token_ids[at])
                at = parents[at]
            latest += list(tail[::-1])[: ORDERS - len(latest)]
            self.rows += 1
            for order in range(1, len(latest) + 1):
                entry = self._place_for(_key_of(latest[:order]))
                entry.average(ids[node], probs[node])
                entry.stamp = min(self.rows, _LATEST)

    def find(self, context: Sequence[int]) -> list[tuple[int, list[tuple[int, float]]]]:
        """Returns (key length, [(token, probability)]), the longest key first, best token first."""
        latest = list(context[: -ORDERS - 1 : -1])
        found = []
        for order in range(len(latest), 0, -1):
            key = _key_of(latest[:order])
            held = [entry for entry in self._bucket(key) if entry.key == key]
            found += [(order, entry.successors()) for entry in held]
        return found

    def entries(self) -> NDArray[np.uint8]:
        """Returns all entries as bytes [N, 64], see `ENTRY`; the one changed longest ago first."""
        held = [entry for bucket in self._buckets for entry in bucket]
        held.sort(key=lambda entry: (entry.stamp, entry.key))
        array = np.zeros(len(held), ENTRY)
        for row, entry in zip(array, held, strict=True):
            row["key"], row["stamp"], row["rows"] = entry.key, entry.stamp, entry.rows
            for i, (token, prob) in enumerate(entry.best):
                row["tokens"][i], row["probs"][i] = token, prob
        return array.view(np.uint8).reshape(len(held), ENTRY.itemsize)

    def load(self, entries: NDArray[np.uint8], rows: int) -> None:
        """Puts entries in as they are; they replace those of equal keys.

        Args:
            entries: [N, 64] from `entries`.
            rows: that were learned for them.

        Raises:
            ValueError: an entry that no table can hold; nothing was changed.
        """
        array = np.ascontiguousarray(entries).view(ENTRY).reshape(-1)
        probs = array["probs"]
        falling = (probs >= 0.0) & (np.hstack([probs[:, :1] * 0 + 1.001, probs[:, :-1]]) >= probs)
        if not ((array["key"] > 0) & (array["rows"] > 0) & falling.all(axis=1)).all():
            raise ValueError("an entry that no table can hold")
        for row in array:
            entry = self._place_for(int(row["key"]))
            entry.stamp, entry.rows = int(row["stamp"]), int(row["rows"])
            pairs = zip(row["tokens"].tolist(), row["probs"], strict=True)
            entry.best = [(token, prob) for token, prob in pairs if prob > 0.0]
        self.rows = max(self.rows, rows)

    def _bucket(self, key: int) -> list[_Entry]:
        return self._buckets[key % len(self._buckets)]

    def _place_for(self, key: int) -> _Entry:
        """The entry of this key, or a new one, in the place of the oldest where memory is full."""
        while True:
            bucket = self._bucket(key)
            for entry in bucket:
                if entry.key == key:
                    return entry
            if len(bucket) < _WAYS:
                bucket.append(_Entry(key))
                return bucket[-1]
            if 2 * self.nbytes > self.max_bytes:
                oldest = min(range(_WAYS), key=lambda i: bucket[i].stamp)
                bucket[oldest] = _Entry(key)
                return bucket[oldest]
            held = [entry for bucket in self._buckets for entry in bucket]
            self._buckets = [[] for _ in range(2 * len(self._buckets))]
            for entry in held:
                self._bucket(entry.key).append(entry)


class _Entry:
    """What followed one key."""

    __slots__ = ("best", "key", "rows", "stamp")

    def __init__(self, key: int) -> None:
        self.key, self.stamp, self.rows = key, 0, 0
        self.best: list[tuple[int, np.float32]] = []

    def average(self, ids: NDArray[np.int32], probs: NDArray[np.float32]) -> None:
        """Averages in one row; tokens that fall behind the best few are forgotten."""
        held = {token: prob * _OLDER for token, prob in self.best}
        weight = _NEWEST if self.rows else np.float32(1.0)
        for token, prob in zip(ids.tolist(), probs, strict=True):
            if not prob > 0.0:
                break
            held[token] = held[token] + weight * prob if token in held else weight * prob
        ordered = sorted(held.items(), key=lambda pair: -pair[1])
        self.best = ordered[:_KEPT]
        self.rows = min(self.rows + 1, _LATEST)

    def successors(self) -> list[tuple[int, float]]:
        return [(token, float(prob)) for token, prob in self.best]


def _mixed(x: int) -> int:
    """The finaliser of MurmurHash3, 64 bits."""
    x ^= x >> 33
    x = x * 0xFF51AFD7ED558CCD & _WORD
    x ^= x >> 33
    x = x * 0xC4CEB9FE1A85EC53 & _WORD
    return x ^ x >> 33


def _key_of(latest: Sequence[int]) -> int:
    """Hash of a key, its last token first; never 0, which marks an empty entry."""
    key = len(latest)
    for token in latest:
        key = _mixed(key ^ token) + 0x9E3779B97F4A7C15 & _WORD
    return key or 1


def copy_of(table: AnyTable) -> AnyTable:
    """Returns a table that holds the same and learns on its own."""
    copied = successor_table(table.max_bytes)
    copied.load(table.entries(), table.rows)
    return copied


AnyTable: TypeAlias = "SuccessorTable | _native.SuccessorTable"


def successor_table(max_bytes: int = MAX_BYTES) -> AnyTable:
    """Returns an empty table: a compiled one where that was built.

    Raises:
        ArgumentError: a bound below 512 KiB.
    """
    if max_bytes < LEAST_BYTES:
        raise ArgumentError(f"a table takes at least 512 KiB, not {max_bytes} bytes")
    return _native.SuccessorTable(max_bytes) if compiled else SuccessorTable(max_bytes)
