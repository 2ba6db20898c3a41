"""The drafter that is a smaller language model: one batched forward per level of its trees."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from redwood.algorithms.acceptance import AcceptanceTable, model_prior
from redwood.algorithms.sequoia import optimal_tree
from redwood.backends.base import AcceptedPath, Backend, Nodes
from redwood.backends.rows import CHUNK, fill, readable
from redwood.drafters.context import Context
from redwood.drafters.draft_row import DraftRow
from redwood.drafters.draft_tree import TreeBuilder
from redwood.drafters.guesses import MOST_GUESSES
from redwood.drafters.guessing import Guesser, PassSize
from redwood.drafters.kept_rows import KeptRows
from redwood.drafters.limits import NO_LIMITS, LevelPolicy, Limits, ModelLimits
from redwood.drafters.vocabulary import DraftVocabulary
from redwood.errors import ArgumentError, check_count
from redwood.sampling import SamplingParams
from redwood.tree import Law, TokenTree, children_of

# Prior acceptance rates by rank, those of a good small drafter.
DEFAULT_ACCEPTANCE = (0.85, 0.07, 0.03, 0.01, 0.01, 0.01)
# Tokens a drafter draws from; the others have little mass and cost O(V) per node.
DRAFT_WIDTH = 256


class ModelDrafter:
    """A smaller language model expands trees, one batched pass per level, on its own KV.

    Args:
        backend: any backend whose tokens are the target's (checked by `redwood.load`).
        tree: parents of the static tree; its first n nodes are used for a budget of n. None: the
            optimal tree for a typical acceptance vector.
        law: how children are drawn above temperature 0: "without_replacement" (Sequoia),
            "with_replacement" (SpecInfer) or "point" (top-k). Coupled requests draw with the
            target's noise; temperature 0 takes the top-k.
        max_levels: levels at most, where no tree is given; None: 8, or a quarter of the nodes.
        width: tokens that are drawn from, the drafter's most probable ones.
        window: prompt tokens that the drafter prefills, the last ones, beside the first few; None:
            all. Fewer are cheaper and only lower acceptance rates.
        guesses: nodes that a pass may score in advance for each row, see
            `redwood.drafters.guesses`; 0: none. They change the time of drafting, and no tree.

    Attributes:
        num_passes: passes so far that drafted.
        guesser: chooses nodes that passes score in advance, and counts them.
        vocabulary: tokens that it proposes.
        acceptance: rates by rank, for the default tree.
        reliability: by law, a table of acceptance rates by draft probability, learned over all
            texts.
    """

    name = "model"
    draws = True

    def __init__(
        self,
        backend: Backend,
        tree: Sequence[int] | None = None,
        *,
        law: str = "without_replacement",
        max_levels: int | None = None,
        width: int = DRAFT_WIDTH,
        window: int | None = None,
        guesses: int = MOST_GUESSES,
    ) -> None:
        check_count("guesses", guesses, least=0)
        check_count("width", width)
        if window is not None:
            check_count("window", window)
        if max_levels is not None:
            check_count("max_levels", max_levels, least=2)
        if tree is not None:
            if not isinstance(tree, Sequence | np.ndarray):
                raise ArgumentError(f"tree {tree!r} must be a list of parents")
            TokenTree.point([0] * len(tree), tree)  # checks the shape
        self.backend = backend
        self._parents = None if tree is None else list(tree)
        self._law, self._max_levels, self._width = law_of(law), max_levels, width
        self.window = window
        self._rows: dict[int, DraftRow] = {}
        self._kept = KeptRows(backend, _SINKS)
        self._shapes: dict[tuple[int, tuple[float, ...]], list[list[int]]] = {}
        self.reliability = {law: AcceptanceTable([*model_prior(), _ANY_CHILD]) for law in Law}
        self.acceptance: Sequence[float] = DEFAULT_ACCEPTANCE
        self.vocabulary = DraftVocabulary.of(backend)
        self.guesser, self.num_passes = Guesser(backend, guesses, self.vocabulary), 0

    def is_static(self, context: Context) -> bool:
        """Returns whether the shape of this request's tree is fixed before tokens are drawn."""
        law = self._law_for(context.params)
        return self._parents is not None or law not in (Law.POINT, Law.COUPLED)

    def propose(
        self, contexts: Sequence[Context], budgets: Sequence[int], limits: Limits = NO_LIMITS
    ) -> list[TokenTree]:
        """Returns trees drawn from this model; one forward per level for all contexts.

        After an error, the next call continues from the committed text.
        """
        try:
            return self._propose(contexts, budgets, limits)
        except BaseException:
            for context in contexts:
                self._forget_drafts(context.key)
            raise

    def _propose(
        self, contexts: Sequence[Context], budgets: Sequence[int], limits: Limits
    ) -> list[TokenTree]:
        own = limits.models.get(self, ModelLimits())
        pairs = zip(contexts, budgets, strict=True)
        growing = [self._begin(context, budget, own) for context, budget in pairs]
        level = 0
        while chosen := self._chosen(growing, level, own.policy):
            self._score(chosen, level, limits, own)
            for g, nodes in chosen:
                row = self._row(g.context)
                g.expand(level, nodes, row.used([g.place[node] for node in nodes]), self._width)
                self.guesser.note(g, nodes)
            level += 1
        for g in growing:
            self.guesser.learn(self._row(g.context).settle(self.guesser.serves(g.context)))
        return [g.finish() for g in growing]

    def _score(
        self,
        chosen: Sequence[tuple[TreeBuilder, list[int]]],
        level: int,
        limits: Limits,
        own: ModelLimits,
    ) -> None:
        """Makes sure that these nodes are scored: one pass for those that are not, and guesses."""
        due = []
        for g, nodes in chosen:
            new = self._next_level(g, nodes) if level else self._catch_up(g)
            if new is not None:
                due.append((g, nodes, new))
        if not due:
            return
        size = sum(len(new.token_ids) for _, _, new in due)
        entries, guessed = [], list[list[int]]()
        for g, nodes, new in due:
            levels = self._levels(g.budget) - level - 1
            room = self.backend.capacity - g.most_expanded(self._levels(g.budget))
            given = limits.guesses.get(g.context.key)
            of = PassSize(size, len(due), own.pass_ms)
            row = self._row(g.context)
            entry, kinds = self.guesser.add(new, g, nodes, row, given, levels, room, of)
            size += len(kinds)
            entries.append(entry)
            guessed.append(kinds)
        scored = self.backend.extend(entries)
        self.num_passes += 1
        for (g, _, _), kinds, logits in zip(due, guessed, scored, strict=True):
            self._row(g.context).hold(logits, kinds)

    def _begin(self, context: Context, budget: int, limits: ModelLimits) -> TreeBuilder:
        """A bare root, after learning from the tree before it."""
        law, row = self._law_for(context.params), self._row(context)
        table = self.reliability[law]
        if row.reliability is None or row.law != law:
            row.reliability, row.law = table.child(), law
        elif row.last is not None and not context.unsteered:
            row.last.learn(context.token_ids, (row.reliability, table))
        # The drafter's context may be shorter than the target's; past it nothing is drafted.
        free_slots = self.backend.capacity - (len(context.token_ids) - row.skipped)
        budget = max(1, min(budget, free_slots))
        dynamic = limits.policy is not None and not context.unsteered
        free = dynamic and law in (Law.POINT, Law.COUPLED) and self._parents is None
        if self.is_static(context) and self._parents is None and not context.unsteered:
            budget = min(budget, limits.most_drawn or budget)
        shape = None if free else self._shape(context, budget)
        rates = row.reliability.rates
        row.last = TreeBuilder(context, law, shape, budget, free_slots, rates, self.vocabulary)
        return row.last

    def _shape(self, context: Context, budget: int) -> list[list[int]]:
        # Measured rates do not shape trees of a text that may depend on its seed alone.
        acceptance = tuple(DEFAULT_ACCEPTANCE if context.unsteered else self.acceptance)
        shape = self._shapes.get((budget, acceptance))
        if shape is None:
            parents = self._parents
            if parents is None:
                parents = optimal_tree(acceptance, budget, max_levels=self._levels(budget))
            shape = self._shapes[budget, acceptance] = children_of(parents[:budget])
        choices = self.vocabulary.columns(context.vocab_size)
        if max(map(len, shape)) > choices:
            raise ArgumentError(f"a node of the tree has more children than {choices} tokens")
        return shape

    def _levels(self, budget: int) -> int:
        return self._max_levels or max(_LEVELS, min(_DEEPEST, budget // 4))

    def _chosen(
        self, growing: Sequence[TreeBuilder], level: int, policy: LevelPolicy | None
    ) -> list[tuple[TreeBuilder, list[int]]]:
        """The rows that get another level, and the nodes that are expanded."""
        offers = [(g, nodes) for g in growing if (nodes := g.candidates())]
        if policy is None or not offers:
            return offers
        fixed = [(g, nodes) for g, nodes in offers if g.context.unsteered]
        asked = [(g, nodes) for g, nodes in offers if not g.context.unsteered and g.shape]
        free = [(g, nodes) for g, nodes in offers if g.shape is None]
        asked += [(g, [n]) for g, nodes in free if level < self._levels(g.budget) for n in nodes]
        asked.sort(key=lambda offer: -offer[0].gain(offer[1]))
        drawn = [g for g in growing if g.law not in (Law.POINT, Law.COUPLED)]
        others = [g for g in growing if g.law in (Law.POINT, Law.COUPLED)]
        count = policy.num_expansions(
            len(others) + sum(sum(g.estimates) for g in drawn),
            len(others) + sum(len(g.tokens) for g in drawn),
            [chance for g in others for chance in g.estimates[1:]],
            [g.gain(nodes) for g, nodes in asked],
            [sum(map(g.num_children, nodes)) if g.shape else 1 for g, nodes in asked],
            [self._num_unscored(g, nodes) for g, nodes in asked],
        )
        together: dict[int, tuple[TreeBuilder, list[int]]] = {}
        for g, nodes in asked[:count]:
            together.setdefault(id(g), (g, []))[1].extend(nodes)
        return [*fixed, *together.values()]

    def prefill(self, contexts: Sequence[Context]) -> None:
        """Prefills texts that are new to it, without the tokens that `propose` reads anyway."""
        for context in contexts:
            new, length = context.key not in self._rows, len(context.token_ids)
            if new and 1 < length and self.reads(length) <= self.backend.capacity:
                row = self._row(context)
                self._fill(row, context.token_ids, length - 1)
                self.guesser.read(row, context.token_ids)

    def reads(self, length: int) -> int:
        """Returns how many tokens of a new text of this length it prefills."""
        return length if self.window is None else min(length, _SINKS + self.window)

    def _row(self, context: Context) -> DraftRow:
        row = self._rows.get(context.key)
        if row is None:
            text = context.token_ids
            begun = self._kept.take(context, self.reads(len(text)))
            if begun is not None:
                row = DraftRow(*begun)
            else:
                row = DraftRow(self.backend.open(), len(text) - self.reads(len(text)))
            if row.skipped and begun is None:
                try:
                    fill(self.backend, row.row, text[:_SINKS])
                except BaseException:
                    self.backend.release(row.row)
                    raise
            self._rows[context.key] = row
        return row

    def _length(self, row: DraftRow) -> int:
        """Tokens of the text that the row holds, or that were skipped in it."""
        return self.backend.length(row.row) + row.skipped

    def _fill(self, row: DraftRow, text: Sequence[int], end: int) -> None:
        """Commits the text up to `end`."""
        fill(self.backend, row.row, text[self._length(row) : end])

    def _law_for(self, params: SamplingParams) -> Law:
        if params.temperature == 0.0:
            return Law.POINT
        return Law.COUPLED if params.coupled else self._law

    def _catch_up(self, growing: TreeBuilder) -> Nodes | None:
        """Commits nodes of the last tree that became text; the first level is the rest of it.

        None: the last token was scored, too, in the step before.
        """
        row, text = self._row(growing.context), growing.context.token_ids
        self.guesser.read(row, text)
        if self._length(row) >= len(text):  # its last token was kept, and the same text comes again
            self.backend.truncate(row.row, len(text) - 1 - row.skipped)
            row.clear()
        new = text[self._length(row) :]
        kept = row.follow(new)
        root = row.scored.get(kept[-1]) if len(kept) == len(new) else None
        if root is None:
            kept = kept[: len(new) - 1]
        self.backend.commit([AcceptedPath(row.row, kept)])
        row.clear()
        if root is not None:
            row.scored[-1] = root
            return None
        length = self._length(row)
        if len(text) - length > CHUNK:
            length = len(text) - CHUNK
            self._fill(row, text, length)
        new = text[length:]
        for token in new:
            growing.place[0] = row.add(row.count - 1, token)
        return Nodes(row.row, readable(self.backend, new), num_logits=1)

    def _num_unscored(self, growing: TreeBuilder, nodes: Sequence[int]) -> int:
        """Nodes that would need a pass to be expanded."""
        row = self._row(growing.context)
        if nodes[0] == 0:
            new = growing.context.token_ids[self._length(row) :]
            path = row.follow(new)
            return int(not path or len(path) < len(new) or path[-1] not in row.scored)
        edges = [(growing.place[growing.parents[n]], growing.tokens[n]) for n in nodes]
        return sum(row.below.get(edge) not in row.scored for edge in edges)

    def _next_level(self, growing: TreeBuilder, nodes: Sequence[int]) -> Nodes | None:
        """Nodes of a level that were not scored yet; None if all were."""
        row, tokens, parents = self._row(growing.context), list[int](), list[int]()
        for node in nodes:
            above, token = growing.place[growing.parents[node]], growing.tokens[node]
            found = row.below.get((above, token))
            if found is not None and found in row.scored:
                growing.place[node] = found
                continue
            growing.place[node] = row.add(above, token)
            tokens.append(token)
            parents.append(above)
        return Nodes(row.row, readable(self.backend, tokens), parents) if tokens else None

    def release(self, key: int) -> None:
        """Frees the request's KV row, or keeps it; see `keep`."""
        row = self._rows.pop(key, None)
        if row is None:
            return
        if row.last is None:
            self.backend.release(row.row)
            return
        self.backend.truncate(row.row, self.backend.length(row.row))
        self._kept.keep(row.row, row.skipped, row.last.context)

    def keep(self, max_bytes: int) -> bool:
        """Has keys and values stay after requests, for those that begin alike; whether any may.

        Args:
            max_bytes: of them, 0: none, as it is at first.
        """
        return self._kept.bound(max_bytes)

    def clear(self) -> None:
        """Drops the keys and values that stay: memory is needed."""
        self._kept.clear()

    def _forget_drafts(self, key: int) -> None:
        """Drops provisional nodes; the whole row if the backend cannot."""
        row = self._rows.get(key)
        if row is None:
            return
        row.clear()
        row.last = None
        try:
            self.backend.truncate(row.row, self.backend.length(row.row))
        except Exception:
            del self._rows[key]
            with suppress(Exception):
                self.backend.release(row.row)


_SINKS = 4  # attention sinks: the first tokens of a text (arXiv 2309.17453)
_LEVELS, _DEEPEST = 8, 24
_ANY_CHILD = 0.7  # prior rate at which some child of an accepted node is accepted; bin MODEL_BINS
_LAWS = {
    "without_replacement": Law.WITHOUT_REPLACEMENT,
    "with_replacement": Law.WITH_REPLACEMENT,
    "point": Law.POINT,
}


def law_of(name: str) -> Law:
    """Returns the law of this name, as `ModelDrafter` takes it.

    Raises:
        ArgumentError: there is none.
    """
    if not isinstance(name, str) or name not in _LAWS:
        raise ArgumentError(f"law {name!r} must be one of {', '.join(_LAWS)}")
    return _LAWS[name]
