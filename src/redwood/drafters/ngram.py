"""The n-gram drafter (SSSD): candidates from the text itself and from datastores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from redwood.algorithms.acceptance import (
    AcceptanceTable,
    learn_below,
    ngram_prior,
    store_bin,
    store_prior,
)
from redwood.algorithms.sssd import (
    AnyIndex,
    Candidate,
    Rated,
    candidate_tree,
    likely_tree,
    text_index,
)
from redwood.datastore import Datastore
from redwood.datastore.chunk import Chunk
from redwood.datastore.search import LONGEST_MATCH, Continuations, look_up
from redwood.drafters.context import Context
from redwood.drafters.limits import NO_LIMITS, Limits
from redwood.errors import ArgumentError, check_count
from redwood.tree import TokenTree, children_of

_STORED = 1  # number of the datastore among the sources of a tree; the text itself is 0


class NgramDrafter:
    """POINT nodes from earlier occurrences in the text, from datastores, or from both in one tree.

    The order of nodes is learned: every node has a bin (source, match length, share), and the
    acceptance rate of a bin is learned in this text and over all texts. A request whose text must
    depend on its seed alone (a seed without coupling) gets the published, fixed priorities, and no
    datastore of `attach`, which may grow.

    Args:
        max_branch: children per node at most, 1 or more.
        datastore: text to draft from beside the request's own, one or several.
        own_text: whether prompt and output are drafted from.

    Attributes:
        reliability: acceptance rates by bin over all texts, with which each text begins: of
            candidates from the text itself, or from the datastore where that is the only source.
        store_reliability: the same of the datastore's candidates where the text is a source, too.

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
    ) -> None:
        check_count("max_branch", max_branch)
        stores = (datastore,) if isinstance(datastore, Datastore) else tuple(datastore)
        if not own_text and not stores:
            raise ArgumentError("a drafter that leaves the text out needs a datastore")
        self.name = "+".join(["ngram"] * own_text + ["index"] * bool(stores))
        self.max_branch, self.datastores, self.own_text = max_branch, stores, own_text
        self._chunks = _chunks_of(stores)
        self._attached: dict[int, tuple[Chunk, ...]] = {}
        self._texts: dict[int, _Text] = {}
        self.reliability = AcceptanceTable(ngram_prior() if own_text else store_prior())
        self.store_reliability = AcceptanceTable(store_prior())

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

    def attach(self, key: int, datastores: Sequence[Datastore]) -> None:
        """Adds datastores for one request, until it is released.

        For a server that keeps the answers of each user apart: to be called before the request's
        first step.
        """
        self._attached[key] = _chunks_of(datastores)

    def release(self, key: int) -> None:
        """Forgets the request's index, and what was attached to it."""
        self._texts.pop(key, None)
        self._attached.pop(key, None)

    def _tree(self, context: Context, budget: int, least: float) -> TokenTree:
        text = context.token_ids
        known = self._texts.get(context.key)
        if known is None:
            tables = [table.child() for table in self._tables()]
            known = self._texts[context.key] = _Text(tables)
        news = text[known.length :]
        known.length = len(text)
        if self.own_text:
            known.index.extend(news)
        suffix = text[-LONGEST_MATCH:]
        if context.unsteered:
            stored = self._look_up(context, self._chunks, budget)
            found = candidate_tree(
                known.index,
                suffix,
                budget,
                max_branch=self.max_branch,
                continuations=stored.token_lists(),
            )
            return TokenTree.point(
                [text[-1], *(c.token_id for c in found)], [-1, *(c.parent for c in found)]
            )
        known.learn(news, self._tables())
        rates, store_rates = (table.rates for table in known.tables)
        chunks, others = self._chunks + self._attached.get(context.key, ()), list[Rated]()
        if chunks:
            others.append(Rated(self._look_up(context, chunks, budget), store_rates, store_bin))
        found = likely_tree(
            known.index,
            suffix,
            budget,
            rates,
            max_branch=self.max_branch,
            others=others,
            least=least,
        )
        known.drafted = found
        return TokenTree.point(
            [text[-1], *(c.token_id for c in found)],
            [-1, *(c.parent for c in found)],
            [1.0, *(c.priority for c in found)],
        )

    def _look_up(self, context: Context, chunks: Sequence[Chunk], budget: int) -> Continuations:
        if budget == 1 or not chunks:
            return Continuations([])
        return look_up(chunks, context.token_ids[-LONGEST_MATCH:], vocab_size=context.vocab_size)

    def _tables(self) -> list[AcceptanceTable]:
        """By source: of the text, of the datastore."""
        alone = not self.own_text
        return [self.reliability, self.reliability if alone else self.store_reliability]


@dataclass
class _Text:
    """The state of one request; tables by source."""

    tables: list[AcceptanceTable]
    index: AnyIndex = field(default_factory=text_index)
    length: int = 0
    drafted: list[Candidate] = field(default_factory=list)

    def learn(self, news: Sequence[int], everyone: Sequence[AcceptanceTable]) -> None:
        """Counts which nodes of the last tree were accepted, and forgets the tree."""
        if not self.drafted:
            return
        children = children_of([-1, *(c.parent for c in self.drafted)])
        tokens = [-1, *(c.token_id for c in self.drafted)]
        for source, tables in enumerate(zip(self.tables, everyone, strict=True)):
            bins = [-1, *(c.bin if c.source == source else -1 for c in self.drafted)]
            learn_below(news, children.__getitem__, tokens, bins, tables)
        self.drafted = []


def _chunks_of(datastores: Sequence[Datastore]) -> tuple[Chunk, ...]:
    return tuple(chunk for store in datastores for chunk in store.chunks)


def join_ngrams(drafters: Sequence[NgramDrafter]) -> NgramDrafter:
    """Returns one drafter with the sources and the tables of all.

    One search then orders all their candidates by path probability, where a union would give each
    a share of the budget.

    Args:
        drafters: at least one.
    """
    stores = [store for drafter in drafters for store in drafter.datastores]
    joined = NgramDrafter(
        max(drafter.max_branch for drafter in drafters),
        datastore=list(dict.fromkeys(stores)),
        own_text=any(drafter.own_text for drafter in drafters),
    )
    for drafter in reversed(drafters):  # the first one's tables are kept
        if drafter.own_text == joined.own_text:
            joined.reliability = drafter.reliability
        if drafter.datastores:
            joined.store_reliability = drafter._tables()[_STORED]
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
