"""The drafter that is a smaller language model: a static tree, filled level by level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from redwood.algorithms.dynamic import MODEL_BINS, Pace, Reliability, learn, model_bin, model_prior
from redwood.algorithms.sequoia import draw_without_replacement, optimal_tree
from redwood.algorithms.specinfer import draw_with_replacement
from redwood.backends.base import Backend, Kept, Nodes
from redwood.context import Context
from redwood.errors import ArgumentError, check_count
from redwood.sampling import SamplingParams, check_finite, draft_law, scores, top
from redwood.tree import Law, TokenTree, children_of, depths_of

# Acceptance of a good small drafter by rank, for a first tree where nothing was measured.
DEFAULT_ACCEPTANCE = (0.75, 0.1, 0.04, 0.02, 0.01, 0.01)
# Tokens a drafter draws from; what lies beyond has little mass and would cost O(V) per node.
DRAFT_WIDTH = 256


class ModelDrafter:
    """A smaller language model fills a static tree, one batched pass per level, on its own KV.

    Args:
        backend: any backend whose tokens are the target's (checked by `redwood.load`).
        tree: parents of the static tree; its first n nodes are used for a budget of n. None: the
            optimal tree for a typical acceptance vector.
        law: how children are drawn above temperature 0: "without_replacement" (Sequoia),
            "with_replacement" (SpecInfer) or "point" (top-k). Coupled requests draw with the
            target's noise; temperature 0 takes the top-k.
        max_levels: levels of the default tree.
        width: tokens that are drawn from, the drafter's most probable ones.

    Attributes:
        acceptance: rates by rank, for the default tree.
        reliability: by law, the chance that a child is accepted, by the probability it was given;
            learned over all texts.
        pace: decides after each level whether another one pays; None: the tree is always filled.
            It is not asked for requests whose text must depend on their seed alone.
    """

    name = "model"
    draws = True

    def __init__(
        self,
        backend: Backend,
        tree: Sequence[int] | None = None,
        *,
        law: str = "without_replacement",
        max_levels: int = 8,
        width: int = DRAFT_WIDTH,
    ) -> None:
        if not isinstance(law, str) or law not in _LAWS:
            raise ArgumentError(f"law {law!r} must be one of {', '.join(_LAWS)}")
        check_count("width", width)
        check_count("max_levels", max_levels, least=2)
        if tree is not None:
            if not isinstance(tree, Sequence | np.ndarray):
                raise ArgumentError(f"tree {tree!r} must be a list of parents")
            TokenTree.point([0] * len(tree), tree)  # checks the shape
        self.backend = backend
        self._parents = None if tree is None else list(tree)
        self._law, self._max_levels, self._width = _LAWS[law], max_levels, width
        self._rows: dict[int, _DraftRow] = {}
        self._shapes: dict[int, _Shape] = {}
        self.reliability = {law: Reliability([*model_prior(), _HOPE]) for law in Law}
        self.acceptance: Sequence[float] = DEFAULT_ACCEPTANCE
        self.pace: Pace | None = None

    def propose(self, contexts: Sequence[Context], budgets: Sequence[int]) -> list[TokenTree]:
        """Returns trees drawn from this model; one forward per level for all contexts."""
        growing = [
            _Growing(context, self._shape(context, budget), self._law_for(context.params))
            for context, budget in zip(contexts, budgets, strict=True)
        ]
        for g in growing:
            self._learn(g)
        level = 0
        active = [g for g in growing if len(g.shape.parents) > 1]
        while active := self._going_on(growing, active, level):
            entries = [self._next_level(g, level) if level else self._catch_up(g) for g in active]
            logits = self.backend.extend(entries)
            for g, rows in zip(active, logits, strict=True):
                g.draw_children(level, rows, self._width)
            level += 1
            active = [g for g in active if g.shape.inner(level)]
        return [g.finish() for g in growing]

    def prefill(self, contexts: Sequence[Context]) -> None:
        """Reads texts that are new to it, but for what `propose` reads anyway."""
        for context in contexts:
            new, text = context.key not in self._rows, context.token_ids
            if new and 1 < len(text) <= self.backend.capacity:
                self._fill(self._row(context), text, len(text) - 1)

    def _row(self, context: Context) -> _DraftRow:
        row = self._rows.get(context.key)
        if row is None:
            row = self._rows[context.key] = _DraftRow(self.backend.open())
        return row

    def _fill(self, row: _DraftRow, text: Sequence[int], end: int) -> None:
        """Commits the text up to `end`, a chunk at a time."""
        for start in range(self.backend.length(row.row), end, _CHUNK):
            chunk = text[start : min(start + _CHUNK, end)]
            self.backend.extend([Nodes(row.row, self._readable(chunk), num_logits=1)])
            self.backend.commit([Kept(row.row, range(len(chunk)))])

    def _learn(self, growing: _Growing) -> None:
        """Notes what became of the last tree of this request, and gives the new one its rates."""
        context, table = growing.context, self.reliability[growing.law]
        row = growing.row = self._row(context)
        if row.reliability is None or row.last is None or row.last.law != growing.law:
            row.reliability = row.reliability or table.child()
        elif not context.unsteered:
            row.last.learn(context.token_ids, (row.reliability, table))
        growing.rates = row.reliability.rates
        row.last = growing

    def _going_on(
        self, growing: Sequence[_Growing], active: list[_Growing], level: int
    ) -> list[_Growing]:
        """The rows for which another level pays, by what the pace knows of times."""
        if self.pace is None or not active:
            return active
        fixed = [g for g in active if g.context.unsteered]
        asked = [g for g in active if not g.context.unsteered]
        asked.sort(key=lambda g: -g.gain(level))
        count = self.pace.going_on(
            sum(sum(g.estimates) for g in growing),
            sum(g.num_drawn for g in growing),
            [g.gain(level) for g in asked],
            [g.num_children(level) for g in asked],
            max((len(g.shape.inner(level)) for g in asked), default=0),
        )
        return fixed + asked[:count]

    def _shape(self, context: Context, budget: int) -> _Shape:
        # Past the drafter's own context, maybe shorter than the target's, nothing is drafted.
        budget = max(1, min(budget, self.backend.capacity - len(context.token_ids)))
        shape = self._shapes.get(budget)
        if shape is None:
            parents = self._parents
            if parents is None:
                parents = optimal_tree(self.acceptance, budget, max_levels=self._max_levels)
            shape = self._shapes[budget] = _Shape(parents[:budget])
        choices = min(self.backend.vocab_size, context.vocab_size)
        if max(map(len, shape.children)) > choices:
            raise ArgumentError(f"a node of the tree has more children than {choices} tokens")
        return shape

    def _law_for(self, params: SamplingParams) -> Law:
        if params.temperature == 0.0:
            return Law.POINT
        return Law.COUPLED if params.coupled else self._law

    def _catch_up(self, growing: _Growing) -> Nodes:
        """Keeps of the last tree what became text; the first level appends the rest of the text."""
        row, text = growing.row, growing.context.token_ids
        assert row is not None
        length = self.backend.length(row.row)
        kept = row.follow(text[length:-1])
        self.backend.commit([Kept(row.row, kept)])
        length += len(kept)
        if len(text) - length > _CHUNK:
            length = len(text) - _CHUNK
            self._fill(row, text, length)
        new = text[length:]
        row.tokens, row.parents = list(new), list(range(-1, len(new) - 1))
        growing.place[0] = len(new) - 1
        return Nodes(row.row, self._readable(new), num_logits=1)

    def _next_level(self, growing: _Growing, level: int) -> Nodes:
        row = growing.row
        assert row is not None
        nodes = growing.shape.inner(level)
        parents = [growing.place[growing.shape.parents[node]] for node in nodes]
        tokens = [growing.tokens[node] for node in nodes]
        for node, parent, token in zip(nodes, parents, tokens, strict=True):
            growing.place[node] = len(row.tokens)
            row.tokens.append(token)
            row.parents.append(parent)
        return Nodes(row.row, self._readable(tokens), parents)

    def _readable(self, tokens: Sequence[int]) -> list[int]:
        """The tokens, with 0 for those beyond this model's vocabulary, maybe the smaller one."""
        size = getattr(self.backend, "num_embeddings", self.backend.vocab_size)
        return [token if token < size else 0 for token in tokens]

    def release(self, key: int) -> None:
        """Frees the request's KV row."""
        row = self._rows.pop(key, None)
        if row is not None:
            self.backend.release(row.row)


