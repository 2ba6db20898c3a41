"""GGUF files: their metadata and the positions of their tensors.

A strict reader of versions 2 and 3, little-endian, over a memory map. Every number in the file is
checked against the file's size before it is used, so that a damaged or hostile file costs one
ModelError: no crash, no large allocation, no long loop. Metadata is decoded when it is asked for,
since a vocabulary takes longer to decode than all the rest. Not here: what the tensors mean, and
dequantization.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from redwood.errors import ModelError
from redwood.models.mapping import mapped

Value: TypeAlias = int | float | bool | str | list[Any]
"""A list holds values of one of the other types."""

# fmt: off
_KINDS = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 28: ("F64", 1, 8),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8),
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 22: ("IQ2_S", 256, 82),
    18: ("IQ3_XXS", 256, 98), 21: ("IQ3_S", 256, 110), 19: ("IQ1_S", 256, 50),
    29: ("IQ1_M", 256, 56), 20: ("IQ4_NL", 32, 18), 23: ("IQ4_XS", 256, 136),
    34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}
# fmt: on
BLOCKS: Mapping[str, tuple[int, int]] = {name: (n, size) for name, n, size in _KINDS.values()}
"""Per kind: the elements of a block, and its bytes."""

_SCALARS = {
    number: (form, struct.calcsize(form))
    for number, form in zip(
        (0, 1, 2, 3, 4, 5, 6, 10, 11, 12),
        ("<B", "<b", "<H", "<h", "<I", "<i", "<f", "<Q", "<q", "<d"),
        strict=True,
    )
}
_UINT32, _BOOL, _STRING, _ARRAY = 4, 7, 8, 9

_LEAST_ENTRY = 8 + 1 + 4 + 1
_LEAST_TENSOR = 8 + 1 + 4 + 8 + 4 + 8
_MOST_NAME = 65535
_MOST_TEXT = 1 << 26
_MOST_STRINGS = 1 << 24
"""Strings in all arrays together: they are walked one by one, so their number bounds the time."""


@dataclass(frozen=True)
class Tensor:
    """Position of a tensor in the file.

    kind is the name of its ggml type, such as "F32" or "Q4_K". shape has the rows first, as in
    NumPy: GGUF's ne = [in, out] is (out, in). offset counts bytes from the start of the file, size
    is in bytes; each row is a whole number of blocks.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    size: int


class GGUFFile:
    """An open GGUF file, checked in full except for the numbers in its tensors.

    Args:
        path: the file. It is mapped, not read: it must not be cut short while it is open.

    Raises:
        ModelError: not a GGUF file, a version or a byte order that is not read here, or damaged.

    Attributes:
        metadata: key to value. Strings and lists are decoded at each access; invalid UTF-8 in
            them becomes U+FFFD.
        tensors: name to Tensor, in the order of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map: mmap.mmap | None = _map(path)
        try:
            reader = _Reader(self._map, path)
            self.metadata: Mapping[str, Value] = _Metadata(self, reader.read_metadata())
            self.tensors: dict[str, Tensor] = reader.read_tensors()
        except BaseException:
            self.close()
            raise

    def data(self, name: str) -> NDArray[np.uint8]:
        """Returns the bytes of a tensor: uint8 [size], read-only, a view of the mapped file.

        The view stays good after `close`.

        Raises: ModelError if there is no tensor of that name, or the file was closed.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise ModelError(f"{self.path} has no tensor {name!r}")
        return np.frombuffer(self._mapped(), np.uint8, tensor.size, tensor.offset)

    def forget(self) -> None:
        """Gives back the memory of pages read so far, where the system can."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Unmaps the file, at once or when the last view of it is gone."""
        mapped, self._map = self._map, None
        if mapped is not None:
            try:
                mapped.close()
            except BufferError:
                pass  # a view still needs it; the last one to go unmaps it

    def _mapped(self) -> mmap.mmap:
        if self._map is None:
            raise ModelError(f"{self.path} was closed")
        return self._map

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _map(path: Path) -> mmap.mmap:
    if not path.is_file():
        raise ModelError(f"{path} is not a file")
    try:
        with path.open("rb") as file:
            return mapped(file)
    except ValueError as error:
        raise ModelError(f"{path} is not a whole GGUF file: it is empty") from error
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error


class _Later(NamedTuple):
    """A string or a list that was checked but not decoded; num is None for a string."""

    at: int
    kind: int
    num: int | None


