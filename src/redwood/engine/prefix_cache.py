"""Texts that were read stay: rows of ended requests, from which new ones take their beginning.

An entry is a row of the target, kept after its request has ended. A new request forks the row that
holds its longest beginning, and computes the rest. Pages that rows share are counted once. Requests
whose common beginning is just being read by another one wait for it, and then take it from there.
Texts with another `cache_salt` are never seen.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from redwood.backends.base import Backend, Nodes, SharingBackend
from redwood.backends.radix import Entry, RadixTree, common
from redwood.backends.rows import reusable
from redwood.engine.request import Request
from redwood.engine.scheduler import admitted
from redwood.engine.turns import when_free
from redwood.errors import ArgumentError

_log = logging.getLogger(__name__)
_WORTH = 16  # tokens: fewer are read as fast as they are waited for, or kept


class PrefixCache:
    """Rows of a target: opened for requests, kept after them.

    Args:
        target: rows are kept where it can share them, see `SharingBackend`.
        max_bytes: most memory of what is kept, pages that running rows share included; 0: none.

    Attributes:
        max_pages: that entries may hold.
        on: whether anything is kept.
        num_tokens, num_hit_tokens: of prompts that were looked up, and of these, found.
        num_pages: that entries hold, shared ones counted once; as of the last that ended.
        num_evictions: entries that had to go.

    Raises:
        ArgumentError: a bound below 0.
    """

    def __init__(self, target: Backend, max_bytes: int = 0) -> None:
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 0:
            raise ArgumentError(f"kv_cache {max_bytes!r} must be a number of bytes, 0 or more")
        self._target, self._sharing = target, None
        self._every: int | None = None  # tokens from one kept state to the next; None: no states
        if getattr(target, "state_bytes", 0):
            self._every = getattr(target, "checkpoint_tokens", 0)
        self.max_pages = 0
        if max_bytes and isinstance(target, SharingBackend):
            self._sharing = target
            self.max_pages = max_bytes // (_token_bytes(target) * target.page_slots)
        self.on = self.max_pages > 0
        self._trees: dict[str, RadixTree] = {}
        self._salts: dict[Entry, str] = {}  # of all entries
        self._tick = 0
        self.num_tokens = self.num_hit_tokens = self.num_evictions = self.num_pages = 0

    @property
    def hit_rate(self) -> float:
        """Share of the tokens looked up that were found; 0 before the first."""
        return self.num_hit_tokens / self.num_tokens if self.num_tokens else 0.0

    def admit(
        self,
        waiting: Sequence[Request],
        running: Sequence[Request],
        max_rows: int,
        most: int | None,
    ) -> int:
        """Gives rows to the first of the waiting requests; returns to how many.

        Args:
            most: tokens that all rows and entries may hold; None: no bound.
        """
        if not self.on:
            joined = admitted(waiting, running, max_rows, most)
            for request in joined:
                request.row = self._target.open()
            return len(joined)
        rows = list(running)
        for request in waiting:
            if len(rows) >= max_rows:
                break
            request.row, length = self._take(request)
            request.stats.num_cached_tokens = length
            if most is not None and not self._make_room([*rows, request], most):
                self._target.release(request.row)
                request.row, request.stats.num_cached_tokens = -1, 0
                break
            self._follow(request, rows)
            self.num_tokens += request.stats.num_prompt_tokens
            self.num_hit_tokens += length
            rows.append(request)
        return len(rows) - len(running)

    def fillable(self, prefilling: Sequence[Request], running: Sequence[Request]) -> list[Request]:
        """Returns the requests to be prefilled now: not those whose beginning another one reads.

        Those that waited take it as soon as it is there.
        """
        made = []
        for request in prefilling:
            leader = request.leader
            if leader is not None:
                alive = any(leader is other for other in running)
                have = self._target.length(leader.row) if alive else 0
                if alive and have < request.num_shared:
                    continue
                request.leader = None
                self._retake(request, leader.row if alive else None)
            made.append(request)
        return made

    def close(self, request: Request) -> None:
        """Keeps the row of a request that has ended, or releases it.

        What cannot be kept, for want of memory, is not: no other request need end for it.
        """
        row, request.row = request.row, -1
        if row < 0:
            return
        keeps = False
        try:
            length = min(self._target.length(row), len(request.context.token_ids))
            if self.on and not request.failed:
                length = min(length, self.max_pages * self._page)
                if length >= _WORTH:
                    self._target.truncate(row, length)
                    length = self._cut_to_bound(row, length)
                if length >= _WORTH:
                    self.put(row, request.context.token_ids[:length], request.salt)
                    keeps = True
        except Exception:
            _log.exception("what a request has read could not be kept")
        finally:
            if not keeps:
                self._target.release(row)

    def give_back(self, request: Request) -> None:
        """Releases the row of a request that did not get to run: its admission failed."""
        row, request.row = request.row, -1
        request.leader, request.stats.num_cached_tokens = None, 0
        if row >= 0:
            self._release(row)

    def clear(self) -> None:
        """Forgets everything: now, or at the end of the step that another thread is making."""
        when_free([self._target], self.forget)

    def forget(self) -> None:
        """Forgets everything inside a step, also where an error left trees and entries apart."""
        entries, self._salts, self._trees = list(self._salts), {}, {}
        self.num_pages = 0
        for entry in entries:
            self._release(entry.row)

    @property
    def _page(self) -> int:
        return self._sharing.page_slots if self._sharing is not None else 1

    def _pages(self, rows: Sequence[int]) -> int:
        return self._sharing.pages(rows) if self._sharing is not None and rows else 0

    def _cut_to_bound(self, row: int, length: int) -> int:
        """Cuts a row whose states do not fit beside its keys and values; returns its length."""
        while self._every is not None and length and self._pages([row]) > self.max_pages:
            length = reusable(self._target, row, length - 1)
            self._target.truncate(row, length)
        return length

    def _fork(self, row: int, length: int) -> int:
        assert self._sharing is not None
        return self._sharing.fork(row, length)

    def _take(self, request: Request) -> tuple[int, int]:
        """A row with the longest beginning that is kept, its last token left to be computed."""
        tokens, tree = request.context.token_ids, self._trees.get(request.salt)
        entry, length = (None, 0) if tree is None else tree.find(tokens)
        if entry is None:
            return self._target.open(), 0
        self._touch(entry)
        length = reusable(self._target, entry.row, min(length, len(tokens) - 1))
        return self._fork(entry.row, length), length

    def _retake(self, request: Request, other: int | None) -> None:
        """Exchanges a row that has read little for one with more, `other`'s if it is given."""
        had = self._target.length(request.row)
        if other is None:
            row, length = self._take(request)
        else:
            length = reusable(self._target, other, request.num_shared)
            row = self._fork(other, length)
        if length <= had:
            self._target.release(row)
            return
        old, request.row = request.row, row
        self._target.release(old)
        self.num_hit_tokens += length - request.stats.num_cached_tokens
        request.stats.num_cached_tokens = length

    def _follow(self, request: Request, rows: Sequence[Request]) -> None:
        """Has a request wait for the row that reads, or has read, most of its beginning."""
        tokens, best = request.context.token_ids, self._target.length(request.row) + _WORTH - 1
        for other in rows:
            if other.salt != request.salt:
                continue
            theirs = other.context.token_ids
            same = min(common(tokens, 0, theirs, 0), len(tokens) - 1, len(theirs) - 1)
            if self._every is not None:  # where the other will have a state
                same = same // self._every * self._every if self._every else 0
            if same > best:
                best, request.leader, request.num_shared = same, other, same

    def kept(self) -> list[tuple[str, Entry]]:
        """Returns what is kept, with its salt, the least recently used first."""
        by_use = sorted(self._salts.items(), key=lambda item: item[0].used)
        return [(salt, entry) for entry, salt in by_use]

    def holds(self, row: int) -> bool:
        """Whether a row is kept."""
        return any(entry.row == row for entry in self._salts)

    def put(self, row: int, tokens: list[int], salt: str) -> None:
        """Keeps a row of the target, which holds these tokens; others may have to go for it.

        When this raises, nothing is kept any more, and the row is still its caller's.
        """
        entry = Entry(row, tokens)
        try:
            if self._sharing is not None:
                self._sharing.park(row)
            self._salts[entry] = salt
            self._touch(entry)
            for old in self._trees.setdefault(salt, RadixTree()).put(entry):
                self._salts.pop(old)
                self._release(old.row)
            self._count()
            while len(self._salts) > 1 and self.num_pages > self.max_pages:
                self._evict()
        except BaseException:
            self._salts.pop(entry, None)
            self.forget()
            raise

    def _count(self) -> None:
        self.num_pages = self._pages([entry.row for entry in self._salts])

    def _touch(self, entry: Entry) -> None:
        self._tick += 1
        entry.used = self._tick

    def _evict(self) -> None:
        self.num_evictions += 1
        self._drop(min(self._salts, key=lambda entry: entry.used))

    def _drop(self, entry: Entry) -> None:
        try:
            salt = self._salts.pop(entry)
            tree = self._trees[salt]
            tree.remove(entry)
            if next(tree.entries(), None) is None:
                del self._trees[salt]
            self._release(entry.row)
            self._count()
        except BaseException:  # interrupted, too: no entry may be left whose row is gone
            self.forget()
            raise

    def _release(self, row: int) -> None:
        try:
            self._target.release(row)
        except Exception:  # no request's fault: none has it any more
            _log.exception("a row that was kept could not be given back")

    def _make_room(self, requests: Sequence[Request], most: int) -> bool:
        """Whether rows fit, once entries have gone that stand in their way."""
        rows = [request.row for request in requests]
        held = self._pages(rows)
        twice = sum(self._pages([row]) for row in rows) - held
        # The last page of what was taken is copied once it is written to.
        twice -= sum(request.stats.num_cached_tokens % self._page > 0 for request in requests)
        used = sum(request.most_tokens for request in requests) - self._page * max(0, twice)
        if used > most:
            return False
        while self._salts:
            kept = [entry.row for entry in self._salts]
            if used + self._page * (self._pages([*rows, *kept]) - held) <= most:
                break
            self._evict()
        return True


def _token_bytes(target: Backend) -> int:
    """Memory of one token; a backend that learns it from a row that ends is given one."""
    parked: int | None = getattr(target, "parked_token_bytes", None)
    if parked:
        return parked
    if getattr(target, "token_bytes", None) is None:
        row = target.open()
        try:
            target.extend([Nodes(row, [0])])
        finally:
            target.release(row)
    return int(getattr(target, "token_bytes", None) or 1)
