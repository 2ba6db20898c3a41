"""Adds guesses to the passes of a draft model, and learns how often they were right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from redwood.backends.base import Backend, Nodes
from redwood.drafters.context import Context
from redwood.drafters.draft_row import DraftRow
from redwood.drafters.draft_tree import TreeBuilder
from redwood.drafters.guesses import (
    Continuations,
    Saying,
    Start,
    choose_guesses,
    guess_rates,
)
from redwood.drafters.vocabulary import DraftVocabulary
from redwood.tree import TokenTree

_MOST_READ = 4096  # tokens of a prompt, the last ones, that are guessed from


class PassSize(NamedTuple):
    """A pass without further guesses: its nodes, its rows, and the time of 1, 2, ... nodes."""

    nodes: int
    rows: int
    pass_ms: Sequence[float]


class Guesser:
    """Guesses for one draft model: from given trees, from the text, and from what it said before.

    Args:
        backend: of the draft model.
        most: nodes guessed at most in a pass for one row; 0: none.
        vocabulary: tokens that it proposes.

    Attributes:
        num_guesses, num_hits: nodes guessed so far, and those of these that drafting came to.
    """

    def __init__(self, backend: Backend, most: int, vocabulary: DraftVocabulary) -> None:
        self._backend, self._most, self._tokens = backend, most, vocabulary.tokens
        self._said, self._rates = Continuations(), guess_rates()
        self.num_guesses = self.num_hits = 0

    def serves(self, context: Context) -> bool:
        """Whether nodes of this request are guessed.

        Nothing but its seed may change an unsteered text, not even sums that round otherwise.
        """
        exact = getattr(self._backend, "batch_invariant", False)
        return self._most > 0 and (exact or not context.unsteered)

    def add(
        self,
        new: Nodes,
        growing: TreeBuilder,
        nodes: Sequence[int],
        row: DraftRow,
        given: TokenTree | None,
        levels: int,
        room: int,
        size: PassSize,
    ) -> tuple[Nodes, list[int]]:
        """Returns the nodes of a row in a pass with guesses behind them, and the bin of each guess.

        Args:
            new: what is due, the last nodes of the row.
            growing, nodes: the tree, and those of its nodes that are expanded next.
            given: a tree to guess from, below the last token.
            levels: that a dynamic tree may still grow below these nodes.
            room: slots of the row that the tree leaves free in any case.
        """
        context = growing.context
        held = self._backend.length(row.row) + row.count + self._most
        if len(nodes) > self._most or held > room or not self.serves(context):
            return new, []
        text = context.token_ids
        if given is not None and given.token_list[0] != text[-1]:
            given = None
        starts = []
        for node in nodes:
            path = growing.path(node)
            scored = growing.place[node] in row.scored
            below = 0 if scored else growing.levels_below(node, levels)
            at = -1 if given is None else _find(given, path)
            starts.append(Start((*text[-3:], *path)[-3:], below, given, at))
        guesses = choose_guesses(
            starts,
            [row.heard, self._said],
            self._rates.rates,
            self._most,
            due=size.nodes,
            rows=size.rows,
            times=size.pass_ms,
            proposed=self._tokens,
        )
        if not guesses:
            return new, []
        self.num_guesses += len(guesses)
        first, tokens = row.count - len(new.token_ids), list(new.token_ids)
        parents = list(range(first - 1, row.count - 1) if new.parents is None else new.parents)
        made = list[int]()
        for guess in guesses:
            above = growing.place[nodes[~guess.parent]] if guess.parent < 0 else made[guess.parent]
            made.append(row.add(above, guess.token))
            tokens.append(guess.token)
            parents.append(above)
        due = len(new.token_ids) if new.num_logits is None else new.num_logits
        return Nodes(new.row, tokens, parents, due + len(guesses)), [g.bin for g in guesses]

    def note(self, growing: TreeBuilder, nodes: Sequence[int]) -> None:
        """Remembers what the model said after these nodes, which were expanded."""
        if self._most == 0:
            return
        text = growing.context.token_ids
        for node in nodes:
            self._said.note((*text[-3:], *growing.path(node)), growing.said[node])

    def read(self, row: DraftRow, text: Sequence[int]) -> None:
        """Remembers what is new of the text of a row."""
        if self._most == 0:
            return
        for end in range(max(row.num_read, len(text) - _MOST_READ, 1), len(text)):
            row.heard.note(text[max(0, end - 3) : end], (Saying(text[end], 1.0),))
        row.num_read = len(text)

    def learn(self, trials: Sequence[tuple[int, bool]]) -> None:
        """Counts guesses by bin, and whether drafting came to them; see `DraftRow.settle`."""
        for kind, hit in trials:
            self._rates.count(kind, hit)
            self.num_hits += hit


def _find(tree: TokenTree, path: Sequence[int]) -> int:
    """The node of a tree whose path from below the root has these tokens; -1: none."""
    at = 0
    for token in path:
        at = next((c for c in tree.children[at] if tree.token_list[c] == token), -1)
        if at < 0:
            break
    return at
