"""Rows of a draft model that stay after their texts have ended, for texts that begin alike."""

from __future__ import annotations

from contextlib import suppress
from typing import NamedTuple

from redwood.backends.base import Backend, SharingBackend
from redwood.backends.radix import common
from redwood.backends.rows import reusable
from redwood.drafters.context import Context

_MOST = 64  # rows
_WORTH = 16  # tokens that must be saved
_WINDOWS = 8  # a row that went on for so many times what is read of a new text begins anew


class _Kept(NamedTuple):
    row: int
    skipped: int  # tokens of the text behind the first few that the row does not hold
    text: list[int]
    salt: str


class KeptRows:
    """Rows of a backend by text, the least recently used first to go.

    Args:
        backend: rows stay where it can share them and computes the same bits in any company.
        first: tokens at the beginning of a text that every row holds.
    """

    def __init__(self, backend: Backend, first: int) -> None:
        self._backend, self._first = backend, first
        exact = getattr(backend, "batch_invariant", False)
        self._sharing = backend if exact and isinstance(backend, SharingBackend) else None
        self._max_pages = 0
        self._kept: list[_Kept] = []  # the latest used is last

    def bound(self, max_bytes: int) -> bool:
        """Sets how much memory may stay, 0: none; returns whether any may."""
        if self._sharing is not None:
            size: int = getattr(self._sharing, "token_bytes", 1)
            self._max_pages = max_bytes // (size * self._sharing.page_slots)
        self._shrink()
        return self._max_pages > 0

    def take(self, context: Context, reads: int) -> tuple[int, int] | None:
        """Returns a row with the beginning of a text and what it skipped; None: reading is as fast.

        A row may hold more of the text than one that begins anew would. Where the text may depend
        on its seed alone, it holds the same.

        Args:
            reads: tokens that a row that begins anew reads.
        """
        text, salt = context.token_ids, context.params.cache_salt
        best, found = 0, None
        for kept in self._kept:
            if kept.salt != salt or context.unsteered and kept.skipped != len(text) - reads:
                continue
            same = min(common(kept.text, 0, text, 0), len(text) - 1)
            if same > kept.skipped:
                same = kept.skipped + reusable(self._backend, kept.row, same - kept.skipped)
            held = len(text) - kept.skipped
            fits = held <= self._backend.capacity and (
                kept.skipped == len(text) - reads or held <= _WINDOWS * reads
            )
            least = max(best, self._first + kept.skipped if kept.skipped else 0)
            if fits and same > least and reads - (len(text) - same) >= _WORTH:
                best, found = same, kept
        if found is None or self._sharing is None:
            return None
        self._kept.remove(found)
        self._kept.append(found)
        return self._sharing.fork(found.row, best - found.skipped), found.skipped

    def keep(self, row: int, skipped: int, context: Context) -> None:
        """Takes over a row without provisional nodes, or releases it."""
        length = self._backend.length(row) + skipped
        text, salt = context.token_ids[:length], context.params.cache_salt
        if not self._max_pages or len(text) < length or length < _WORTH:
            self._backend.release(row)
            return
        new = _Kept(row, skipped, text, salt)
        for old in list(self._kept):  # those that it goes on from
            same = (old.skipped, old.salt) == (skipped, salt)
            if same and common(old.text, 0, text, 0) == len(old.text):
                self._drop(old)
        self._kept.append(new)
        if self._sharing is not None:
            self._sharing.park(row)
        self._shrink()

    def clear(self) -> None:
        """Drops all of them; what cannot be released is left to its backend."""
        kept, self._kept = self._kept, []
        for each in kept:
            with suppress(Exception):
                self._backend.release(each.row)

    def _shrink(self) -> None:
        while self._kept and (len(self._kept) > _MOST or self._pages() > self._max_pages):
            self._drop(self._kept[0])

    def _pages(self) -> int:
        if self._sharing is None:
            return 0
        return self._sharing.pages([kept.row for kept in self._kept])

    def _drop(self, kept: _Kept) -> None:
        self._kept.remove(kept)
        self._backend.release(kept.row)
