"""The protocol of a backend: a language model that owns rows of KV slots.

A row holds a committed prefix and, after it, provisional nodes: a chain or a tree. `extend` adds
nodes and scores them, `commit` keeps a path of them and drops the rest. Prefill is `extend` with a
chain and `commit` of all of it, so there is no third verb.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Nodes(NamedTuple):
    """Nodes to append to one row.

    Args:
        row: from `Backend.open`.
        token_ids: int [n], n >= 1.
        parents: int [n], indices into the provisional nodes of this row, counted from the last
            commit; -1 stands for the last committed token. None: a chain that goes on after the
            last provisional node.
        num_logits: return logits for this many of the last nodes, 0 or more; None: for all n.
    """

    row: int
    token_ids: Sequence[int]
    parents: Sequence[int] | None = None
    num_logits: int | None = None


class AcceptedPath(NamedTuple):
    """Provisional nodes of one row to keep: a path, in order; the others are dropped."""

    row: int
    nodes: Sequence[int]


class Backend(Protocol):
    """A language model with rows of KV slots.

    Guarantee: logits of a node depend on its own path only, up to rounding; rows do not see each
    other.
    """

    @property
    def name(self) -> str:
        """Short name, such as "eager"."""
        ...

    @property
    def vocab_size(self) -> int:
        """Columns of the logits."""
        ...

    @property
    def capacity(self) -> int:
        """Slots of one row: committed tokens and provisional nodes together."""
        ...

    @property
    def device(self) -> torch.device:
        """Device of the logits."""
        ...

    def open(self) -> int:
        """Returns a new, empty row."""
        ...

    def extend(self, rows: Sequence[Nodes]) -> list[Tensor]:
        """Appends provisional nodes; returns logits [n or num_logits, V] per entry.

        Raises:
            CapacityError: the nodes do not fit; nothing was appended.
            ArgumentError: an unknown row, a row named twice, a parent that does not exist.
        """
        ...

    def commit(self, rows: Sequence[AcceptedPath]) -> None:
        """Keeps these provisional nodes, in order, and drops all others of these rows.

        Raises:
            ArgumentError: nodes that are not a path from the committed prefix.
        """
        ...

    def length(self, row: int) -> int:
        """Returns the number of committed tokens."""
        ...

    def truncate(self, row: int, length: int) -> None:
        """Drops provisional nodes and committed tokens past `length`."""
        ...

    def release(self, row: int) -> None:
        """Forgets the row and frees its slots."""
        ...


def __getattr__(name: str) -> type[AcceptedPath]:
    if name == "Kept":  # as it was called up to version 0.1; see `redwood._moved`
        return AcceptedPath
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