_CHUNK = 512
_HOPE = 0.7  # first guess that some child of an accepted node is accepted; bin MODEL_BINS
_LAWS = {
    "without_replacement": Law.WITHOUT_REPLACEMENT,
    "with_replacement": Law.WITH_REPLACEMENT,
    "point": Law.POINT,
}


@dataclass
class _DraftRow:
    """A row of the drafter's backend and the provisional nodes it holds."""

    row: int
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    last: _Growing | None = None
    reliability: Reliability | None = None

    def follow(self, text: Sequence[int]) -> list[int]:
        """Returns the provisional nodes that spell the beginning of `text`."""
        path: list[int] = []
        at = -1
        for token in text:
            nodes = (i for i, p in enumerate(self.parents) if p == at and self.tokens[i] == token)
            at = next(nodes, -2)
            if at == -2:
                break
            path.append(at)
        return path


class _Shape:
    """A static tree, and per level the nodes that have children."""

    def __init__(self, parents: Sequence[int]) -> None:
        self.parents = list(parents)
        self.children = children_of(parents)
        self._inner: dict[int, list[int]] = {}
        for node, depth in enumerate(depths_of(parents)):
            if self.children[node]:
                self._inner.setdefault(depth, []).append(node)

    def inner(self, level: int) -> list[int]:
        """Nodes of this level that have children."""
        return self._inner.get(level, [])


