"""Retrieval: one draft tree from everything that costs no model.

Sources are the text itself (prompt lookup), stored texts (SSSD, arXiv 2411.05894), the table of the
target's own rows (`algorithms.successors`) and a predicted answer. They do not make trees to be
merged: one best-first search asks all of them at every node, and a candidate that several name is
one candidate, with one acceptance rate learned from what each source knows of it.

A source describes a candidate by a cell (match length and share, probability by key length, run of
a prediction), whose acceptance rate is learned. Where more than one source knows the context, the
candidate has a joint cell as well: each source's rate by level, or that it knows the context and
does not name the token. Rates are learned over all texts and, from there, in each text. They only
steer what is drafted, and are fixed before the random numbers of a step are drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import NamedTuple, TypeAlias

from redwood.algorithms.source_rates import (
    MOST_MATCH,
    Rates,
    joint_cell,
    level,
    predicted_cell,
    prior_of,
    store_cell,
    table_cell,
    text_cell,
)
from redwood.algorithms.sssd import DECAYS, TextIndex
from redwood.algorithms.successors import AnyTable

try:
    from redwood import _native

    _native.Retriever  # noqa: B018  # an extension built from older sources lacks it
    compiled = True
except (ImportError, AttributeError):
    compiled = False

TEXT, STORE, TABLE, PREDICTED = range(4)
"""Sources; a node's sources are bits, 1 << source, as in `redwood.algorithms.sources`."""

Stored: TypeAlias = Sequence[tuple[int, Sequence[Sequence[int]]]]
"""What followed the end of a text in stored ones: match length and rows of tokens, longest first"""

_ENOUGH = 8  # candidates of the text; shorter matches are then not asked


class Retrieved(NamedTuple):
    """Nodes below the root, parents before children, the most probable paths first.

    Args:
        token_ids, parents: parent 0 is the root.
        chances: estimate that the node is accepted, its path included.
        sources: bits of the sources that named it.
    """

    token_ids: list[int]
    parents: list[int]
    chances: list[float]
    sources: list[int]


@dataclass
class _Candidate:
    token: int
    cells: list[int] = field(default_factory=lambda: [-1] * 4)
    joint: int = -1
    chance: float = 0.0


@dataclass
class _Node:
    token: int
    parent: int
    candidates: list[_Candidate] = field(default_factory=list)
    children: dict[int, int] = field(default_factory=dict)


@dataclass
class _Asked:
    """What one search asks, beside the text."""

    all: Rates
    table: AnyTable | None
    stored: Stored
    predicted: Sequence[int]
    run: int


