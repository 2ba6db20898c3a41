"""Options of kept tables: whether a drafter has one, and how large it may be."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from redwood.cli.options import given, wrong
from redwood.drafters.names import TABLE, split_names

NO_TABLE = "no drafter has a table: --drafter auto, or table joined with others"
_SIZE = re.compile(r"(\d{1,12}(?:\.\d{1,12})?) ?([kmgtKMGT]?)(i?)[bB]?")


def has_table(drafter: str) -> bool:
    """Whether a drafter of this name has a table of what the target said."""
    return TABLE in split_names(drafter)


def size_of(option: str, text: str) -> int:
    """Returns the bytes of a size such as 64MiB."""
    found = _SIZE.fullmatch(text.strip())
    if not found:
        raise wrong(option, f"{text!r} is not a size such as 64MiB")
    power = " kmgt".index((found[2] or " ").lower())
    return int(float(found[1]) * (1024 if found[3] or not found[2] else 1000) ** power)


def kept_table(options: dict[str, Any], drafters: Sequence[str]) -> dict[str, Any]:
    """Takes the options of the table out of others; returns them as `redwood.load` has them.

    Raises:
        typer.BadParameter: a table where no drafter has one, a size that is none.
    """
    path, size = options.pop("table", None), options.pop("table_size", None)
    if path is None and size is None:
        return {}
    if not any(map(has_table, drafters)):
        raise wrong("--table" if path is not None else "--table-size", NO_TABLE)
    return given(table=path, table_bytes=None if size is None else size_of("--table-size", size))
