"""Where the nodes of a draft tree come from: for people, no rule of verification reads it."""

from __future__ import annotations

from enum import IntFlag


class Source(IntFlag):
    """What named a node's token, as bits; several may have. Others may be added.

    TEXT: the text itself. DATASTORE: stored texts. TABLE: the target's own earlier rows.
    PREDICTION: the answer that the caller expects. MODEL: a draft model. GRAMMAR: what a constraint
    forces, or nearly so.
    """

    TEXT = 1
    DATASTORE = 2
    TABLE = 4
    PREDICTION = 8
    MODEL = 16
    GRAMMAR = 32


def source_names(bits: int) -> list[str]:
    """Returns the names of sources in lower case, in the order of `Source`; others are left out."""
    return [str(source.name).lower() for source in Source if bits & source]
