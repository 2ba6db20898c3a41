"""A row of a draft model's backend: provisional nodes, and the logits that are at hand of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from redwood.algorithms.acceptance import AcceptanceTable
from redwood.drafters.draft_tree import TreeBuilder
from redwood.drafters.guesses import Continuations
from redwood.tree import Law

_MOST_KEPT = 16  # rows of logits that stay until the next step
_MOST_BYTES = 1 << 24  # of a pass whose logits stay: a row's are a view of all rows' of the pass


@dataclass
class DraftRow:
    """A row of the drafter's backend, and its provisional nodes: the first by parent and token.

    Args:
        row: of the backend.
        skipped: tokens of the text, after the first few, that are not in it.

    Attributes:
        count: provisional nodes.
        below: node by parent (-1: the committed text) and token.
        scored: tensor [n, V] and row in it, by node; -1 is the last committed token.
        heard, num_read: continuations in the text, and how much of it was read for them.
        last: the tree of the last step; law and reliability are those of its request.
    """

    row: int
    skipped: int = 0
    count: int = 0
    below: dict[tuple[int, int], int] = field(default_factory=dict)
    scored: dict[int, tuple[Tensor, int]] = field(default_factory=dict)
    heard: Continuations = field(default_factory=lambda: Continuations(of_text=True))
    num_read: int = 0
    last: TreeBuilder | None = None
    law: Law | None = None
    reliability: AcceptanceTable | None = None
    _guessed: dict[int, int] = field(default_factory=dict)  # bin of each guess of this step
    _parents: list[int] = field(default_factory=list)
    _used: set[int] = field(default_factory=set)

    def add(self, parent: int, token: int) -> int:
        """Counts one more provisional node and returns its number."""
        node, self.count = self.count, self.count + 1
        self._parents.append(parent)
        self.below.setdefault((parent, token), node)
        return node

    def clear(self) -> None:
        """Forgets all provisional nodes."""
        self.below, self.scored, self.count = {}, {}, 0
        self._guessed, self._parents, self._used = {}, [], set()

    def follow(self, text: Sequence[int]) -> list[int]:
        """Returns the provisional nodes that spell the beginning of `text`."""
        path: list[int] = []
        at = -1
        for token in text:
            found = self.below.get((at, token))
            if found is None:
                break
            path.append(found)
            at = found
        return path

    def hold(self, logits: Tensor, guessed: Sequence[int]) -> None:
        """Keeps the logits [n, V] of the last n nodes; `guessed`: bins of those at the end."""
        first = self.count - len(logits)
        for i in range(len(logits)):
            self.scored[first + i] = logits, i
        for node, kind in enumerate(guessed, self.count - len(guessed)):
            self._guessed[node] = kind

    def used(self, nodes: Sequence[int]) -> Tensor:
        """Returns the logits [n, V] of scored nodes, which are expanded now."""
        self._used.update(nodes)
        parts = [self.scored[node] for node in nodes]
        if len(parts) > _MOST_KEPT:  # they are large
            for node in set(nodes):
                del self.scored[node]
        held, first = parts[0]
        if all(part[0] is held and part[1] == i for i, part in enumerate(parts, first)):
            return held[first : first + len(parts)]
        return torch.stack([table[i] for table, i in parts])

    def settle(self, keep: bool) -> list[tuple[int, bool]]:
        """Ends a step: returns the bin of each guess whose parent was expanded, and if it was, too.

        keep: a few rows of logits stay, for the case that the text goes on with their nodes.
        """
        trials = [
            (kind, node in self._used)
            for node, kind in self._guessed.items()
            if self._parents[node] in self._used
        ]
        self._guessed = {}
        if not keep or len(self.scored) > _MOST_KEPT:
            self.scored = {}
        self.scored = {
            node: (logits, i)
            for node, (logits, i) in self.scored.items()
            if logits.untyped_storage().nbytes() <= _MOST_BYTES
        }
        return trials
