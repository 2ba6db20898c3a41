"""Pieces of a file, read ahead in the order in which a forward uses them.

A few buffers take turns: while one piece is used, the next ones are read. Reads go past the page
cache, so that the memory a model takes is what it says. Some pieces may stay in memory, spread
evenly, so that reading and computing overlap all the way.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from redwood.errors import ModelError

PAGE = 4096
"""Offsets of pieces are multiples of this, as reads past the page cache ask for."""
_READERS = 2  # the disk has the next read at hand when one ends


class Span(NamedTuple):
    """Where a piece is in the file: a multiple of PAGE, and its bytes."""

    offset: int
    size: int


class _Ahead(NamedTuple):
    """A piece on its way into a buffer."""

    piece: int
    done: Future[None]
    buffer: Tensor


class Stream:
    """The pieces of a file, in turn.

    Args:
        path: whole pages long.
        spans: by number of piece.
        buffers: pieces in memory beside those that stay, at least 2.
        pinned: memory that a GPU copies from without help.

    Raises:
        ModelError: a file that cannot be opened or is shorter than its pieces.
    """

    def __init__(
        self, path: Path, spans: Sequence[Span], *, buffers: int = 4, pinned: bool = False
    ) -> None:
        self.path, self._spans, self._pinned = path, spans, pinned
        handle, self._direct = _opened(path, max((s.offset + s.size for s in spans), default=0))
        self._handle = handle
        self.largest = _pages(max((s.size for s in spans), default=0))
        """Bytes of a buffer."""
        self._count, self._made = buffers, 0
        self._free: list[Tensor] = []
        self._order = list(range(len(spans)))
        self._place = list(range(len(spans)))
        self._used: list[int] = []
        self._next = 0  # place in the order of what is read next
        self._ahead: deque[_Ahead] = deque()
        self._keep: frozenset[int] = frozenset()
        self._held: dict[int, Tensor] = {}
        self._addresses: set[int] = set()  # of these
        self.left_out: frozenset[int] = frozenset()
        """Pieces that stay elsewhere."""
        self._lent: set[int] = set()  # of these, those that are there by now
        self._threads = ThreadPoolExecutor(_READERS, "redwood-read")
        weakref.finalize(self, _close, self._threads, handle)
        self.bytes_read = 0
        """Bytes read since the stream was made."""

    @property
    def total_bytes(self) -> int:
        """Bytes of all pieces."""
        return sum(span.size for span in self._spans)

    def streamed_spans(self) -> list[Span]:
        """Returns what every forward reads, in order."""
        return [self._spans[piece] for piece in self._order if piece not in self._keep]

    @property
    def kept_bytes(self) -> int:
        """Bytes of the pieces that stay in memory, once they have been read."""
        return self.size_of(self._keep)

    def size_of(self, pieces: Iterable[int]) -> int:
        """Returns the bytes that these pieces take in memory."""
        return sum(_pages(self._spans[piece].size) for piece in pieces)

    @property
    def held_bytes(self) -> int:
        """Bytes of the pieces that are in memory now, buffers not counted."""
        return sum(_pages(len(held)) for held in self._held.values())

    @property
    def buffer_bytes(self) -> int:
        """Bytes that the buffers take once all are in use."""
        return self._count * self.largest

    @property
    def made_bytes(self) -> int:
        """Bytes that the buffers take now."""
        return self._made * self.largest

    def keep(self, room: int) -> None:
        """Lets as many pieces stay in memory as fit into `room` bytes, and no more."""
        self._keep = self.evenly(room)
        for piece in set(self._held) - self._keep:
            self._addresses.remove(self._held.pop(piece).data_ptr())

    def evenly(self, room: int) -> frozenset[int]:
        """Returns pieces that fit into `room` bytes, as evenly over a forward as may be."""
        sizes = [_pages(span.size) for span in self._spans]
        share, due, chosen = min(1.0, max(0.0, room / max(1, sum(sizes)))), 0.0, set()
        for piece in self._order:
            due += share * sizes[piece]
            if due >= sizes[piece] or share == 1.0:
                chosen.add(piece)
                due -= sizes[piece]
        return frozenset(chosen)

    def leave_out(self, pieces: frozenset[int]) -> None:
        """Reads these no more once they have been lent: they stay elsewhere."""
        self.left_out = pieces
        self._lent &= pieces

    def pass_by(self, index: int) -> None:
        """Notes that a piece that stays elsewhere was used."""
        self._used.append(index)
        self._read_on()

    def is_held(self, data: Tensor) -> bool:
        """Returns whether these lent bytes stay where they are."""
        return data.data_ptr() in self._addresses

    @contextmanager
    def piece(self, index: int) -> Iterator[Tensor]:
        """Lends the bytes of a piece, uint8 [size]; they are good until the end of the block.

        Raises:
            ModelError: the disk could not read it.
        """
        self._used.append(index)
        held = self._held.get(index)
        if held is not None:
            self._read_on()
            yield held
            return
        buffer = self._take(index)
        try:
            size = self._spans[index].size
            yield buffer[:size]
            if index in self._keep and index not in self._held:
                held = self._held[index] = self._memory(size)
                held[:] = buffer[:size]
                self._addresses.add(held.data_ptr())
            if index in self.left_out:
                self._lent.add(index)
        finally:
            self._free.append(buffer)
            self._read_on()

    def end(self) -> None:
        """Ends a forward: the next one is expected to use pieces in the same order."""
        if self._used != self._order and len(set(self._used)) == len(self._used):
            rest = sorted(set(self._order) - set(self._used))
            self._order = [*self._used, *rest]
            for place, piece in enumerate(self._order):
                self._place[piece] = place
        self._used = []

    def _take(self, index: int) -> Tensor:
        """Waits for a piece. Others that were expected before it are given up."""
        while self._ahead and self._ahead[0].piece != index:
            front = self._ahead.popleft()
            if not front.done.cancel():
                front.done.exception()  # waits: the buffer is not free before that
            self._free.append(front.buffer)
        if not self._ahead:
            self._start(index)
        front = self._ahead.popleft()
        self._read_on()
        try:
            front.done.result()
        except OSError as error:
            self._free.append(front.buffer)
            raise ModelError(f"{self.path} cannot be read: {error.strerror or error}") from error
        return front.buffer

    def _read_on(self) -> None:
        """Starts reading what comes next, as far as there are buffers."""
        under_way = {ahead.piece for ahead in self._ahead}
        while len(self._ahead) < self._count - 1:
            turn = (
                self._order[(self._next + i) % len(self._order)] for i in range(len(self._order))
            )
            piece = next((p for p in turn if p not in self._held and p not in self._lent), None)
            if piece is None or piece in under_way:
                return
            self._start(piece)
            under_way.add(piece)

    def _start(self, piece: int) -> None:
        """Starts reading a piece; what follows it is next."""
        span = self._spans[piece]
        buffer = self._free.pop() if self._free else self._another()
        done = self._threads.submit(
            _read, self._handle, self._direct, buffer[: _pages(span.size)], span.offset
        )
        self._ahead.append(_Ahead(piece, done, buffer))
        self._next = self._place[piece] + 1
        self.bytes_read += span.size

    def _another(self) -> Tensor:
        self._made += 1
        return self._memory(self.largest)

    def _memory(self, size: int) -> Tensor:
        """Memory on page borders, given back to the system as soon as it is let go."""
        if self._pinned:
            return torch.empty(_pages(size) + PAGE, dtype=torch.uint8, pin_memory=True)[:size]
        return torch.frombuffer(mmap.mmap(-1, _pages(size)), dtype=torch.uint8)[:size]


def _pages(size: int) -> int:
    return -(-size // PAGE) * PAGE


def _close(threads: ThreadPoolExecutor, handle: int) -> None:
    threads.shutdown(wait=True, cancel_futures=True)
    os.close(handle)


def _read(handle: int, direct: bool, into: Tensor, offset: int) -> None:
    """Fills memory from the file, past the page cache or dropping what it left there."""
    view = memoryview(cast(Any, into.numpy()))
    while len(view):
        got = os.preadv(handle, [view], offset)
        if not got:
            raise OSError(f"it ends at byte {offset}")
        if not direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, offset, got, os.POSIX_FADV_DONTNEED)
        view, offset = view[got:], offset + got


def _opened(path: Path, least: int) -> tuple[int, bool]:
    """A handle, and whether it reads past the page cache."""
    try:
        length = path.stat().st_size
        if length < least:
            raise ModelError(f"{path} has {length} bytes instead of {least}: it was cut off")
        if hasattr(os, "O_DIRECT"):
            with suppress(OSError):  # a file system that does not know it
                handle = os.open(path, os.O_RDONLY | os.O_DIRECT)
                try:
                    os.preadv(handle, [mmap.mmap(-1, PAGE)], 0)
                    return handle, True
                except OSError:
                    os.close(handle)
        return os.open(path, os.O_RDONLY), False
    except OSError as error:
        raise ModelError(f"{path} cannot be opened: {error.strerror}") from error
