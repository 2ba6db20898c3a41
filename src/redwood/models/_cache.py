"""The model cache on disk: entries with a manifest, one maker at a time, nothing half written.

An entry is a folder whose `redwood.json` records size, time and sha256 of every file in it. It is
made in a temporary folder of the same file system and renamed into place. What goes into an entry
(packages, conversions) is the business of `redwood.models`.
"""

import contextlib
import errno
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import platformdirs
import safetensors
from filelock import FileLock, Timeout
from rich.filesize import decimal

from redwood._storage import sha256_of, sync_folder
from redwood.errors import ModelError

MANIFEST = "redwood.json"
FORMAT = 1
"""Raised when entries made by an older Redwood must be made again."""


def cache_dir() -> Path:
    """Returns where fetched models are kept: `$REDWOOD_CACHE`, or the user's cache folder."""
    chosen = os.environ.get("REDWOOD_CACHE")
    return (
        Path(chosen).expanduser().absolute() if chosen else platformdirs.user_cache_path("redwood")
    )


def say(message: str) -> None:
    """Writes one line for the user to stderr."""
    print(f"redwood: {message}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class FileFacts:
    """Size, mtime and digest of a file when it was written."""

    size_bytes: int
    mtime_ns: int
    sha256: str


@dataclass(frozen=True)
class EntryManifest:
    """The contents of `redwood.json`.

    source is what the entry was made from (requirements, or the path of a GGUF file); source_stamp
    is the size and mtime_ns of that path (of parts: see `stamp_of`), so that an untouched file is
    not read again.
    """

    name: str
    source: str
    source_sha256: str
    dtype: str
    made_by: dict[str, str]
    files: dict[str, FileFacts]
    source_stamp: tuple[int, int] | None = None
    format: int = FORMAT


def read_manifest(folder: Path) -> EntryManifest | None:
    """Returns the manifest of an entry, or None if it is missing or invalid."""
    try:
        fields: dict[str, Any] = json.loads((folder / MANIFEST).read_text("utf-8"))
        files = {name: FileFacts(**facts) for name, facts in fields.pop("files").items()}
        stamp = fields.pop("source_stamp")
        known = EntryManifest(**fields, files=files, source_stamp=tuple(stamp) if stamp else None)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return known if files and all(Path(name).name == name for name in files) else None


def made_by(*packages: str) -> dict[str, str]:
    """Returns the versions of these packages, for a manifest."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def write_manifest(folder: Path, manifest: EntryManifest) -> None:
    """Writes `redwood.json`, replacing an older one in a single step."""
    draft = folder / f".{MANIFEST}.{os.getpid()}"
    with draft.open("w", encoding="utf-8") as file:
        json.dump(asdict(manifest), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(folder / MANIFEST)


def problem(folder: Path, *, source_sha256: str, dtype: str, deep: bool = False) -> str | None:
    """Returns what is wrong with an entry in a clause for a message, or None.

    A file is read in full only if its time differs from the manifest's, or if deep is true; one
    that was merely touched gets its new time recorded.
    """
    if not folder.is_dir():
        return f"{folder} does not exist"
    manifest = read_manifest(folder)
    if manifest is None:
        return f"{folder / MANIFEST} is missing or unreadable"
    if (manifest.format, manifest.source_sha256, manifest.dtype) != (FORMAT, source_sha256, dtype):
        return f"{folder} was made by another version of Redwood"
    files = dict(manifest.files)
    for name, facts in manifest.files.items():
        fault, mtime_ns = _file_problem(folder / name, facts, deep)
        if fault:
            return fault
        files[name] = replace(facts, mtime_ns=mtime_ns)
    if files != manifest.files:
        with contextlib.suppress(OSError):  # a cache that cannot be written is still good to read
            write_manifest(folder, replace(manifest, files=files))
    return None


def _file_problem(path: Path, facts: FileFacts, deep: bool) -> tuple[str | None, int]:
    """Returns what is wrong with a file, or None, and its time of change."""
    try:
        status = path.stat()
        if status.st_size != facts.size_bytes:
            return f"{path} has {status.st_size} bytes instead of {facts.size_bytes}", 0
        if (deep or status.st_mtime_ns != facts.mtime_ns) and sha256_of(path) != facts.sha256:
            return f"{path} was changed after it was written (its sha256 differs)", 0
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})", 0
    fault = safetensors_problem(path) if path.suffix == ".safetensors" else None
    return fault, status.st_mtime_ns


def safetensors_problem(path: Path) -> str | None:
    """Returns why a file cannot be used as safetensors, judged by its header, or None."""
    try:
        with safetensors.safe_open(path, framework="numpy"):
            return None
    except (OSError, safetensors.SafetensorError) as error:
        return f"{path} is not a whole safetensors file ({error})"


@contextlib.contextmanager
def lock(key: str) -> Iterator[None]:
    """Holds the lock of one entry; says on stderr if it has to wait for another process."""
    path = cache_dir() / "locks" / f"{key}.lock"
    guard = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        guard.acquire(timeout=0)
    except Timeout:
        say(f"another process is preparing {key}; waiting for it to finish ({path})")
        guard.acquire()
    except OSError as error:
        raise _disk_error(error, key, 0) from error
    try:
        yield
    finally:
        guard.release()


@contextlib.contextmanager
def workspace(key: str, needed_bytes: int) -> Iterator[Path]:
    """Yields an empty folder in the cache and removes it at the end, however the end comes.

    The caller holds the lock of `key`: whatever an earlier, killed process left for it is removed.

    Raises: ModelError if the disk has less than needed_bytes free, fills up on the way, or cannot
        be written.
    """
    root = cache_dir() / "tmp" / key
    try:
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        if shutil.disk_usage(root).free < needed_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        # NOTE: a new name each time: a child of the killed process may still write to the old one.
        yield Path(tempfile.mkdtemp(dir=root))
    except OSError as error:
        raise _disk_error(error, key, needed_bytes) from error
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _disk_error(error: OSError, key: str, needed_bytes: int) -> ModelError:
    folder = cache_dir()
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return ModelError(
            f"cannot prepare {key}: {error}; the cache {folder} must be a folder you can write to "
            "(REDWOOD_CACHE chooses another one)"
        )
    with contextlib.suppress(OSError):
        free = decimal(shutil.disk_usage(folder).free)
        return ModelError(
            f"the disk of {folder} is full: {key} needs {decimal(needed_bytes)} "
            f"({needed_bytes} bytes) to be prepared and {free} are free; free some space, or set "
            "REDWOOD_CACHE to a folder on another disk"
        )
    return ModelError(f"the disk of {folder} is full: {key} needs {needed_bytes} bytes")


def publish(folder: Path, destination: Path, manifest: EntryManifest) -> None:
    """Turns a finished folder of a workspace into an entry, replacing an older one.

    Every file reaches the disk before the folder gets its name; `manifest.files` is filled in here.
    """
    files = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        status = path.stat()
        files[path.name] = FileFacts(status.st_size, status.st_mtime_ns, sha256_of(path))
    write_manifest(folder, replace(manifest, files=files))
    sync_folder(folder)
    destination.parent.mkdir(parents=True, exist_ok=True)
    if destination.exists():
        destination.rename(folder.with_name(f"old-{folder.name}"))
    folder.replace(destination)
    sync_folder(destination.parent)


def size_on_disk(folder: Path) -> int:
    """Returns the bytes of all files under a folder; 0 if there is no such folder."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # another process may be replacing the entry
            total += path.stat().st_size if path.is_file() else 0
    return total
