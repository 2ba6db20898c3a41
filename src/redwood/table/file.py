"""One table in one file, checked by a digest, replaced atomically. Layout, little-endian:

magic     8 bytes
format    uint32
size      uint32, of the header
header    JSON: the target, entries, rows, learned acceptance rates, what filled it
padding   zeros, so that entries begin at a multiple of 64 bytes
entries   64 bytes each, as `algorithms.successors.ENTRY`, the one changed longest ago first
digest    sha256 of all before it, 32 bytes
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import struct
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from rich.filesize import decimal

from redwood import __version__
from redwood._storage import sync_folder, typed
from redwood.algorithms.source_rates import LearnedRates
from redwood.algorithms.successors import ENTRY
from redwood.errors import ArgumentError, TableError, UnsupportedError
from redwood.table.target import TargetId

FORMAT = 1
_MAGIC = b"RWTABLE\0"
_START = struct.Struct("<8sII")
_DIGEST = hashlib.sha256().digest_size
_MOST_HEADER = 1 << 24


@dataclass(frozen=True)
class TableInfo:
    """The header of a file.

    Args:
        target: the model that filled it.
        entries: keys with their tokens.
        rows: of the target that were learned.
        redwood: version that wrote it.
        rates: learned acceptance rates, as `LearnedRates.to_dict`.
        filled: sources of `redwood table create` by digest, and how many of their parts are in.
    """

    target: TargetId
    entries: int
    rows: int
    redwood: str = ""
    rates: dict[str, Any] = field(default_factory=dict)
    filled: dict[str, int] = field(default_factory=dict)


class Stored(NamedTuple):
    """A file's contents: entries as bytes [N, 64]."""

    info: TableInfo
    entries: NDArray[np.uint8]


def write_table(
    path: Path,
    target: TargetId,
    entries: NDArray[np.uint8],
    rows: int,
    rates: Mapping[str, Any] | None = None,
    filled: Mapping[str, int] | None = None,
) -> None:
    """Writes a table, replacing an older file atomically; the caller holds its lock.

    Guarantee: whenever the process ends, `path` is the old table or the new one, complete.

    Args:
        target: the model that filled it.
        entries: [N, 64] from `SuccessorTable.entries`.
        rows: rows of the target that it learned from.
        rates, filled: see `TableInfo`.

    Raises:
        TableError: the disk is full, or the folder cannot be written; the old file stays.
    """
    _check_order()
    info = TableInfo(target, len(entries), rows, __version__, dict(rates or {}), dict(filled or {}))
    header = json.dumps(asdict(info), allow_nan=False).encode()
    start = _START.pack(_MAGIC, FORMAT, len(header)) + header
    start += bytes(-len(start) % ENTRY.itemsize)
    data = np.ascontiguousarray(entries).reshape(-1).data if len(entries) else memoryview(b"")
    digest = hashlib.sha256(start)
    digest.update(data)
    draft = path.with_name(f".{path.name}.part")  # overwrites what a killed writer left
    try:
        with suppress(FileNotFoundError):
            draft.unlink()
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            for part in (start, data, digest.digest()):
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            draft.unlink()
        raise _unwritten(path, error, len(start) + len(data)) from error
    except BaseException:
        with suppress(OSError):
            draft.unlink()
        raise


def _unwritten(path: Path, error: OSError, needed: int) -> TableError:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return TableError(f"cannot write {path}: {error.strerror or error}")
    free = ""
    with suppress(OSError):
        free = f", {decimal(shutil.disk_usage(path.parent).free)} are free"
    return TableError(
        f"the disk of {path} is full (it needs {decimal(needed)}{free}): the table on it is as "
        "before; free some space"
    )


def read_info(path: Path) -> TableInfo:
    """Returns the header of a table's file. Reads no entry; checks the file's size.

    Raises:
        TableError: missing, damaged, or of another version.
    """
    try:
        with path.open("rb") as file:
            return _header(path, file)[0]
    except OSError as error:
        raise _unread(path, error) from error