class _Metadata(Mapping[str, Value]):
    """Decodes on access."""

    def __init__(self, file: GGUFFile, entries: dict[str, Value | _Later]) -> None:
        self._file = file
        self._entries = entries

    def __getitem__(self, key: str) -> Value:
        value = self._entries[key]
        return _decode(self._file._mapped(), value) if isinstance(value, _Later) else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries


def _decode(data: mmap.mmap, later: _Later) -> Value:
    at, kind, count = later
    if kind == _STRING:
        texts = []
        for _ in range(1 if count is None else count):
            (length,) = _U64.unpack_from(data, at)
            at += 8 + length
            texts.append(data[at - length : at].decode("utf-8", "replace"))
        return texts[0] if count is None else texts
    dtype = "?" if kind == _BOOL else _SCALARS[kind][0]
    values: list[Any] = np.frombuffer(data, dtype, count or 0, at).tolist() if count else []
    return values


_U64 = struct.Struct("<Q")


class _Reader:
    """Reads a file from front to back; every read is checked against the end."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data = data
        self._path = path
        self._end = len(data)
        self._at = 0
        self._alignment = 32
        self._strings_left = _MOST_STRINGS
        self._num_tensors, self._num_entries = self._header()

    def _fault(self, fault: str) -> ModelError:
        return ModelError(f"{self._path} is not a GGUF file that can be read: {fault}")

    def _skip(self, size: int, what: str) -> int:
        """Moves past `size` bytes and returns where they start."""
        start = self._at
        if size > self._end - start:
            raise self._fault(
                f"{what} at byte {start} takes {size} bytes and the file ends at byte {self._end}"
            )
        self._at = start + size
        return start

    def _number(self, form: str, size: int, what: str) -> Any:
        return struct.unpack_from(form, self._data, self._skip(size, what))[0]

    def _u32(self, what: str) -> int:
        return int(self._number("<I", 4, what))

    def _u64(self, what: str) -> int:
        return int(self._number("<Q", 8, what))

    def _name(self, what: str) -> str:
        length = self._u64(f"the length of {what}")
        if not 1 <= length <= _MOST_NAME:
            raise self._fault(f"{what} at byte {self._at} is {length} bytes long")
        start = self._skip(length, what)
        try:
            return self._data[start : self._at].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._fault(f"{what} at byte {start} is not UTF-8") from error

    def _header(self) -> tuple[int, int]:
        magic = self._data[self._skip(4, "the magic number") : 4]
        if magic == b"FUGG":
            raise self._fault("it is big-endian; convert it to little-endian first")
        if magic != b"GGUF":
            raise self._fault(f"it begins with {magic!r} instead of b'GGUF'")
        version = self._u32("the version")
        if version and version & 0xFFFF == 0:
            raise self._fault("it is big-endian; convert it to little-endian first")
        if version not in (2, 3):
            raise self._fault(f"its version is {version}; versions 2 and 3 are read")
        counts = self._u64("the number of tensors"), self._u64("the number of metadata entries")
        least = counts[0] * _LEAST_TENSOR + counts[1] * _LEAST_ENTRY
        if least > self._end - self._at:
            raise self._fault(
                f"{counts[0]} tensors and {counts[1]} metadata entries do not fit in the "
                f"{self._end} bytes of the file"
            )
        return counts

    def read_metadata(self) -> dict[str, Value | _Later]:
        entries: dict[str, Value | _Later] = {}
        for _ in range(self._num_entries):
            key = self._name("a metadata key")
            if key in entries:
                raise self._fault(f"the metadata key {key!r} occurs twice")
            kind = self._u32(f"the type of {key!r}")
            entries[key] = self._value(kind, key)
            if key == "general.alignment":
                self._alignment = self._checked_alignment(kind, entries[key])
        return entries

    def _checked_alignment(self, kind: int, value: Value | _Later) -> int:
        if kind != _UINT32 or not isinstance(value, int):
            raise self._fault(f"general.alignment has value type {kind} instead of uint32")
        if value < 1 or value & (value - 1):
            raise self._fault(f"general.alignment {value} is no power of two")
        return value

    def _value(self, kind: int, key: str) -> Value | _Later:
        if kind in _SCALARS:
            number: int | float = self._number(*_SCALARS[kind], f"the value of {key!r}")
            return number
        if kind == _BOOL:
            value = self._number("<B", 1, f"the value of {key!r}")
            if value > 1:
                raise self._fault(f"{key!r} is a boolean of value {value}")
            return bool(value)
        if kind == _STRING:
            start = self._at
            length = self._u64(f"the length of {key!r}")
            if length > _MOST_TEXT:
                raise self._fault(f"{key!r} is a string of {length} bytes; at most {_MOST_TEXT}")
            self._skip(length, f"the value of {key!r}")
            return _Later(start, _STRING, None)
        if kind == _ARRAY:
            return self._array(key)
        raise self._fault(f"{key!r} has the unknown value type {kind}")

    def _array(self, key: str) -> _Later:
        kind = self._u32(f"the element type of {key!r}")
        count = self._u64(f"the length of {key!r}")
        start = self._at
        if kind == _STRING:
            self._skip_strings(count, key)
        elif kind == _BOOL:
            self._skip(count, f"the list {key!r}")
            if count and np.frombuffer(self._data, np.uint8, count, start).max() > 1:
                raise self._fault(f"{key!r} has a boolean that is neither 0 nor 1")
        elif kind in _SCALARS:
            self._skip(count * _SCALARS[kind][1], f"the list {key!r}")
        elif kind == _ARRAY:
            raise self._fault(f"{key!r} is a list of lists, which no known model needs")
        else:
            raise self._fault(f"{key!r} is a list of the unknown value type {kind}")
        return _Later(start, kind, count)

    def _skip_strings(self, count: int, key: str) -> None:
        self._strings_left -= count
        if self._strings_left < 0 or count * 8 > self._end - self._at:
            raise self._fault(f"the list {key!r} cannot have {count} strings")
        at, last, data, unpack = self._at, self._end - 8, self._data, _U64.unpack_from
        for _ in range(count):
            if at > last:
                raise self._fault(f"the list {key!r} of {count} strings runs past the end")
            at += 8 + unpack(data, at)[0]
        if at > self._end:
            raise self._fault(f"the list {key!r} of {count} strings runs past the end")
        self._at = at

    def read_tensors(self) -> dict[str, Tensor]:
        """Reads the descriptions of the tensors; `read_metadata` comes first."""
        tensors: dict[str, Tensor] = {}
        for _ in range(self._num_tensors):
            tensor = self._tensor()
            if tensor.name in tensors:
                raise self._fault(f"the tensor {tensor.name!r} occurs twice")
            tensors[tensor.name] = tensor
        base = self._at + -self._at % self._alignment
        placed = {
            name: Tensor(name, t.kind, t.shape, base + t.offset, t.size)
            for name, t in tensors.items()
        }
        self._check_places(list(placed.values()))
        return placed

    def _tensor(self) -> Tensor:
        """Reads one description; its offset is still counted from the start of the data."""
        name = self._name("a tensor name")
        rank = self._u32(f"the number of dimensions of {name!r}")
        if not 1 <= rank <= 4:
            raise self._fault(f"the tensor {name!r} has {rank} dimensions; 1 to 4 are possible")
        shape = tuple(self._u64(f"the shape of {name!r}") for _ in range(rank))[::-1]
        number = self._u32(f"the type of {name!r}")
        if number not in _KINDS:
            raise self._fault(f"the tensor {name!r} has the unknown type {number}")
        kind, block, block_bytes = _KINDS[number]
        if 0 in shape or shape[-1] % block:
            raise self._fault(f"the tensor {name!r} of shape {shape} cannot be of type {kind}")
        size = shape[-1] // block * block_bytes
        for extent in shape[:-1]:
            size *= extent
        offset = self._u64(f"the offset of {name!r}")
        if offset % self._alignment:
            raise self._fault(
                f"the tensor {name!r} begins at {offset}, no multiple of {self._alignment}"
            )
        return Tensor(name, kind, shape, offset, size)

    def _check_places(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            if tensor.offset + tensor.size > self._end:
                raise self._fault(
                    f"the tensor {tensor.name!r} takes {tensor.size} bytes at byte "
                    f"{tensor.offset} and the file ends at byte {self._end}"
                )
        for first, second in pairwise(sorted(tensors, key=lambda tensor: tensor.offset)):
            if first.offset + first.size > second.offset:
                raise self._fault(f"the tensors {first.name!r} and {second.name!r} overlap")
