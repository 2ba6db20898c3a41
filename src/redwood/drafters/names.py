"""Drafters by name. Imports nothing, so that the command line can refuse a wrong name at once."""

from __future__ import annotations

from collections.abc import Iterable

NONE, NGRAM = "none", "ngram"
INDEX = "index:"
"""Before the folder of a datastore, where a drafter is named."""


def split_names(joined: str) -> list[str]:
    """Returns the parts of names that are joined with "+"; "" where one is missing."""
    return joined.split("+")


def model_names(parts: Iterable[str]) -> list[str]:
    """Returns the parts that are models, each once, in order."""
    return [
        part
        for part in dict.fromkeys(parts)
        if part not in ("", NONE, NGRAM) and not part.startswith(INDEX)
    ]