class _Growing:
    """A tree while it is drawn."""

    def __init__(self, context: Context, shape: _Shape, law: Law) -> None:
        self.context, self.shape, self.law = context, shape, law
        size = len(shape.parents)
        self.row: _DraftRow | None = None
        self.rates: Sequence[float] = ()
        self.place = [-1] * size  # node -> provisional node of the drafter's row
        self.length = len(context.token_ids)
        self.tokens = [context.token_ids[-1]] + [-1] * (size - 1)
        self.rows = [-1] * size
        self.bins = [-1] * size
        self.estimates = [1.0] + [0.0] * (size - 1)
        self.num_drawn = 1
        self.probs: list[Tensor] = []
        self.ids: list[Tensor] = []

    def gain(self, level: int) -> float:
        """Tokens that the next level promises: for each inner node, that a child is accepted."""
        return self.rates[MODEL_BINS] * sum(self.estimates[n] for n in self.shape.inner(level))

    def num_children(self, level: int) -> int:
        """Nodes that the next level adds."""
        return sum(len(self.shape.children[node]) for node in self.shape.inner(level))

    def learn(self, text: Sequence[int], tables: Sequence[Reliability]) -> None:
        """Notes what became of this tree, of which `text` is the continuation."""
        news, parents = text[self.length :], self.shape.parents
        depth = learn(news, parents, self.tokens, self.bins, tables)
        at = 0
        for step, token in enumerate(news[: depth + 1]):
            drawn = [c for c in self.shape.children[at] if self.tokens[c] >= 0]
            if not drawn:
                break
            for table in tables:
                table.count(MODEL_BINS, step < depth)
            at = next((c for c in drawn if self.tokens[c] == token), at)

    def draw_children(self, level: int, logits: Tensor, width: int) -> None:
        """Draws the children of all inner nodes of a level; logits: [inner nodes, V]."""
        context, nodes = self.context, self.shape.inner(level)
        logits = logits[:, : context.vocab_size]
        check_finite(logits)
        if context.params.needs_history or context.params.logit_bias:
            logits = torch.stack(
                [
                    scores(row, context.params, context.history, self._path(node))
                    for node, row in zip(nodes, logits, strict=True)
                ]
            )
        most = max(len(self.shape.children[node]) for node in nodes)
        if self.law == Law.POINT:
            values, best = top(logits, most)
            given = (values - logits.logsumexp(-1, keepdim=True)).exp().tolist()
            for node, tokens, chances in zip(nodes, best.tolist(), given, strict=True):
                self._place(node, tokens, -1, chances)
            return
        probs, ids = draft_law(logits, context.params, max(width, most))
        for i, node in enumerate(nodes):
            row = (probs[i].numpy(), ids[i].numpy())
            by_id = dict(zip(row[1].tolist(), row[0].tolist(), strict=True))
            if self.law == Law.COUPLED:
                tokens = self._best_by_noise(*row, level)[: len(self.shape.children[node])]
                self._place(node, tokens, -1, [by_id[token] for token in tokens])
            else:
                tokens = self._draw(*row, node)
                chances = [by_id.get(token, 0.0) for token in tokens]
                self._place(node, tokens, len(self.probs), chances)
                self.probs.append(probs[i])
                self.ids.append(ids[i])

    def _best_by_noise(
        self, probs: NDArray[np.float64], ids: NDArray[np.int64], level: int
    ) -> list[int]:
        """Tokens by log q plus the noise of their absolute position, best first."""
        assert self.context.noise is not None
        noise = self.context.noise.at(len(self.context.token_ids) + level, ids)
        with np.errstate(divide="ignore"):
            keys = np.log(probs) + noise
        return [int(token) for token in ids[np.argsort(-keys, kind="stable")]]

    def _draw(self, probs: NDArray[np.float64], ids: NDArray[np.int64], node: int) -> list[int]:
        context, count = self.context, len(self.shape.children[node])
        uniforms = context.rng.random(count)
        if self.law == Law.WITH_REPLACEMENT:
            return draw_with_replacement(probs, uniforms.tolist(), ids)
        return draw_without_replacement(probs, uniforms, ids=ids, vocab_size=context.vocab_size)

    def _place(
        self, node: int, tokens: Sequence[int], draft_row: int, chances: Sequence[float]
    ) -> None:
        """Gives a node's children their tokens; chances: what the model gave each of them."""
        placed = zip(self.shape.children[node], tokens, chances, strict=False)
        for child, token, chance in placed:
            self.tokens[child] = token
            self.rows[child] = draft_row
            self.bins[child] = model_bin(chance)
            self.estimates[child] = self.estimates[node] * self.rates[self.bins[child]]
            self.num_drawn += 1

    def _path(self, node: int) -> list[int]:
        path: list[int] = []
        while node > 0:
            path.append(self.tokens[node])
            node = self.shape.parents[node]
        return path[::-1]

    def finish(self) -> TokenTree:
        """The drawn tree; nodes of levels that were left out are not in it."""
        drawn = [node for node, token in enumerate(self.tokens) if token >= 0]
        place = {node: i for i, node in enumerate(drawn)}
        return TokenTree(
            torch.tensor([self.tokens[node] for node in drawn]),
            torch.tensor([place.get(self.shape.parents[node], -1) for node in drawn]),
            torch.tensor([int(self.law)] * len(drawn), dtype=torch.int8),
            torch.tensor([self.rows[node] for node in drawn]),
            torch.stack(self.probs) if self.probs else None,
            torch.stack(self.ids) if self.ids else None,
            [self.estimates[node] for node in drawn],
        )
