"""Drafters by name. Imports nothing, so that the command line can refuse a wrong name at once."""

from __future__ import annotations

from collections.abc import Iterable

NONE, NGRAM, TABLE = "none", "ngram", "table"
AUTO = "auto"
"""All that costs nothing: the text itself, and the table of the target's own rows."""
INDEX = "index:"
"""Before the folder of a datastore, where a drafter is named."""


def split_names(joined: str) -> list[str]:
    """Returns the parts of names that are joined with "+"; "" where one is missing."""
    parts = []
    for part in joined.split("+"):
        parts += [NGRAM, TABLE] if part == AUTO else [part]
    return parts


def model_names(parts: Iterable[str]) -> list[str]:
    """Returns the parts that are models, each once, in order."""
    return [
        part
        for part in dict.fromkeys(parts)
        if part not in ("", NONE, NGRAM, TABLE, AUTO) and not part.startswith(INDEX)
    ]