def read_table(path: Path, target: TargetId | None = None) -> Stored:
    """Returns a table's file, all of it checked.

    Args:
        target: the model that must have filled it; None: any.

    Raises:
        TableError: missing, damaged, of another version, or of another model.
    """
    _check_order()
    try:
        with path.open("rb") as file:
            info, begin = _header(path, file)
            if target is not None:
                _check_target(path, info.target, target)
            file.seek(0)
            data = np.fromfile(file, np.uint8)
    except OSError as error:
        raise _unread(path, error) from error
    end = len(data) - _DIGEST
    if end != begin + info.entries * ENTRY.itemsize:
        raise _damaged(path, "it changed while it was read")
    if hashlib.sha256(data[:end].data).digest() != data[end:].tobytes():
        raise _damaged(path, "its contents do not have the sha256 that stands in it")
    entries = data[begin:end].reshape(-1, ENTRY.itemsize)
    held = entries.view(ENTRY).reshape(-1)
    if not (held["tokens"] < max(info.target.vocab_size, 1)).all():
        raise _damaged(path, "it has tokens that the model does not have")
    return Stored(info, entries)


def check_file(path: Path) -> TableInfo:
    """Reads and checks everything, each entry included; returns the header.

    Raises:
        TableError: as `read_table`; also invalid entries or rates.
    """
    info, entries = read_table(path)
    held = entries.view(ENTRY).reshape(-1)
    probs = held["probs"]
    falling = (probs >= 0.0) & (probs <= 1.001)
    falling[:, 1:] &= probs[:, 1:] <= probs[:, :-1]
    if not ((held["key"] > 0) & (held["rows"] > 0) & falling.all(axis=1)).all():
        raise _damaged(path, "it has an entry that no table can hold")
    check_rates(path, info.rates, LearnedRates())
    return info


def clear_table(path: Path) -> int:
    """Replaces a table by an empty one of the same model; returns the bytes freed.

    Raises:
        TableError: missing, its header is damaged, or another process uses it.
    """
    path = path.expanduser().resolve()
    target = read_info(path).target
    guard = lock_of(path)
    try:
        guard.acquire(timeout=0)
    except Timeout as error:
        raise TableError(f"another process keeps {path}: end it first") from error
    except OSError as error:
        raise TableError(f"cannot write {path}: {error.strerror or error}") from error
    try:
        before = path.stat().st_size
        write_table(path, target, np.zeros((0, ENTRY.itemsize), np.uint8), 0)
        return before - path.stat().st_size
    finally:
        guard.release()


def lock_of(path: Path) -> FileLock:
    """Returns the writer's lock of a table's file; `path` must be resolved."""
    return FileLock(path.with_name(f".{path.name}.lock"))


def check_rates(path: Path, found: Mapping[str, Any], into: LearnedRates) -> None:
    """Loads the acceptance rates of a file, if it has any.

    Raises:
        TableError: invalid rates.
    """
    try:
        if found:
            into.load(found)
    except ArgumentError as error:
        raise _damaged(path, str(error)) from error


def _header(path: Path, file: BinaryIO) -> tuple[TableInfo, int]:
    """The header, and where entries begin; the file's size is checked."""
    start = file.read(_START.size)
    if not start.startswith(_MAGIC) or len(start) < _START.size:
        raise TableError(f"{path} is no table: `redwood table create` makes one")
    _, version, size = _START.unpack(start)
    if version != FORMAT:
        raise TableError(
            f"{path} has format {version}, and this Redwood reads {FORMAT}: use another file, or "
            "remove it"
        )
    found = os.fstat(file.fileno()).st_size
    if size > min(_MOST_HEADER, found):
        raise _damaged(path, "its header is cut")
    try:
        value = json.loads(file.read(size))
        info: TableInfo = typed(TableInfo, value, "header")
    except (ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from error
    begin = _START.size + size
    begin += -begin % ENTRY.itemsize
    whole = begin + info.entries * ENTRY.itemsize + _DIGEST
    if info.entries < 0 or info.rows < 0 or found != whole:
        raise _damaged(path, f"it has {found} bytes instead of {whole}")
    return info, begin


def _check_target(path: Path, theirs: TargetId, ours: TargetId) -> None:
    if not theirs.matches(ours):
        kind = "other weights" if theirs.tokenizer == ours.tokenizer else "another tokenizer"
        raise TableError(
            f"{path} was filled by another model, {theirs.name or 'an unnamed one'} ({kind}): give "
            f"{ours.name} a file of its own"
        )


def _damaged(path: Path, why: str) -> TableError:
    return TableError(f"{path} is damaged: {why}; remove it to begin with an empty table")


def _unread(path: Path, error: OSError) -> TableError:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return TableError(f"{path} does not exist: `redwood table create` makes a table")
    return TableError(f"cannot read {path}: {error.strerror or error}")


def _check_order() -> None:
    if sys.byteorder != "little":
        raise UnsupportedError("tables on disk need a little-endian machine")
