"""Pieces of a file, read ahead in the order in which a forward uses them.

A few buffers take turns: while one piece is used, the next ones are read. Reads go past the page
cache, so that the memory a model takes is what it says. Some pieces may stay in memory, spread
evenly, so that reading and computing overlap all the way.

Of some groups of pieces a forward needs a few, such as the experts that it chose: reading stops
before such a group until it is said which, and then goes on with them.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections import OrderedDict, deque
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
        groups: of pieces that are read only when they are announced.

    Raises:
        ModelError: a file that cannot be opened or is shorter than its pieces.
    """

    def __init__(
        self,
        path: Path,
        spans: Sequence[Span],
        *,
        buffers: int = 4,
        pinned: bool = False,
        groups: Sequence[Sequence[int]] = (),
    ) -> None:
        self.path, self._spans, self._pinned = path, spans, pinned
        handle, self._direct = _opened(path, max((s.offset + s.size for s in spans), default=0))
        self._handle = handle
        self.largest = _pages(max((s.size for s in spans), default=0))
        """Bytes of a buffer."""
        self._count, self._made = buffers, 0
        self._free: list[Tensor] = []
        self._some = frozenset(piece for group in groups for piece in group)
        # Of a group there is -1 less its number in the order, in the place of its pieces.
        gates = {min(group): ~number for number, group in enumerate(groups)}
        self._order = [
            gates.get(piece, piece)
            for piece in range(len(spans))
            if piece in gates or piece not in self._some
        ]
        self._place = {entry: place for place, entry in enumerate(self._order)}
        self._used: list[int] = []
        self._announced: deque[int] = deque()
        self._next = 0  # place in the order of what is read next
        self._ahead: deque[_Ahead] = deque()
        self._keep: frozenset[int] = frozenset()
        self._held: dict[int, Tensor] = {}
        self._room = self._taken = 0  # bytes for pieces of groups that stay; of those that do
        self._stayed: OrderedDict[int, int] = OrderedDict()  # those: the forward of their last use
        self._forward = 0
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
        return [
            self._spans[piece] for piece in self._order if piece >= 0 and piece not in self._keep
        ]

    @property
    def kept_bytes(self) -> int:
        """Bytes of the pieces that stay in memory, once they have been read."""
        return self.size_of(self._keep) + min(self._room, self.size_of(self._some))

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
        """Lets as many pieces stay in memory as fit into `room` bytes, and no more.

        What every forward reads comes first. Pieces of groups share what room is left: those that
        the last forwards used.
        """
        always = [piece for piece in self._order if piece >= 0]
        self._keep = self._evenly(always, room)
        self._room = max(0, room - self.size_of(self._keep))
        if len(self._keep) < len(always):
            self._room = 0
        for piece in set(self._held) - self._keep - set(self._stayed):
            self._addresses.remove(self._held.pop(piece).data_ptr())
        while self._taken > self._room:
            self._drop(next(iter(self._stayed)))

    def evenly(self, room: int) -> frozenset[int]:
        """Returns pieces that fit into `room` bytes, as evenly over a forward as may be; those of
        groups last."""
        always = self._evenly([piece for piece in self._order if piece >= 0], room)
        return always | self._evenly(sorted(self._some), room - self.size_of(always))

    def _evenly(self, pieces: Sequence[int], room: int) -> frozenset[int]:
        sizes = {piece: _pages(self._spans[piece].size) for piece in pieces}
        share, due, chosen = min(1.0, max(0.0, room / max(1, sum(sizes.values())))), 0.0, set()
        for piece in pieces:
            due += share * sizes[piece]
            if due >= sizes[piece] or share == 1.0:
                chosen.add(piece)
                due -= sizes[piece]
        return frozenset(chosen)

    def announce(self, group: int, pieces: Sequence[int]) -> None:
        """Says which pieces of a group come next, in order; no others of it are read."""
        self._used.append(~group)
        self._announced = deque(pieces)
        self._next = self._place[~group] + 1
        self._read_on()

    def leave_out(self, pieces: frozenset[int]) -> None:
        """Reads these no more once they have been lent: they stay elsewhere."""
        self.left_out = pieces
        self._lent &= pieces

    def pass_by(self, index: int) -> None:
        """Notes that a piece that stays elsewhere was used."""
        if index not in self._some:
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
        if index not in self._some:
            self._used.append(index)
        held = self._held.get(index)
        if held is not None:
            if index in self._stayed:
                self._stayed[index] = self._forward
                self._stayed.move_to_end(index)
            self._read_on()
            yield held
            return
        buffer = self._take(index)
        try:
            size = self._spans[index].size
            yield buffer[:size]
            if index not in self._held and (index in self._keep or self._stays(index)):
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
            rest = sorted(set(self._order) - set(self._used), key=self._place.__getitem__)
            self._order = [*self._used, *rest]
            self._place = {entry: place for place, entry in enumerate(self._order)}
        self._used = []
        self._announced.clear()
        self._forward += 1

    def _stays(self, index: int) -> bool:
        """Makes room for a piece of a group, if there is any but that of pieces which this forward
        or the last one used: else a layer would drop what the next one needs."""
        if index not in self._some:
            return False
        size, free = _pages(self._spans[index].size), self._room - self._taken
        leave = []
        for piece, used in self._stayed.items():
            if free >= size or used >= self._forward - 1:
                break
            free += _pages(self._spans[piece].size)
            leave.append(piece)
        if free < size:
            return False
        for piece in leave:
            self._drop(piece)
        self._stayed[index] = self._forward
        self._taken += size
        return True

    def _drop(self, piece: int) -> None:
        del self._stayed[piece]
        self._taken -= _pages(self._spans[piece].size)
        self._addresses.remove(self._held.pop(piece).data_ptr())

    def _take(self, index: int) -> Tensor:
        """Waits for a piece. Others that were expected before it are given up."""
        if index not in self._some:
            self._announced.clear()
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
            piece = self._coming()
            if piece is None or piece in under_way:
                return
            self._start(piece)
            under_way.add(piece)

    def _coming(self) -> int | None:
        """What is to be read next; None: nothing, or that is not known before a group is."""
        while self._announced and self._there(self._announced[0]):
            self._announced.popleft()
        if self._announced:
            return self._announced[0]
        for i in range(len(self._order)):
            entry = self._order[(self._next + i) % len(self._order)]
            if entry < 0:
                return None
            if not self._there(entry):
                return entry
        return None

    def _there(self, piece: int) -> bool:
        return piece in self._held or piece in self._lent

    def _start(self, piece: int) -> None:
        """Starts reading a piece; what follows it is next."""
        span = self._spans[piece]
        buffer = self._free.pop() if self._free else self._another()
        done = self._threads.submit(
            _read, self._handle, self._direct, buffer[: _pages(span.size)], span.offset
        )
        self._ahead.append(_Ahead(piece, done, buffer))
        if piece not in self._some:
            self._next = self._place[piece] + 1
        elif self._announced and self._announced[0] == piece:
            self._announced.popleft()
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
