"""A backend by table, so that engines and drafters can be tried without a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from redwood.backends.base import AcceptedPath, Nodes
from redwood.errors import ArgumentError, CapacityError, check_count


@dataclass
class _Row:
    """Committed tokens, then the provisional nodes and their parents."""

    text: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)

    def path(self, node: int) -> list[int]:
        """The provisional nodes from the text to this one."""
        nodes: list[int] = []
        while node >= 0:
            nodes.append(node)
            node = self.parents[node]
        return nodes[::-1]


class TableBackend:
    """A `Backend` whose logits after a text are a fixed random row for its last few tokens.

    It holds the protocol strictly: what no engine or drafter may do raises. Two of the same seed
    and order are the same model, another seed gives a drafter that is often wrong.

    Args:
        vocab_size: tokens, 2 or more.
        seed: of the table.
        capacity: slots of one row.
        spread: standard deviation of the logits; at 0 all tokens are as probable.
        order: tokens of the text that its logits depend on.

    Attributes:
        num_rows: rows that are open.

    Raises:
        ArgumentError: a size out of range.
    """

    name = "table"
    page_slots = 4  # see `SharingBackend`
    token_bytes = 1
    batch_invariant = True
    device = torch.device("cpu")

    def __init__(
        self,
        vocab_size: int = 12,
        *,
        seed: int = 0,
        capacity: int = 64,
        spread: float = 2.0,
        order: int = 2,
    ) -> None:
        check_count("vocab_size", vocab_size, least=2)
        check_count("capacity", capacity)
        check_count("order", order, least=0)
        self.vocab_size, self.capacity = vocab_size, capacity
        self._seed, self._spread, self._order = seed, spread, order
        self._table: dict[tuple[int, ...], Tensor] = {}
        self._rows: dict[int, _Row] = {}
        self._opened = 0

    @property
    def num_rows(self) -> int:
        """Rows that are open."""
        return len(self._rows)

    def logits(self, text: Sequence[int]) -> Tensor:
        """Returns the logits after a text, float32 [V]."""
        last = tuple(text[len(text) - min(len(text), self._order) :])
        if last not in self._table:
            rng = np.random.default_rng([self._seed, *(token + 1 for token in last)])
            values = self._spread * rng.normal(size=self.vocab_size)
            self._table[last] = torch.tensor(values, dtype=torch.float32)
        return self._table[last]

    def open(self) -> int:
        """Returns a new, empty row."""
        self._opened += 1
        self._rows[self._opened] = _Row()
        return self._opened

    def length(self, row: int) -> int:
        """Returns the number of committed tokens."""
        return len(self._row(row).text)

    def extend(self, rows: Sequence[Nodes]) -> list[Tensor]:
        """Appends provisional nodes and scores them; see `Backend.extend`."""
        if len({nodes.row for nodes in rows}) < len(rows):
            raise ArgumentError("extend: a row is named twice")
        for nodes in rows:
            row, new = self._row(nodes.row), len(nodes.token_ids)
            if not new or not all(0 <= token < self.vocab_size for token in nodes.token_ids):
                raise ArgumentError(f"extend: tokens must be in 0..{self.vocab_size - 1}")
            if len(row.text) + len(row.tokens) + new > self.capacity:
                raise CapacityError(f"{new} nodes do not fit into {self.capacity} slots")
            first = len(row.tokens)
            for node, parent in enumerate(nodes.parents or (), start=first):
                if not -1 <= parent < node:
                    raise ArgumentError(f"extend: node {node} has no parent {parent}")
        return [self._extended(nodes) for nodes in rows]

    def _extended(self, nodes: Nodes) -> Tensor:
        row, new = self._row(nodes.row), len(nodes.token_ids)
        first = len(row.tokens)
        row.tokens += nodes.token_ids
        row.parents += range(first - 1, first - 1 + new) if nodes.parents is None else nodes.parents
        count = new if nodes.num_logits is None else nodes.num_logits
        scored = [
            self.logits([*row.text, *(row.tokens[node] for node in row.path(last))])
            for last in range(len(row.tokens) - count, len(row.tokens))
        ]
        return torch.stack(scored) if scored else torch.empty(0, self.vocab_size)

    def commit(self, rows: Sequence[AcceptedPath]) -> None:
        """Keeps a path of provisional nodes per row; see `Backend.commit`."""
        for kept in rows:
            row, nodes = self._row(kept.row), list(kept.nodes)
            if nodes and (nodes[-1] >= len(row.tokens) or row.path(nodes[-1]) != nodes):
                raise ArgumentError(f"commit: {nodes} is no path of row {kept.row}")
        for kept in rows:
            row = self._row(kept.row)
            text = [*row.text, *(row.tokens[node] for node in kept.nodes)]
            self._rows[kept.row] = _Row(text)

    def truncate(self, row: int, length: int) -> None:
        """Drops provisional nodes and committed tokens past `length`."""
        self._rows[row] = _Row(self._row(row).text[:length])

    def fork(self, row: int, length: int) -> int:
        """Returns a row with the first `length` committed tokens of another."""
        text = self._row(row).text
        if not 0 <= length <= len(text):
            raise ArgumentError(f"fork: length {length} is not in 0..{len(text)}")
        made = self.open()
        self._rows[made] = _Row(text[:length])
        return made

    def pages(self, rows: Sequence[int]) -> int:
        """Returns how many pages these rows hold; none is shared."""
        return sum(-(-len(self._row(row).text) // self.page_slots) for row in rows)

    def park(self, row: int) -> None:
        """Does nothing: a row that only stays takes no more than its text."""
        self._row(row)

    def release(self, row: int) -> None:
        """Forgets the row."""
        self._row(row)
        del self._rows[row]

    def _row(self, row: int) -> _Row:
        if row not in self._rows:
            raise ArgumentError(f"row {row} is not open")
        return self._rows[row]
