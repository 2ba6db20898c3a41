"""The folder of a datastore: its writer's lock, leftover files, its removal."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from rich.filesize import decimal

from redwood.datastore.store import LOCK, MANIFEST, Manifest
from redwood.errors import DatastoreError

_WAIT_S = 600.0  # for another writer


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Holds the writer's lock of a datastore's folder; the system frees it when its process ends.

    Raises:
        DatastoreError: another writer does not end, or the folder cannot be written.
    """
    guard = FileLock(path / LOCK)
    try:
        with explained(path):
            guard.acquire(timeout=_WAIT_S)
    except Timeout as error:
        raise DatastoreError(
            f"another process has been writing to {path} for {_WAIT_S:.0f} s: try again later"
        ) from error
    try:
        yield
    finally:
        guard.release()


def clean(path: Path, manifest: Manifest) -> None:
    """Removes files that the manifest does not name; those that are in use, the next time."""
    used = [chunk.file for chunk in manifest.chunks]
    with suppress(OSError):
        for entry in list(path.iterdir()):
            if is_leftover(entry.name, used):
                with suppress(OSError):
                    os.unlink(entry)


@contextmanager
def explained(path: Path, needed_bytes: int = 0) -> Iterator[None]:
    """Turns an OSError about the disk into a DatastoreError that says what to do."""
    try:
        yield
    except Timeout:
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            message = f"cannot write to {path}: {error.strerror or error}"
            raise DatastoreError(message) from error
        needed = f" (a chunk needs up to {decimal(needed_bytes)})" if needed_bytes else ""
        with suppress(OSError):
            needed += f", {decimal(shutil.disk_usage(path).free)} are free"
        raise DatastoreError(
            f"the disk of {path} is full{needed}: the datastore is as before; free some space"
        ) from error


def remove(path: str | Path) -> int:
    """Removes a datastore; returns the bytes that were freed.

    The manifest is removed first: after an interruption the rest is no datastore any more, and a
    second call removes it. Open snapshots stay readable.

    Raises:
        DatastoreError: it is no datastore, has foreign files in it, or cannot be removed.
    """
    path = Path(path)
    if not path.is_dir():
        raise DatastoreError(f"{path} is no datastore: there is nothing to remove")
    strangers = foreign_files(path)
    if strangers:
        raise DatastoreError(
            f"{path} holds {strangers[0]!r}, which is no part of a datastore: remove it yourself"
        )
    with writing(path):
        freed = sum(file.stat().st_size for file in path.iterdir())
        discard(path)
    shutil.rmtree(path, ignore_errors=True)  # some systems cannot delete an open lock file
    if path.exists():
        raise DatastoreError(f"cannot remove all of {path}: remove the folder yourself")
    return freed


def discard(path: Path) -> None:
    """Removes a datastore's folder as far as possible, the manifest first."""
    with suppress(OSError):
        (path / MANIFEST).unlink(missing_ok=True)
    if not (path / MANIFEST).exists():
        shutil.rmtree(path, ignore_errors=True)


def foreign_files(path: Path) -> list[str]:
    """Returns the names of files in a folder that do not belong to a datastore."""
    return sorted(entry.name for entry in path.iterdir() if not _is_ours(entry.name))


def _is_ours(name: str) -> bool:
    return name in (MANIFEST, LOCK) or is_leftover(name, ())


def is_leftover(name: str, used: Sequence[str]) -> bool:
    """Whether a file of this name is a chunk that is unused or incomplete."""
    finished = name.endswith(".chunk") and name not in used
    return finished or (name.startswith(".") and name.endswith(".tmp")) or _is_draft(name)


def _is_draft(name: str) -> bool:
    return name.startswith(f".{MANIFEST}.")