class Retriever:
    """The search over one text. The reference of the compiled one.

    Args:
        own_text: whether the text itself is a source.

    Attributes:
        index: of the text.
    """

    def __init__(self, own_text: bool) -> None:
        self._own_text = own_text
        self.index = TextIndex()
        self._text: list[int] = []
        self._own = Rates()
        self._nodes: list[_Node] = []

    def __len__(self) -> int:
        return len(self._text)

    def extend(self, token_ids: Sequence[int], rates: Rates) -> None:
        """Appends tokens to the text.

        Those that follow the last tree count, over all texts and in this one, which candidates
        they took: all that were considered below an accepted node, drafted or not.
        """
        at = 0
        for token in token_ids if self._nodes else ():
            node = self._nodes[at]
            for each in node.candidates:
                for cell in (*each.cells, each.joint):
                    if cell >= 0:
                        rates.count(cell, each.token == token)
                        self._own.count(cell, each.token == token)
            if token not in node.children:
                break
            at = node.children[token]
        self._nodes = []
        self.index.extend(token_ids)
        self._text.extend(token_ids)

    def draft(
        self,
        size: int,
        max_branch: int,
        least: float,
        rates: Rates,
        table: AnyTable | None,
        stored: Stored,
        predicted: Sequence[int],
        run: int,
    ) -> Retrieved:
        """Returns at most `size` - 1 nodes below the end of the text, the best paths first.

        Args:
            max_branch: children of a node at most.
            least: nodes with a smaller chance are not considered.
            rates: over all texts.
            table, stored: sources.
            predicted: how the answer is believed to go on, after `run` tokens that were right.
        """
        made = Retrieved([], [], [], [])
        self._nodes = []
        if size <= 1 or not self._text:
            return made
        asked = _Asked(rates, table, stored, predicted, run)
        heap: list[tuple[float, int, int, int, _Candidate]] = []
        order = 0

        def expand(node: int, reached: float) -> None:
            nonlocal order
            path, up = list[int](), node
            while up:
                path.insert(0, self._nodes[up].token)
                up = self._nodes[up].parent
            found = self._nodes[node].candidates = self._candidates(path, asked)
            for each in found:
                order += 1
                chance = reached * each.chance
                if chance >= least:  # of equals the deeper one first, then the order of appearance
                    heappush(heap, (-chance, -len(path), order, node, each))

        self._nodes.append(_Node(self._text[-1], 0))
        expand(0, 1.0)
        while heap:
            negative, _, _, parent, taken = heappop(heap)
            children = self._nodes[parent].children
            if len(children) >= max_branch:
                continue
            node = children[taken.token] = len(self._nodes)
            made.token_ids.append(taken.token)
            made.parents.append(parent)
            made.chances.append(-negative)
            made.sources.append(sum((cell >= 0) << i for i, cell in enumerate(taken.cells)))
            self._nodes.append(_Node(taken.token, parent))
            if node == size - 1:
                break
            expand(node, -negative)
        return made

    def _candidates(self, path: Sequence[int], asked: _Asked) -> list[_Candidate]:
        """What may follow the text and `path`, with the chance that it does."""
        found: dict[int, _Candidate] = {}
        context = [*self._text[-MOST_MATCH:], *path][-MOST_MATCH:]
        knows = [
            self._own_text and self._from_text(context, found),
            _from_stored(path, asked.stored, found),
            asked.table is not None and _from_table(context, asked.table, found),
            _from_prediction(path, asked, found),
        ]
        for each in found.values():
            self._rate(each, knows, asked.all)
        return list(found.values())

    def _from_text(self, context: Sequence[int], found: dict[int, _Candidate]) -> bool:
        """All places behind the longest match, then behind shorter ones."""
        knows = False
        for group, (length, places) in enumerate(self.index.matches(context[-len(DECAYS) :])):
            if len(found) >= _ENOUGH:
                break
            knows = knows or length >= 2
            for token, behind in self.index.followers(places).items():
                match = length
                if length == len(DECAYS):
                    match = max(self._match(context, place - 1) for place in behind)
                each = _candidate(found, token)
                if each.cells[TEXT] < 0:
                    cell = text_cell(match, len(behind), len(places), longest=group == 0)
                    each.cells[TEXT] = cell
        return knows

    def _match(self, context: Sequence[int], end: int) -> int:
        """Tokens before `end` that equal the last ones of the context."""
        count = 0
        while count < min(len(context), end) and self._text[end - 1 - count] == context[-1 - count]:
            count += 1
        return count

    def _rate(self, each: _Candidate, knows: Sequence[bool], rates: Rates) -> None:
        levels = [int(known) for known in knows]
        for source, cell in enumerate(each.cells):
            if cell >= 0:
                rate = self._own.rate(cell, rates.rate(cell, prior_of(cell)))
                each.chance = max(each.chance, rate)
                levels[source] = level(rate)
        if sum(map(bool, levels)) > 1:
            each.joint = cell = joint_cell(levels)
            each.chance = self._own.rate(cell, rates.rate(cell, each.chance))


def _candidate(found: dict[int, _Candidate], token: int) -> _Candidate:
    return found.setdefault(token, _Candidate(token))


def _from_stored(path: Sequence[int], stored: Stored, found: dict[int, _Candidate]) -> bool:
    """Rows that begin with the drafted tokens."""
    knows, depth = False, len(path)
    for group, (length, rows) in enumerate(stored):
        counts: dict[int, int] = {}
        for row in rows:
            if len(row) > depth and list(row[:depth]) == list(path):
                counts[row[depth]] = counts.get(row[depth], 0) + 1
        total = sum(counts.values())
        knows = knows or total > 0
        for token, count in counts.items():
            each = _candidate(found, token)
            if each.cells[STORE] < 0:
                cell = store_cell(length + depth, count, total, longest=group == 0)
                each.cells[STORE] = cell
    return knows


def _from_table(context: Sequence[int], table: AnyTable, found: dict[int, _Candidate]) -> bool:
    """The two longest keys that the table has."""
    entries = table.find(context)[:2]
    if not entries:
        return False
    (first, best), (second, others) = entries[0], (entries[1:] or [(0, [])])[0]
    in_first, in_second = dict(best), dict(others)
    for token in (*in_first, *in_second):
        cell = table_cell(first, second, in_first.get(token, 0.0), in_second.get(token, 0.0))
        _candidate(found, token).cells[TABLE] = cell
    return True


def _from_prediction(path: Sequence[int], asked: _Asked, found: dict[int, _Candidate]) -> bool:
    """The predicted answer, while the drafted tokens follow it."""
    depth = len(path)
    if depth >= len(asked.predicted) or list(asked.predicted[:depth]) != list(path):
        return False
    each = _candidate(found, asked.predicted[depth])
    each.cells[PREDICTED] = predicted_cell(asked.run + depth)
    return True


AnyRetriever: TypeAlias = "Retriever | _native.Retriever"


def retriever(own_text: bool = True) -> AnyRetriever:
    """Returns an empty retriever: a compiled one where that was built."""
    return _native.Retriever(own_text) if compiled else Retriever(own_text)
