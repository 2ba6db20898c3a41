"""Options of drafting tables kept in files: whether a drafter has one, and how large it may be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from redwood.cli.options import given, wrong
from redwood.drafters.names import TABLE, split_names
from redwood.errors import ArgumentError

NO_TABLE = "no drafter has a table: --drafter auto, or table joined with others"


def has_table(drafter: str) -> bool:
    """Whether a drafter of this name has a table of the target's own output."""
    return TABLE in split_names(drafter)


def size_of(option: str, text: str) -> int:
    """Returns the bytes of a size such as 64MiB."""
    from redwood.backends.offload.backend import parse_bytes

    try:
        return parse_bytes(text)
    except ArgumentError as error:
        raise wrong(option, f"{text!r} is not a size such as 64MiB") from error


def kept_table(options: dict[str, Any], drafters: Sequence[str]) -> dict[str, Any]:
    """Removes the options of the table from `options`; returns them as `redwood.load` names them.

    Raises:
        typer.BadParameter: no drafter has a table, or the size is invalid.
    """
    path, size = options.pop("table", None), options.pop("table_size", None)
    if path is None and size is None:
        return {}
    if not any(map(has_table, drafters)):
        raise wrong("--table" if path is not None else "--table-size", NO_TABLE)
    return given(table=path, table_bytes=None if size is None else size_of("--table-size", size))
