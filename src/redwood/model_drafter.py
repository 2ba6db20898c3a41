"""The drafter that is a smaller language model: a static tree, filled level by level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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
    """

    name = "model"
    draws = True

    def __init__(
        self,
        backend: Backend,
        tree: Sequence[int] | None = None,
        *,
        law: str = "without_replacement",
        max_levels: int = 6,
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

    def propose(self, contexts: Sequence[Context], budgets: Sequence[int]) -> list[TokenTree]:
        """Returns trees drawn from this model; one forward per level for all contexts."""
        growing = [
            _Growing(context, self._shape(context, budget), self._law_for(context.params))
            for context, budget in zip(contexts, budgets, strict=True)
        ]
        active = [g for g in growing if len(g.shape.parents) > 1]
        entries = [self._catch_up(g) for g in active]
        level = 0
        while active:
            logits = self.backend.extend(entries)
            for g, rows in zip(active, logits, strict=True):
                g.draw_children(level, rows, self._width)
            level += 1
            active = [g for g in active if g.shape.inner(level)]
            entries = [self._next_level(g, level) for g in active]
        return [g.finish() for g in growing]

    def _shape(self, context: Context, budget: int) -> _Shape:
        # Past the drafter's own context, maybe shorter than the target's, nothing is drafted.
        budget = max(1, min(budget, self.backend.capacity - len(context.token_ids)))
        shape = self._shapes.get(budget)
        if shape is None:
            parents = self._parents
            if parents is None:
                parents = optimal_tree(DEFAULT_ACCEPTANCE, budget, max_levels=self._max_levels)
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
        context = growing.context
        row = self._rows.get(context.key)
        if row is None:
            row = self._rows[context.key] = _DraftRow(self.backend.open())
        text = context.token_ids
        length = self.backend.length(row.row)
        kept = row.follow(text[length:-1])
        self.backend.commit([Kept(row.row, kept)])
        length += len(kept)
        while len(text) - length > _CHUNK:  # the prompt, a chunk at a time
            chunk = text[length : length + _CHUNK]
            self.backend.extend([Nodes(row.row, self._readable(chunk), num_logits=1)])
            self.backend.commit([Kept(row.row, range(len(chunk)))])
            length += len(chunk)
        new = text[length:]
        row.tokens, row.parents = list(new), list(range(-1, len(new) - 1))
        growing.row, growing.place[0] = row, len(new) - 1
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
        return [token if token < self.backend.vocab_size else 0 for token in tokens]

    def release(self, key: int) -> None:
        """Frees the request's KV row."""
        row = self._rows.pop(key, None)
        if row is not None:
            self.backend.release(row.row)


_CHUNK = 512
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
        self.row: _DraftRow | None = None
        self.place = [-1] * len(shape.parents)  # node -> provisional node of the drafter's row
        self.tokens = [context.token_ids[-1]] + [-1] * (len(shape.parents) - 1)
        self.rows = [-1] * len(shape.parents)
        self.probs: list[Tensor] = []
        self.ids: list[Tensor] = []

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
            best = top(logits, most)[1].tolist()
            for node, tokens in zip(nodes, best, strict=True):
                self._place(node, tokens, -1)
            return
        probs, ids = draft_law(logits, context.params, max(width, most))
        for i, node in enumerate(nodes):
            row = (probs[i].numpy(), ids[i].numpy())
            if self.law == Law.COUPLED:
                self._place(node, self._best_by_noise(*row, level), -1)
            else:
                self._place(node, self._draw(*row, node), len(self.probs))
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

    def _place(self, node: int, tokens: Sequence[int], draft_row: int) -> None:
        for child, token in zip(self.shape.children[node], tokens, strict=False):
            self.tokens[child] = token
            self.rows[child] = draft_row

    def _path(self, node: int) -> list[int]:
        path: list[int] = []
        while node > 0:
            path.append(self.tokens[node])
            node = self.shape.parents[node]
        return path[::-1]

    def finish(self) -> TokenTree:
        """The drawn tree."""
        laws = [int(self.law)] * len(self.tokens)
        return TokenTree(
            torch.tensor(self.tokens),
            torch.tensor(self.shape.parents),
            torch.tensor(laws, dtype=torch.int8),
            torch.tensor(self.rows),
            torch.stack(self.probs) if self.probs else None,
            torch.stack(self.ids) if self.ids else None,
        )
