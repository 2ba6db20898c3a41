"""The protocol of drafters, plain decoding, and unions. A tree states how each node was drawn.

A drafter keeps its own state per request and follows the committed text: it gets no message about
accepted nodes, so any drafter can be part of any union.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from redwood.algorithms.specinfer import merge_trees
from redwood.algorithms.successors import AnyTable
from redwood.datastore import Datastore
from redwood.drafters.context import Context
from redwood.drafters.limits import NO_LIMITS, Limits
from redwood.drafters.model import ModelDrafter
from redwood.drafters.ngram import NgramDrafter, join_ngrams, open_datastore_drafter
from redwood.drafters.proposing import prefill as prefill
from redwood.drafters.proposing import proposals, release
from redwood.errors import ArgumentError
from redwood.tree import TokenTree

__all__ = [
    "Context",
    "Drafter",
    "ModelDrafter",
    "NgramDrafter",
    "NoDrafter",
    "UnionDrafter",
    "open_datastore_drafter",
]


class Drafter(Protocol):
    """Proposes trees below the last token of each context.

    A faulty drafter costs drafts, never an answer: where it raises, or its trees cannot be
    verified, the step is plain decoding, and the log says why.
    """

    @property
    def name(self) -> str:
        """Short name for tables."""
        ...

    @property
    def draws(self) -> bool:
        """Whether nodes are drawn; such trees come first in a union."""
        ...

    def propose(self, contexts: Sequence[Context], budgets: Sequence[int]) -> list[TokenTree]:
        """Returns a tree per context, of at most `budget` >= 1 nodes, the root included.

        A drafter with a third parameter, `limits`, gets what the planner allows in this step; see
        `redwood.drafters.limits`.
        """
        ...

    def release(self, key: int) -> None:
        """Forgets a request; unknown keys are fine."""
        ...


class NoDrafter:
    """Plain decoding: a tree is its root."""

    name = "none"
    draws = False

    def propose(
        self, contexts: Sequence[Context], budgets: Sequence[int], limits: Limits = NO_LIMITS
    ) -> list[TokenTree]:
        """Returns roots."""
        return [TokenTree.chain(context.token_ids[-1:]) for context in contexts]

    def release(self, key: int) -> None:
        """Does nothing."""


class UnionDrafter:
    """Several drafters in one tree (SpecInfer's merge): drawn nodes first, then POINT nodes.

    Args:
        drafters: at least one; they propose in this order, those that draw before the others. Each
            gets an equal part of the budget; what one does not use goes to those after it.

    Attributes:
        parts: the drafters, those that draw first.
    """

    draws = True

    def __init__(self, drafters: Sequence[Drafter]) -> None:
        if not drafters:
            raise ArgumentError("a union needs drafters")
        self.parts = sorted(drafters, key=lambda drafter: not drafter.draws)
        self.name = "+".join(d.name for d in drafters)

    def propose(
        self, contexts: Sequence[Context], budgets: Sequence[int], limits: Limits = NO_LIMITS
    ) -> list[TokenTree]:
        """Returns merged trees within the budgets."""
        merged = NoDrafter().propose(contexts, budgets)
        free = self._free_trees(contexts, budgets, limits)
        if free:
            guesses = map(merge_trees, zip(*free.values(), strict=True))
            keys = [context.key for context in contexts]
            limits = replace(limits, guesses=dict(zip(keys, guesses, strict=True)))
        for i, drafter in enumerate(self.parts):
            if i in free:
                merged = [merge_trees(pair) for pair in zip(merged, free[i], strict=True)]
                continue
            remaining = len(self.parts) - i
            sizes = [
                1 + (budget - len(tree)) // remaining
                for budget, tree in zip(budgets, merged, strict=True)
            ]
            trees = proposals(drafter, contexts, sizes, limits)
            merged = [merge_trees(pair) for pair in zip(merged, trees, strict=True)]
        return merged

    def _free_trees(
        self, contexts: Sequence[Context], budgets: Sequence[int], limits: Limits
    ) -> dict[int, list[TokenTree]]:
        """By part, the trees of those that draw nothing: models guess from them.

        Empty where limits are given: there the sizes of these trees depend on what models leave.
        """
        free = dict[int, list[TokenTree]]()
        if limits is not NO_LIMITS or not any(isinstance(p, ModelDrafter) for p in self.parts):
            return free
        rest = [budget - 1 for budget in budgets]
        for i, part in enumerate(self.parts):
            shares = [nodes // (len(self.parts) - i) for nodes in rest]
            rest = [nodes - share for nodes, share in zip(rest, shares, strict=True)]
            if not part.draws:
                free[i] = proposals(part, contexts, [1 + share for share in shares], limits)
        return free

    def prefill(self, contexts: Sequence[Context]) -> None:
        """Prefills the parts that have a prefill."""
        for part in self.parts:
            prefill(part, contexts)

    def release(self, key: int) -> None:
        """Forgets the request everywhere."""
        for drafter in self.parts:
            release(drafter, key)


def parts_of(drafter: Drafter) -> list[Drafter]:
    """Returns the drafters of a union, or the drafter itself."""
    return list(getattr(drafter, "parts", [drafter]))


def draft_models(drafter: Drafter) -> list[ModelDrafter]:
    """Returns the parts that draft with a model."""
    return [part for part in parts_of(drafter) if isinstance(part, ModelDrafter)]


def observers_of(drafter: Drafter) -> list[Drafter]:
    """Returns the parts that learn from the target's rows."""
    return [part for part in parts_of(drafter) if hasattr(part, "observe")]


def attach(
    drafter: Drafter,
    key: int,
    datastores: Sequence[Datastore] = (),
    table: AnyTable | None = None,
) -> None:
    """Gives request `key` datastores or a table of its own, in every free part; see `NgramDrafter`.

    To be called before the request's first step. Does nothing without such a part.
    """
    for part in parts_of(drafter):
        if isinstance(part, NgramDrafter):
            part.attach(key, datastores, table)


def join_drafters(drafters: Sequence[Drafter]) -> Drafter:
    """Returns one drafter for all: none, the only one, or their union.

    N-gram drafters with a datastore or a table among them become one first (`join_ngrams`).
    """
    if not drafters:
        return NoDrafter()
    ngrams = [drafter for drafter in drafters if isinstance(drafter, NgramDrafter)]
    if len(ngrams) > 1 and any(d.datastores or d.table is not None for d in ngrams):
        others = [drafter for drafter in drafters if not isinstance(drafter, NgramDrafter)]
        drafters = [*others, join_ngrams(ngrams)]
    return drafters[0] if len(drafters) == 1 else UnionDrafter(drafters)
