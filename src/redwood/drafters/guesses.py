"""Guesses: nodes that a draft model scores before they are drafted, in a pass that is due anyway.

A pass over a few nodes costs little more than one over a single node. So each pass of a draft model
also scores what its next levels will probably ask for; a level that was guessed needs no pass. A
node's logits do not depend on the pass that made them, so guesses change times and no tree.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from heapq import heapify, heappop, heappush
from typing import NamedTuple

from redwood.algorithms.acceptance import AcceptanceTable
from redwood.tree import TokenTree

MOST_GUESSES = 4
"""Nodes that a pass guesses at most for one row."""

NODE_COST = 0.08  # of a further node of a pass, in passes of one node, where nothing was measured
_EDGES = (0.05, 0.3, 0.6, 0.85, 0.97)  # between bins of probabilities
_BINS = len(_EDGES) + 1
_PRIOR = (0.02, 0.12, 0.35, 0.55, 0.75, 0.9)
# Of sources: given trees; the model after one, two or three tokens; the text after two or three.
_DISCOUNTS = (1.0, 0.5, 0.8, 0.9, 0.6, 0.8)
_GIVEN, _SAID, _TEXT = 0, 0, 2  # the last two: more by the number of tokens
_MOST_HELD = 1 << 16  # contexts whose continuations are remembered
_ALTERNATIVES = 2


def guess_rates() -> AcceptanceTable:
    """Returns prior rates at which guesses are used if their parents are, by source and chance."""
    return AcceptanceTable([factor * chance for factor in _DISCOUNTS for chance in _PRIOR])


class Saying(NamedTuple):
    """A token that a draft model held probable, and its probability."""

    token: int
    chance: float


class Continuations:
    """What last followed one to three tokens: in a text, or by what a draft model said.

    It holds the last 65,536 contexts; token ids and probabilities alone.

    Args:
        of_text: it holds a text, and looks at no single token.
    """

    def __init__(self, *, of_text: bool = False) -> None:
        self._after: dict[tuple[int, ...], tuple[Saying, ...]] = {}
        self._lengths = (3, 2) if of_text else (3, 2, 1)
        self._source = _TEXT if of_text else _SAID

    def note(self, path: Sequence[int], said: Sequence[Saying]) -> None:
        """Remembers the most probable tokens after the last ones of `path`; best first."""
        best, held = tuple(said[:_ALTERNATIVES]), self._after
        for length in self._lengths:
            key = tuple(path[-length:])
            held.pop(key, None)  # so that it stands at the end
            held[key] = best
        while len(held) > _MOST_HELD:
            del held[next(iter(held))]

    def after(self, path: Sequence[int]) -> list[tuple[int, int]]:
        """Returns guesses of the next token, each with its bin of `guess_rates`."""
        for length in self._lengths:
            found = self._after.get(tuple(path[-length:]))
            if found is not None and len(path) >= length:
                return [(said.token, _bin(self._source + length, said.chance)) for said in found]
        return []


class Start(NamedTuple):
    """A node of a pass, below which nodes are guessed.

    Args:
        path: its last tokens, itself the last: three, or all where there are fewer.
        levels: below it that may still be expanded.
        tree, node: guesses that were given, and the node there that spells its path; -1: none.
    """

    path: tuple[int, ...]
    levels: int
    tree: TokenTree | None = None
    node: int = -1


class Guess(NamedTuple):
    """A node to score: parents from 0 are guesses, ~i stands for the i-th start."""

    token: int
    parent: int
    bin: int


def choose_guesses(
    starts: Sequence[Start],
    known: Sequence[Continuations],
    rates: Sequence[float],
    most: int,
    *,
    due: int,
    rows: int = 1,
    times: Sequence[float] = (),
    proposed: Container[int] | None = None,
) -> list[Guess]:
    """Returns the guesses that save most time, parents before children.

    Saved is a pass for each level that was guessed, in all rows; it costs the pass that is due as
    many more nodes.

    Args:
        known: what the model said and what the text holds, to guess from beside given trees.
        rates: by bin, see `guess_rates`.
        most: guesses at most.
        due: nodes of the pass without them.
        rows: that draft together.
        times: of a pass over 1, 2, ... nodes, any unit; none: typical ones.
        proposed: tokens that the draft model proposes; None: all.
    """
    heap: list[tuple[float, int, Guess, Start]] = []
    count = 0

    def offer(start: Start, parent: int, chance: float) -> None:
        nonlocal count
        if start.levels < 1:
            return
        offers: dict[int, tuple[int, int]] = {}
        tree, node = start.tree, start.node
        if tree is not None and node >= 0:
            chances = tree.estimates
            for child in tree.children[node]:
                ratio = 0.5 if chances is None else chances[child] / max(chances[node], 1e-9)
                offers[tree.token_list[child]] = _bin(_GIVEN, ratio), child
        for token, kind in (each for source in known for each in source.after(start.path)):
            given = offers.get(token)
            if given is None or rates[given[0]] < rates[kind]:
                offers[token] = kind, -1 if given is None else given[1]
        rest = 1.0  # one of them comes next: what the best leave is shared by the others
        for token, (kind, child) in sorted(offers.items(), key=lambda o: -rates[o[1][0]]):
            if proposed is not None and token not in proposed:
                continue
            share = min(rest, rates[kind])
            rest -= share
            path = (*start.path[-2:], token)
            below = Start(path, start.levels - 1, tree, child)
            heap.append((-chance * share, count, Guess(token, parent, kind), below))
            count += 1

    for i, start in enumerate(starts):
        offer(start, ~i, 1.0)
    heapify(heap)
    chosen: list[Guess] = []
    best, saved, most_saved = 0, 0.0, 0.0
    one, first = _time(times, 1), _time(times, due)
    while heap and len(chosen) < most:
        chance, _, guess, below = heappop(heap)
        chosen.append(guess)
        saved += (-chance) ** rows * one
        gained = saved - (_time(times, due + len(chosen)) - first)
        if gained > most_saved:
            best, most_saved = len(chosen), gained
        held = len(heap)
        offer(below, len(chosen) - 1, -chance)
        more = heap[held:]
        del heap[held:]
        for entry in more:
            heappush(heap, entry)
    return chosen[:best]


def _time(times: Sequence[float], nodes: int) -> float:
    """Of a pass over so many nodes; past the known ones by the slope of the last two."""
    if len(times) < 2:
        return 1.0 + NODE_COST * (nodes - 1)
    if nodes <= len(times):
        return float(times[nodes - 1])
    return float(times[-1] + (nodes - len(times)) * (times[-1] - times[-2]))


def _bin(source: int, chance: float) -> int:
    return source * _BINS + sum(chance >= edge for edge in _EDGES)
