"""Values as JSON files that are whole or refused: written in one step, read by their annotations.

Knows dataclasses, not what they are about; `redwood.profiling.profile` says which ones.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from redwood.errors import ArgumentError

_OPENING = '"value":\n'


def digest(text: str) -> str:
    """Returns the sha256 of a text in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_of(*paths: Path) -> str:
    """Returns the sha256 of a file in hexadecimal; of several files, that of theirs."""
    found = []
    for path in paths:
        with path.open("rb") as file:
            found.append(hashlib.file_digest(file, "sha256").hexdigest())
    return found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest()


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder reach the disk."""
    if os.name == "nt":  # folders cannot be opened there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write(path: Path, value: Any) -> None:
    """Writes a value with its digest, replacing an older file in a single step.

    Guarantee: whenever the process ends, `path` holds the old value or the new one, whole.

    Raises:
        ValueError: a number that is NaN or infinite.
        OSError: a folder that cannot be written.
    """
    body = json.dumps(value, indent=1, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, f'{{"sha256": "{digest(body)}",\n{_OPENING}{body}}}\n'.encode())


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file; see `write_parts`."""
    write_parts(path, [data])


def write_parts(path: Path, parts: Iterable[bytes]) -> None:
    """Writes a file under a temporary name, then renames it: it is there whole or not at all."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    draft = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        with suppress(OSError):
            draft.unlink()
        raise
    sync_folder(path.parent)


def read(path: Path) -> Any:
    """Returns the value in a file of `write`.

    Raises:
        OSError: a file that cannot be read.
        ValueError: one that is not what was written.
    """
    text = path.read_bytes().decode("utf-8")
    try:
        whole = json.loads(text, parse_constant=_refuse)
        start, end = text.index(_OPENING) + len(_OPENING), text.rindex("}")
        stored = whole["sha256"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArgumentError("it is not whole JSON") from error
    if digest(text[start:end]) != stored:
        raise ArgumentError("its contents do not have the digest that stands in it")
    return whole["value"]


def _refuse(name: str) -> Any:
    raise ArgumentError(f"{name} is not a number")


def typed(kind: Any, value: Any, place: str) -> Any:
    """Returns a JSON value as what an annotation says.

    Args:
        kind: a dataclass, or what annotates its fields: numbers, text, containers, `X | None`.
        place: what the value is called in errors.

    Raises:
        ArgumentError: another type, NaN, a field that is missing or unknown.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin is UnionType:
        if value is None and NoneType in inner:
            return None
        return typed(next(each for each in inner if each is not NoneType), value, place)
    if is_dataclass(kind) and isinstance(value, Mapping):
        return _read_fields(kind, value, place)
    if origin is dict and isinstance(value, Mapping):
        return {
            _read_name(inner[0], name, place): typed(inner[1], entry, f"{place}.{name}")
            for name, entry in value.items()
        }
    if origin in (list, tuple) and isinstance(value, list):
        return origin(typed(inner[0], each, f"{place}[{i}]") for i, each in enumerate(value))
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and number and abs(value) <= sys.float_info.max:
        return float(value)
    if kind in (int, str) and type(value) is kind:
        return value
    raise ArgumentError(f"{place} must not be {str(value)[:40]!r}")


def _read_fields(kind: Any, value: Mapping[str, Any], place: str) -> Any:
    hints = get_type_hints(kind)
    known = {entry.name: entry for entry in fields(kind)}
    if odd := value.keys() - known.keys():
        raise ArgumentError(f"{place} has no field {min(odd)!r}")
    for name, entry in known.items():
        if name not in value and entry.default is MISSING and entry.default_factory is MISSING:
            raise ArgumentError(f"{place}.{name} is missing")
    return kind(
        **{name: typed(hints[name], each, f"{place}.{name}") for name, each in value.items()}
    )


def _read_name(kind: Any, name: str, place: str) -> Any:
    if kind is not int:
        return name
    if not name.isdecimal():
        raise ArgumentError(f"{place} must not have the name {name[:40]!r}")
    return int(name)
