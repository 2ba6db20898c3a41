"""Packed weights on disk: what the native backend maps into memory, made once per source."""

import hashlib
import json
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
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
            manifest = _cache.Manifest(name, str(sources[0]), sha256, weights, _made_by(), {})
            _cache.publish(made, folder, manifest)
    return folder / _FILE


def entries_of(name: str) -> list[Path]:
    """Returns the entries that were packed for a model of this name."""
    found = []
    for folder in sorted(_root().glob("packed-*")):
        manifest = _cache.read_manifest(folder)
        if manifest is not None and manifest.name == name:
            found.append(folder)
    return found


def _root() -> Path:
    return _cache.cache_dir() / "packed"


def _made_by() -> dict[str, str]:
    try:
        return {"redwood": version("redwood")}
    except PackageNotFoundError:
        return {"redwood": "unknown"}
