"""One chunk: the tokens of many documents and their suffix array, in one file that never changes.

The array is made by libdivsufsort (pydivsufsort); a file is memory-mapped and searched in place.
Layout, little-endian, every part at a multiple of 64 bytes:

    header    magic, format, bytes of a value, number of values, number of distinct values
    values    uint16 or uint32 [N]: token id + 1; 0 ends a document, and so the last value is 0
    suffixes  uint32 [N]: start positions of the suffixes, in their sorted order
    distinct  uint32 [D]: the values that occur, ascending
    starts    uint32 [D + 1]: index in `suffixes` of the first suffix that begins with each of them

Which chunks a datastore has is `store`'s business.
"""

from __future__ import annotations

import hashlib
import os
import struct
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from redwood._storage import sync_folder
from redwood.errors import ArgumentError, DatastoreError, UnsupportedError
from redwood.models.mapping import mapped

END = 0  # ends a document; no token is stored as 0
MOST_VALUES = 1 << 29  # of a chunk: four bytes each must fit the sorter's 32 bits
MOST_TOKEN = (1 << 24) - 2
_MAGIC = b"RWCHUNK\0"
_FORMAT = 1
_HEADER = struct.Struct("<8sIIQQ")
_ALIGN = 64

Values = NDArray[np.uint32]


class ChunkFile(NamedTuple):
    """A chunk file that was written: size in bytes, mtime in ns, digest in hexadecimal."""

    num_values: int
    size_bytes: int
    mtime_ns: int
    sha256: str


class _Part(NamedTuple):
    offset: int
    size: int
    dtype: str


