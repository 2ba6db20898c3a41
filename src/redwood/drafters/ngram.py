"""The free drafter: n-grams of the text and of datastores (SSSD), and the target's own rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from redwood.algorithms.retrieval import AnyRetriever, Stored, retriever
from redwood.algorithms.source_rates import LearnedRates
from redwood.algorithms.sources import Source
from redwood.algorithms.sssd import candidate_tree, text_index
from redwood.algorithms.successors import ORDERS, AnyTable
from redwood.datastore import Datastore
from redwood.datastore.chunk import Chunk
from redwood.datastore.search import LONGEST_MATCH, Continuations, look_up
from redwood.drafters.context import Context
from redwood.drafters.limits import NO_LIMITS, Limits
from redwood.errors import ArgumentError, check_count
from redwood.tree import TokenTree


class NgramDrafter:
    """POINT nodes from earlier occurrences in the text, from datastores, and from a successor
    table, in one tree; see `algorithms.retrieval`.

    The order of nodes is learned: in this text, and over all texts. A request whose text must
    depend on its seed alone (a seed without coupling) gets the published, fixed priorities, and
    neither the table nor a datastore of `attach`, which may grow.

    Args:
        max_branch: children per node at most, 1 or more.
        datastore: text to draft from beside the request's own, one or several.
        own_text: whether prompt and output are drafted from.
        table: what the target said before; it learns from every row that the target computes.

    Attributes:
        reliability: acceptance rates over all texts, with which each text begins.

    Raises:
        ArgumentError: `max_branch` out of range, or nothing to draft from.
    """

    draws = False

    def __init__(
        self,
        max_branch: int = 5,
        *,
        datastore: Datastore | Sequence[Datastore] = (),
        own_text: bool = True,
        table: AnyTable | None = None,
    ) -> None:
        check_count("max_branch", max_branch)
        stores = (datastore,) if isinstance(datastore, Datastore) else tuple(datastore)
        if not own_text and not stores and table is None:
            raise ArgumentError("a drafter that leaves the text out needs a datastore or a table")
        named = (("ngram", own_text), ("index", bool(stores)), ("table", table is not None))
        self.name = "+".join(name for name, used in named if used)
        self.max_branch, self.datastores, self.own_text = max_branch, stores, own_text
        self.table = table
        self.reliability = LearnedRates()
        self._chunks = _chunks_of(stores)
        self._attached: dict[int, _Attached] = {}
        self._texts: dict[int, AnyRetriever] = {}

    def propose(
        self, contexts: Sequence[Context], budgets: Sequence[int], limits: Limits = NO_LIMITS
    ) -> list[TokenTree]:
        """Returns trees of POINT nodes, most probable first; a bare root where nothing matches."""
        made = []
        for context, budget in zip(contexts, budgets, strict=True):
            try:
                made.append(self._tree(context, budget, limits.least))
            except BaseException:  # its index may hold half of the new tokens: it is built anew
                self._texts.pop(context.key, None)
                raise
        return made

    def attach(
        self, key: int, datastores: Sequence[Datastore] = (), table: AnyTable | None = None
    ) -> None:
        """Adds datastores for one request, or gives it a table of its own, until it is released.

        For a server that keeps the answers of each user apart: to be called before the request's
        first step. What was attached before and is not named now stays.
        """
        chunks, held = self._attached.get(key, _Attached((), None))
        self._attached[key] = _Attached(
            _chunks_of(datastores) or chunks, held if table is None else table
        )

    def observe(
        self,
        context: Context,
        tree: TokenTree,
        ids: NDArray[np.int32],
        probs: NDArray[np.float32],
    ) -> None:
        """Teaches the request's table what the target says after each node of a scored tree.

        Args:
            context: before the tree's nodes are text.
            ids, probs: [N, K], the target's best next tokens after each node, best first.
        """
        table = self._table_of(context)
        if table is not None:
            tail = context.token_ids[-1 - ORDERS : -1]
            table.learn(tail, tree.token_list, tree.parent_list, ids, probs)

    def observes(self, context: Context) -> bool:
        """Whether `observe` learns from this request."""
        return self._table_of(context) is not None

    def release(self, key: int) -> None:
        """Forgets the request's index, and what was attached to it."""
        self._texts.pop(key, None)
        self._attached.pop(key, None)

    def _table_of(self, context: Context) -> AnyTable | None:
        attached = self._attached.get(context.key)
        return self.table if attached is None or attached.table is None else attached.table

    def _tree(self, context: Context, budget: int, least: float) -> TokenTree:
        text = context.token_ids
        known = self._texts.get(context.key)
        if known is None:
            known = self._texts[context.key] = retriever(self.own_text)
        rates: Any = self.reliability.rates  # compiled, or not, as the retriever is
        known.extend(text[len(known) :], rates)
        if context.unsteered:
            return self._published_tree(context, known, budget)
        attached = self._attached.get(context.key)
        chunks = self._chunks + (attached.chunks if attached is not None else ())
        stored: Stored = self._look_up(context, chunks, budget).by_match() if chunks else ()
        predicted, run = list[int](), 0
        if context.prediction is not None:
            predicted, run = context.prediction.upcoming(budget - 1)
        table: Any = self._table_of(context)
        tokens, parents, chances, sources = known.draft(
            budget, self.max_branch, least, rates, table, stored, predicted, run
        )
        return TokenTree.point([text[-1], *tokens], [-1, *parents], [1.0, *chances], [0, *sources])

    def _published_tree(self, context: Context, known: AnyRetriever, budget: int) -> TokenTree:
        """By the priorities of the paper, which nothing that was measured or learned changes."""
        text = context.token_ids
        found = candidate_tree(
            known.index if self.own_text else text_index(),
            text[-LONGEST_MATCH:],
            budget,
            max_branch=self.max_branch,
            continuations=self._look_up(context, self._chunks, budget).token_lists(),
        )
        source = int(Source.TEXT if self.own_text else Source.DATASTORE)
        if self.own_text and self._chunks:  # it does not say which of the two
            source = 0
        return TokenTree.point(
            [text[-1], *(c.token_id for c in found)],
            [-1, *(c.parent for c in found)],
            sources=[0] + [source] * len(found),
        )

    def _look_up(self, context: Context, chunks: Sequence[Chunk], budget: int) -> Continuations:
        if budget == 1 or not chunks:
            return Continuations([])
        return look_up(chunks, context.token_ids[-LONGEST_MATCH:], vocab_size=context.vocab_size)


