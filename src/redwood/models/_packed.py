"""Packed weights on disk: what the native backend maps into memory, made once per source."""

import contextlib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from redwood.models import _cache

LAYOUT = 1
"""Raised when the layout of packed weights changes."""

_FILE = "weights.bin"


def packed_file(
    name: str, sources: list[Path], weights: str, size_bytes: int, write: Callable[[BinaryIO], None]
) -> Path:
    """Returns the file of packed weights, after making it if it is missing, stale or damaged.

    Args:
        name: under which `redwood models` knows the model; a folder or file of the user: its path.
        sources: the files that the weights come from; size and time of each are part of the key.
        weights: how they are packed.
        size_bytes: of the file, once it is made.
        write: writes it.

    Raises: ModelError if the disk is full or cannot be written.
    Guarantee: what was packed from earlier contents of the same source is removed.
    """
    stamps = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in sources]
    about = json.dumps([LAYOUT, weights, size_bytes, stamps])
    sha256 = hashlib.sha256(about.encode()).hexdigest()
    key = f"packed-{sha256[:16]}"
    folder = _root() / key

    def fault() -> str | None:
        return _cache.problem(folder, source_sha256=sha256, dtype=weights)

    if fault() is None:
        return folder / _FILE
    with _cache.lock(key):
        if (found := fault()) is None:
            return folder / _FILE
        if folder.exists():
            _cache.say(f"{found}; making it again")
        with _cache.workspace(key, size_bytes) as work:
            made = work / "packed"
            made.mkdir()
            with (made / _FILE).open("wb") as file:
                write(file)
            made_by = _cache.made_by("redwood")
            manifest = _cache.EntryManifest(name, str(sources[0]), sha256, weights, made_by, {})
            _cache.publish(made, folder, manifest)
            for stale in folders():
                known = _cache.read_manifest(stale)
                if stale != folder and known and _same_use(known, manifest):
                    with contextlib.suppress(OSError):  # mapped by another process, on Windows
                        stale.rename(work / stale.name)
    return folder / _FILE


def folders() -> list[Path]:
    """Returns all entries with packed weights."""
    return sorted(_root().glob("packed-*"))


def _same_use(one: _cache.EntryManifest, other: _cache.EntryManifest) -> bool:
    return (one.source, one.dtype) == (other.source, other.dtype)


def _root() -> Path:
    return _cache.cache_dir() / "packed"