def suffix_array(values: Values) -> Values:
    """Returns the suffix array of `values`, uint32 [N].

    Sorts the values as big-endian bytes and keeps the suffixes that begin at a value. Values are
    replaced by their ranks, so that two bytes each suffice for most texts. About 5 million values
    per second.

    Raises:
        UnsupportedError: pydivsufsort is not installed.
    """
    divsufsort = check_sorter()
    present = np.bincount(values) > 0
    ranks = np.cumsum(present) - 1
    width = next(size for size in (1, 2, 4) if ranks[-1] < 256**size)
    as_bytes = ranks.astype(f">u{width}")[values].view(np.uint8)
    order = divsufsort(as_bytes)
    made: Values = (order[order % width == 0] // width).astype(np.uint32)
    return made


def check_sorter() -> Callable[[NDArray[np.uint8]], NDArray[np.int32]]:
    """Returns the function that sorts suffixes of bytes.

    Raises:
        UnsupportedError: pydivsufsort is not installed.
    """
    try:
        from pydivsufsort import divsufsort
    except ImportError as error:
        raise UnsupportedError(
            "building a datastore needs pydivsufsort: pip install 'redwood[index]'"
        ) from error
    sort: Callable[[NDArray[np.uint8]], NDArray[np.int32]] = divsufsort
    return sort


def write_chunk(path: Path, values: Values) -> ChunkFile:
    """Writes a chunk with these values to a file that does not exist yet.

    Guarantee: whenever the process ends, there is no file of this name, or a complete one.

    Args:
        values: uint32 [N], 1 <= N <= MOST_VALUES, the last one END.

    Raises:
        OSError: the disk is full, or the folder cannot be written. Nothing is left behind.
    """
    width = 2 if int(values.max()) < 1 << 16 else 4
    distinct, counts = _count(values)
    starts = np.concatenate(([0], np.cumsum(counts)))
    parts = [values.astype(f"<u{width}"), suffix_array(values)]
    parts += [distinct.astype("<u4"), starts.astype("<u4")]
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    digest = hashlib.sha256()
    try:
        with draft.open("wb") as file:
            header = _HEADER.pack(_MAGIC, _FORMAT, width, len(values), len(distinct))
            for data in (memoryview(header), *(part.data.cast("B") for part in parts)):
                for piece in (data, bytes(-len(data) % _ALIGN)):
                    file.write(piece)
                    digest.update(piece)
            file.flush()
            os.fsync(file.fileno())
        status = draft.stat()
        draft.replace(path)
    except BaseException:
        with suppress(OSError):
            draft.unlink()
        raise
    sync_folder(path.parent)
    return ChunkFile(len(values), status.st_size, status.st_mtime_ns, digest.hexdigest())


def chunk_bytes(num_values: int) -> int:
    """Returns the most bytes that a chunk of `num_values` values takes."""
    return 16 * num_values + 5 * _ALIGN


class Chunk:
    """A chunk file mapped into memory. Safe to read from several threads.

    Raises:
        DatastoreError: the file is missing, or is no chunk of this size.
    """

    def __init__(self, path: Path, num_values: int, size_bytes: int) -> None:
        if sys.byteorder != "little":
            raise UnsupportedError("datastores need a little-endian machine")
        try:
            with path.open("rb") as file:
                found = os.fstat(file.fileno()).st_size
                if found != size_bytes:
                    raise DatastoreError(
                        f"{path} has {found} bytes instead of {size_bytes}: "
                        "it was damaged or not copied whole"
                    )
                self._map = mapped(file)
        except OSError as error:
            raise DatastoreError(f"cannot read {path}: {error.strerror or error}") from error
        places = _layout(path, self._map, num_values)
        self.path = path
        self.values = self._view(places[0])
        self.suffixes = self._view(places[1])
        # Reading Python ints from a memoryview is three times as fast as from an array.
        self._values, self._suffixes = self.values.data, self.suffixes.data
        self._distinct = self._view(places[2]).data
        self._starts = self._view(places[3]).data

    def __len__(self) -> int:
        return len(self.values)

    def find(self, gram: Sequence[int]) -> tuple[int, int]:
        """Returns (first, end) of the suffixes that begin with these values. O(len(gram) log N).

        Args:
            gram: values, that is token ids + 1; one at least.
        """
        at = bisect_left(self._distinct, gram[0])
        if at == len(self._distinct) or self._distinct[at] != gram[0]:
            return 0, 0
        # Bounded, so that a damaged table gives wrong drafts at worst.
        first, end = (min(self._starts[i], len(self.values)) for i in (at, at + 1))
        if len(gram) > 1:
            values, length, rest = self._values, len(gram), list(gram[1:])

            def behind(place: int) -> list[int]:
                return values[place + 1 : place + length].tolist()

            first = bisect_left(self._suffixes, rest, first, end, key=behind)
            end = bisect_right(self._suffixes, rest, first, end, key=behind)
        return first, max(first, end)

    def behind(self, ranks: NDArray[np.int64], skip: int, count: int) -> NDArray[Any]:
        """Returns `count` values of each of these suffixes, after the first `skip`: [R, count].

        A row is valid up to its first END; at the end of the chunk it is padded with END.
        """
        places = self.suffixes[ranks].astype(np.int64)[:, None] + np.arange(skip, skip + count)
        made: NDArray[Any] = self.values[np.minimum(places, len(self.values) - 1)]
        return made

    def problem(self) -> str | None:
        """Returns what is wrong with the suffix array, None if nothing is. Reads all, O(N)."""
        order = self.suffixes.astype(np.int64)
        if int(self.values.max()) > MOST_TOKEN + 1:
            return "it has a token that cannot be"
        if not np.array_equal(np.sort(order), np.arange(len(order))) or self.values[-1] != END:
            return "its suffixes are no permutation"
        rank = np.full(len(order) + 1, -1)
        rank[order] = np.arange(len(order))
        heads = self.values[order].astype(np.int64)
        rising = np.diff(heads)
        after = rank[order + 1]  # a suffix is its first value and the next suffix
        if not ((rising > 0) | ((rising == 0) & (np.diff(after) > 0))).all():
            return "its suffixes are not in order"
        distinct, counts = _count(self.values)
        starts = np.concatenate(([0], np.cumsum(counts)))
        if not (
            np.array_equal(np.asarray(self._distinct), distinct)
            and np.array_equal(np.asarray(self._starts), starts)
        ):
            return "its table of first values is wrong"
        return None

    def _view(self, part: _Part) -> NDArray[Any]:
        return np.frombuffer(self._map, np.dtype(part.dtype), part.size, part.offset)


def _layout(path: Path, data: Any, num_values: int) -> list[_Part]:
    """The parts of a chunk file, checked against its size."""
    if len(data) >= _HEADER.size:
        magic, version, width, count, num_distinct = _HEADER.unpack_from(data)
        if magic == _MAGIC and version != _FORMAT:
            raise DatastoreError(f"{path} has format {version}; this Redwood reads {_FORMAT}")
        if magic == _MAGIC and width in (2, 4) and count == num_values > 0:
            offset, parts = _ALIGN, []
            sizes = ((count, width), (count, 4), (num_distinct, 4), (num_distinct + 1, 4))
            for number, size in sizes:
                parts.append(_Part(offset, number, f"<u{size}"))
                offset += number * size
                offset += -offset % _ALIGN
            if offset == len(data):
                return parts
    raise DatastoreError(f"{path} is no chunk of a datastore, or a damaged one")


def _count(values: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The distinct values, ascending, and how often each occurs. O(N + largest)."""
    counts = np.bincount(values)
    distinct = np.flatnonzero(counts)
    return distinct, counts[distinct]


def as_values(token_ids: Sequence[int] | NDArray[Any]) -> Values:
    """Returns a document as a chunk stores it: every token id + 1, then END.

    Raises:
        ArgumentError: not all of them are integers from 0 to MOST_TOKEN.
    """
    try:
        given = np.asarray(token_ids if len(token_ids) else np.empty(0, np.int64))
    except (TypeError, ValueError, OverflowError) as error:
        raise ArgumentError(f"a document must be a list of token ids: {error}") from error
    if given.ndim != 1 or given.dtype.kind not in "iu":
        raise ArgumentError("a document must be a list of token ids, whole numbers")
    if len(given) and not 0 <= int(given.min()) <= int(given.max()) <= MOST_TOKEN:
        odd = int(given.min()) if given.min() < 0 else int(given.max())
        raise ArgumentError(f"token {odd} of a document must be from 0 to {MOST_TOKEN}")
    made = np.full(len(given) + 1, END, np.uint32)
    made[:-1] = given.astype(np.int64) + 1
    return made
