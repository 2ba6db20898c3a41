"""Drafters: whatever proposes a token tree. The tree says how each node was drawn.

A drafter keeps what it needs per request and finds its way by the text alone: nothing tells it
which nodes were accepted, so any drafter can stand in any union.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from redwood.algorithms.dynamic import Reliability, learn, ngram_prior
from redwood.algorithms.specinfer import merge_trees
from redwood.algorithms.sssd import Candidate, TextIndex, candidate_tree, likely_tree
from redwood.context import Context
from redwood.errors import ArgumentError, check_count
from redwood.model_drafter import ModelDrafter
from redwood.tree import TokenTree

__all__ = ["Context", "Drafter", "ModelDrafter", "NgramDrafter", "NoDrafter", "UnionDrafter"]


class Drafter(Protocol):
    """Proposes trees below the last token of each context."""

    @property
    def name(self) -> str:
        """Short name for tables."""
        ...

    @property
    def draws(self) -> bool:
        """Whether nodes are drawn; such trees come first in a union."""
        ...

    def propose(self, contexts: Sequence[Context], budgets: Sequence[int]) -> list[TokenTree]:
        """Returns a tree per context, of at most `budget` >= 1 nodes, the root included."""
        ...

    def release(self, key: int) -> None:
        """Forgets a request; unknown keys are fine."""
        ...


class NoDrafter:
    """Plain decoding: a tree is its root."""

    name = "none"
    draws = False

    def propose(self, contexts: Sequence[Context], budgets: Sequence[int]) -> list[TokenTree]:
        """Returns roots."""
        return [TokenTree.chain(context.token_ids[-1:]) for context in contexts]

    def release(self, key: int) -> None:
        """Does nothing."""


class NgramDrafter:
    """POINT nodes from what the same text said before (SSSD's prompt and self-output source).

    Which nodes come first is learned: every node has a bin (match length, share), and a bin's rate
    follows what became of its nodes, in this text and before. A request whose text must depend on
    its seed alone (a seed without coupling) gets the published priorities, which learn nothing.

    Args:
        max_branch: children per node at most, 1 or more.

    Attributes:
        reliability: chance by bin over all texts; each text begins with it.
    """

    name = "ngram"
    draws = False

    def __init__(self, max_branch: int = 5) -> None:
        check_count("max_branch", max_branch)
        self._max_branch = max_branch
        self._texts: dict[int, _Text] = {}
        self.reliability = Reliability(ngram_prior())

    def propose(self, contexts: Sequence[Context], budgets: Sequence[int]) -> list[TokenTree]:
        """Returns trees of POINT nodes, most probable first; a bare root where nothing matches."""
        return [self._tree(c, budget) for c, budget in zip(contexts, budgets, strict=True)]

    def _tree(self, context: Context, budget: int) -> TokenTree:
        text = context.token_ids
        known = self._texts.get(context.key)
        if known is None:
            known = self._texts[context.key] = _Text(TextIndex(), self.reliability.child())
        index, suffix = known.index, text[-4:]
        news = text[len(index) :]
        index.extend(news)
        if context.unsteered:
            found = candidate_tree(index, suffix, budget, max_branch=self._max_branch)
            return TokenTree.point(
                [text[-1], *(c.token_id for c in found)], [-1, *(c.parent for c in found)]
            )
        known.learn(news, self.reliability)
        rates = known.reliability.rates
        found = likely_tree(index, suffix, budget, rates, max_branch=self._max_branch)
        known.drafted = found
        return TokenTree.point(
            [text[-1], *(c.token_id for c in found)],
            [-1, *(c.parent for c in found)],
            [1.0, *(c.priority for c in found)],
        )

    def release(self, key: int) -> None:
        """Forgets the request's index."""
        self._texts.pop(key, None)


@dataclass
class _Text:
    """What an n-gram drafter keeps of one request."""

    index: TextIndex
    reliability: Reliability
    drafted: list[Candidate] = field(default_factory=list)

    def learn(self, news: Sequence[int], everyone: Reliability) -> None:
        """Notes what became of the last tree, which is then forgotten."""
        learn(
            news,
            [-1, *(c.parent for c in self.drafted)],
            [-1, *(c.token_id for c in self.drafted)],
            [-1, *(c.bin for c in self.drafted)],
            (self.reliability, everyone),
        )
        self.drafted = []


class UnionDrafter:
    """Several drafters in one tree (SpecInfer's merge): drawn nodes first, then POINT nodes.

    Args:
        drafters: at least one; they propose in this order, those that draw before the others.
        shares: budget of each, in nodes below the root; None: equal parts. What an earlier drafter
            leaves unused goes to the later ones.

    Attributes:
        parts: the drafters, those that draw first.
    """

    draws = True

    def __init__(self, drafters: Sequence[Drafter], shares: Sequence[int] | None = None) -> None:
        if not drafters or (shares is not None and len(shares) != len(drafters)):
            raise ArgumentError("a union needs drafters, and a share for each or none")
        for share in shares or ():
            check_count("share", share, least=0)
        order = sorted(range(len(drafters)), key=lambda i: not drafters[i].draws)
        self.parts = [drafters[i] for i in order]
        self._shares = None if shares is None else [shares[i] for i in order]
        self.name = "+".join(d.name for d in drafters)

    def propose(self, contexts: Sequence[Context], budgets: Sequence[int]) -> list[TokenTree]:
        """Returns merged trees within the budgets."""
        merged = NoDrafter().propose(contexts, budgets)
        for i, drafter in enumerate(self.parts):
            rooms = [budget - len(tree) for budget, tree in zip(budgets, merged, strict=True)]
            left = len(self.parts) - i
            if self._shares is None:
                parts = [room // left for room in rooms]
            else:
                last = left == 1
                parts = [room if last else min(room, self._shares[i]) for room in rooms]
            trees = drafter.propose(contexts, [1 + part for part in parts])
            merged = [merge_trees(pair) for pair in zip(merged, trees, strict=True)]
        return merged

    def prefill(self, contexts: Sequence[Context]) -> None:
        """Lets the parts that read texts beforehand do so."""
        for part in self.parts:
            prefill(part, contexts)

    def release(self, key: int) -> None:
        """Forgets the request everywhere."""
        for drafter in self.parts:
            drafter.release(key)


def prefill(drafter: Drafter, contexts: Sequence[Context]) -> None:
    """Lets a drafter with a `prefill` read texts that are new to it, before it is timed."""
    read = getattr(drafter, "prefill", None)
    if read is not None:
        read(contexts)


def join_drafters(drafters: Sequence[Drafter]) -> Drafter:
    """Returns one drafter for all: none, the only one, or their union."""
    if not drafters:
        return NoDrafter()
    return drafters[0] if len(drafters) == 1 else UnionDrafter(drafters)
