"""The state of a row in any backend besides its keys and values, and how rows are prefilled."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from redwood.backends.base import AcceptedPath, Backend, Nodes
from redwood.errors import ArgumentError, CapacityError

CHUNK = 512  # tokens of one forward that fills a row


class RowState:
    """Committed length, and parents and depths of the provisional nodes (-1: the prefix)."""

    def __init__(self) -> None:
        self.length = 0
        self.parents: list[int] = []
        self.depths: list[int] = []

    def grown(self, nodes: Nodes, capacity: int) -> tuple[list[int], list[int]]:
        """Returns parents and depths of all provisional nodes once `nodes` are appended.

        Raises: CapacityError, ArgumentError: see `Backend.extend`.
        """
        count, held = len(nodes.token_ids), len(self.parents)
        if self.length + held + count > capacity:
            raise CapacityError(
                f"{self.length} tokens and {held + count} nodes exceed the capacity of "
                f"{capacity} slots: raise the capacity or lower the budget"
            )
        new = list(range(held - 1, held + count - 1)) if nodes.parents is None else nodes.parents
        if count == 0 or len(new) != count:
            raise ArgumentError(f"extend: {count} tokens with {len(new)} parents")
        parents, depths = list(self.parents), list(self.depths)
        for parent in new:
            if not -1 <= parent < len(parents):
                raise ArgumentError(
                    f"extend: parent {parent} of node {len(parents)} does not exist"
                )
            parents.append(parent)
            depths.append(0 if parent < 0 else depths[parent] + 1)
        return parents, depths

    def check_path(self, kept: AcceptedPath) -> None:
        """Raises ArgumentError unless the kept nodes are a path from the committed prefix."""
        path = [-1, *kept.nodes]
        if any(
            not 0 <= node < len(self.parents) or self.parents[node] != parent
            for parent, node in zip(path, path[1:], strict=False)
        ):
            raise ArgumentError(f"commit: {list(kept.nodes)} is not a path of row {kept.row}")

    def moved(self, nodes: Sequence[int]) -> list[int]:
        """Returns the slots of kept nodes that must move, if these are to close up: the last ones.

        Those before them stand behind the prefix already.
        """
        first = next((i for i, node in enumerate(nodes) if node != i), len(nodes))
        return [self.length + node for node in nodes[first:]]

    def keep(self, count: int) -> None:
        """Counts `count` nodes, which stand behind the prefix by now, as committed."""
        self.length, self.parents, self.depths = self.length + count, [], []

    def cut(self, length: int) -> None:
        """Drops provisional nodes and committed tokens past `length`; ArgumentError if it grew."""
        if not 0 <= length <= self.length:
            raise ArgumentError(f"truncate: length {length} is not in 0..{self.length}")
        self.length, self.parents, self.depths = length, [], []


def check_distinct(rows: Sequence[Nodes]) -> None:
    """Raises ArgumentError if one forward names a row twice."""
    if len({nodes.row for nodes in rows}) != len(rows):
        raise ArgumentError("extend: a row is named twice")


def readable(backend: Backend, tokens: Sequence[int]) -> list[int]:
    """Returns the tokens, with 0 for those beyond a drafter's vocabulary, maybe the smaller one."""
    size = getattr(backend, "num_embeddings", backend.vocab_size)
    return [token if token < size else 0 for token in tokens]


def reusable(backend: Backend, row: int, length: int) -> int:
    """Returns how many of the first `length` tokens of a row a fork has without reading them again.

    All of them, but for backends whose rows have states that stand at some lengths alone.
    """
    known: Callable[[int, int], int] | None = getattr(backend, "reusable", None)
    return length if known is None else known(row, length)


def fill(backend: Backend, row: int, tokens: Sequence[int]) -> None:
    """Commits tokens behind what a row holds, a chunk at a time."""
    for start in range(0, len(tokens), CHUNK):
        chunk = readable(backend, tokens[start : start + CHUNK])
        backend.extend([Nodes(row, chunk, num_logits=0)])
        backend.commit([AcceptedPath(row, range(len(chunk)))])