class _Attached(NamedTuple):
    """What one request drafts from beside what all do."""

    chunks: tuple[Chunk, ...]
    table: AnyTable | None


def _chunks_of(datastores: Sequence[Datastore]) -> tuple[Chunk, ...]:
    return tuple(chunk for store in datastores for chunk in store.chunks)


def join_ngrams(drafters: Sequence[NgramDrafter]) -> NgramDrafter:
    """Returns one drafter with the sources of all, the first table, and the rates of the first one
    that drafts from the text itself, if any does.

    One search then orders all their candidates by path probability, where a union would give each
    a share of the budget.

    Args:
        drafters: at least one.
    """
    stores = [store for drafter in drafters for store in drafter.datastores]
    tables = [drafter.table for drafter in drafters if drafter.table is not None]
    joined = NgramDrafter(
        max(drafter.max_branch for drafter in drafters),
        datastore=list(dict.fromkeys(stores)),
        own_text=any(drafter.own_text for drafter in drafters),
        table=tables[0] if tables else None,
    )
    joined.reliability = max(drafters, key=lambda drafter: drafter.own_text).reliability
    return joined


def open_datastore_drafter(path: str | Path, tokenizer: Any) -> NgramDrafter:
    """Returns the drafter `index:PATH`: a datastore alone, to be joined with others by +.

    Args:
        path: folder of the datastore.
        tokenizer: of the target.

    Raises:
        DatastoreError: missing, damaged, or of another version.
        TokenizerMismatchError: made with another tokenizer.
    """
    return NgramDrafter(datastore=Datastore.open(path, tokenizer), own_text=False)
