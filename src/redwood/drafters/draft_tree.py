"""A draft tree in the making: a draft model expands it level by level.

Static: the shape is given, and every inner node of a level gets its children. Dynamic: there is no
shape; at every level the nodes with the best estimates may be expanded. Dynamic trees hold only
nodes that are chosen deterministically, so that the tree can be pruned in the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, isqrt

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from redwood.algorithms.acceptance import MODEL_BINS, AcceptanceTable, learn_below, model_bin
from redwood.algorithms.sequoia import draw_without_replacement
from redwood.algorithms.sources import Source
from redwood.algorithms.specinfer import draw_with_replacement
from redwood.drafters.context import Context
from redwood.drafters.guesses import Saying
from redwood.drafters.vocabulary import DraftVocabulary
from redwood.errors import NumericalError
from redwood.sampling import check_finite, draft_law, scores, top
from redwood.tree import Law, TokenTree

_BRANCH, _WIDTH = 3, 3  # of a dynamic tree: children of a node, nodes of a level that are expanded
_WIDTH_SHARE = 8  # or one node per so many of the budget, in trees of hundreds of nodes
# Mass mixed in from the untruncated draft distribution: truncated tokens are drawn last, not never.
_UNTRUNCATED = 1e-6
_SAID = 2  # most probable tokens of a node that are remembered for guesses
_BLOCK = 1 << 18  # logits whose temporaries stay in the cache


class TreeBuilder:
    """Builds one draft tree.

    Args:
        context: of the request.
        law: how children are drawn.
        shape: children of every node of a static tree; None: the tree is dynamic, law POINT or
            COUPLED.
        budget: tree size, the root included.
        free_slots: nodes that the drafter's row can still hold.
        rates: acceptance rate by bin; see `redwood.algorithms.acceptance`.
        vocabulary: tokens that the draft model scores.
    """

    def __init__(
        self,
        context: Context,
        law: Law,
        shape: Sequence[Sequence[int]] | None,
        budget: int,
        free_slots: int,
        rates: Sequence[float],
        vocabulary: DraftVocabulary,
    ) -> None:
        self.context, self.law, self.shape, self.budget = context, law, shape, budget
        self.rates, self._vocabulary = rates, vocabulary
        self._free_slots = free_slots
        self.length = len(context.token_ids)
        self.tokens, self.parents = [context.token_ids[-1]], [-1]
        self.place = [-1]  # node -> provisional node of the drafter's row
        self.estimates = [1.0]
        self.said: dict[int, list[Saying]] = {}  # most probable next tokens of expanded nodes
        self._rows, self._bins, self._origins = [-1], [-1], [0]
        self._last = [0]  # nodes of the last level
        self._below: dict[int, range] = {}  # children of the nodes that were expanded
        self._num_rows = 0
        self._probs: list[Tensor] = []  # by level
        self._ids: list[Tensor] = []

    def candidates(self) -> list[int]:
        """Nodes of the last level that may be expanded; the best estimates first if dynamic."""
        if self.budget == 1:
            return []
        if self.shape is not None:
            return [n for n in self._last if self.shape[self._origins[n]]]
        most = max(0, min(max(_WIDTH, self.budget // _WIDTH_SHARE), self._free_slots))
        return sorted(self._last, key=lambda n: -self.estimates[n])[:most]

    def num_children(self, node: int) -> int:
        """Children that a node gets if it is expanded."""
        if self.shape is None:
            return max(_BRANCH, isqrt(self.budget // 2))
        return len(self.shape[self._origins[node]])

    def most_expanded(self, levels: int) -> int:
        """Nodes of the drafter's row that the tree may come to take."""
        if self.shape is not None:
            return self.budget
        return max(_WIDTH, self.budget // _WIDTH_SHARE) * levels

    def levels_below(self, node: int, levels: int) -> int:
        """Levels below a node that may be expanded, while these have few nodes.

        levels: the same of a dynamic tree.
        """
        if self.shape is None:
            return levels
        found, inner = 0, [self._origins[node]]
        while inner := [c for n in inner for c in self.shape[n] if self.shape[c]]:
            if len(inner) > _BRANCH:
                break
            found += 1
        return found

    def gain(self, nodes: Sequence[int]) -> float:
        """Tokens expected of the children of these nodes."""
        return self.rates[MODEL_BINS] * sum(self.estimates[node] for node in nodes)

    def path(self, node: int) -> list[int]:
        """Tokens from below the root to a node."""
        path: list[int] = []
        while node > 0:
            path.append(self.tokens[node])
            node = self.parents[node]
        return path[::-1]

    def expand(self, level: int, nodes: Sequence[int], logits: Tensor, width: int) -> None:
        """Chooses the children of nodes of one level; logits: [nodes, columns]."""
        context, self._last, known = self.context, [], self._vocabulary
        self._free_slots -= len(nodes)
        logits = logits[:, : known.columns(context.vocab_size)]
        check_finite(logits)
        if context.params.needs_history or context.params.logit_bias:
            pairs = zip(nodes, logits, strict=True)
            logits = torch.stack([_scored(row, context, self.path(n), known) for n, row in pairs])
        most = min(max(self.num_children(node) for node in nodes), logits.shape[1])
        if self.law == Law.POINT:
            values, best = top(logits, most)
            best = known.token_ids(best)
            chances = (values - _log_mass(logits)).exp()
            for node, tokens, found in zip(nodes, best.tolist(), chances.tolist(), strict=True):
                self._say(node, tokens, found)
                count = self._possible(found)
                self._add(node, tokens[:count], -1, found[:count])
            return
        # Truncated tokens are drawn last: the target's truncation may keep them.
        rest = _UNTRUNCATED if self.law == Law.WITHOUT_REPLACEMENT else 0.0
        probs, ids = draft_law(logits, context.params, max(width, most), rest=rest)
        ids = known.token_ids(ids)
        rows = zip(nodes, probs.numpy(), ids.numpy(), strict=True)
        if self.law == Law.COUPLED:
            for node, given, tokens in rows:
                self._say(node, tokens, given)
                count = min(self.num_children(node), self._possible(given))
                chosen = self._best_by_noise(given, tokens, level)[:count]
                self._add(node, tokens[chosen].tolist(), -1, given[chosen].tolist())
            return
        for draft_row, (node, given, tokens) in enumerate(rows, self._num_rows):
            self._say(node, tokens, given)
            drawn = self._draw(given, tokens, node)
            by_id = dict(zip(tokens.tolist(), given.tolist(), strict=True))
            self._add(node, drawn, draft_row, [by_id.get(token, 0.0) for token in drawn])
        self._num_rows += len(nodes)
        self._probs.append(probs)
        self._ids.append(ids)

    def _say(self, node: int, tokens: Sequence[int], chances: Sequence[float]) -> None:
        best = zip(tokens[:_SAID], chances[:_SAID], strict=True)
        self.said[node] = [Saying(int(token), float(chance)) for token, chance in best]

    def learn(self, text: Sequence[int], tables: Sequence[AcceptanceTable]) -> None:
        """Counts in the tables which nodes `text`, the committed text, accepted."""
        news = text[self.length :]
        depth = learn_below(news, self._children, self.tokens, self._bins, tables)
        at = 0
        for step, token in enumerate(news[: depth + 1]):
            children = self._children(at)
            if not children:
                break
            for table in tables:
                table.count(MODEL_BINS, step < depth)
            at = next((c for c in children if self.tokens[c] == token), at)

    def _children(self, node: int) -> range:
        return self._below.get(node, range(0))

    def finish(self) -> TokenTree:
        """Returns the tree; of a dynamic one, the nodes with the best estimates."""
        tokens, parents, estimates = self.tokens, self.parents, self.estimates
        if len(tokens) > self.budget:  # no child's estimate exceeds its parent's
            order = np.argsort(-np.array(estimates), kind="stable")[: self.budget]
            nodes = np.sort(order).tolist()
            place = {node: i for i, node in enumerate([-1, *nodes], start=-1)}
            tokens = [tokens[node] for node in nodes]
            parents = [place[parents[node]] for node in nodes]
            estimates = [estimates[node] for node in nodes]
        return TokenTree.of_lists(
            tokens,
            parents,
            [int(self.law)] * len(tokens),
            self._rows[: len(tokens)],  # those of a dynamic tree are all alike
            torch.cat(self._probs) if self._probs else None,
            torch.cat(self._ids) if self._ids else None,
            estimates,
            [0] + [int(Source.MODEL)] * (len(tokens) - 1),
        )

    def _best_by_noise(
        self, probs: NDArray[np.float64], ids: NDArray[np.int64], level: int
    ) -> NDArray[np.int64]:
        """Places in the row by log q plus the noise of the absolute position, best first."""
        assert self.context.noise is not None
        noise = self.context.noise.at(self.length + level, ids)
        with np.errstate(divide="ignore"):
            keys = np.log(probs) + noise
        order: NDArray[np.int64] = np.argsort(-keys, kind="stable")
        return order

    def _possible(self, probs: Sequence[float] | NDArray[np.float64]) -> int:
        """How many tokens of a row a logits processor leaves possible; without one, all."""
        if self.context.params.logits_processor is None:
            return len(probs)
        return int(np.count_nonzero(np.asarray(probs) > 0.0))

    def _draw(self, probs: NDArray[np.float64], ids: NDArray[np.int64], node: int) -> list[int]:
        # Known before the first draw: no slot is dropped after its own.
        context, count = self.context, min(self.num_children(node), self._possible(probs))
        uniforms = context.rng.random(count)
        if self.law == Law.WITH_REPLACEMENT:
            return draw_with_replacement(probs, uniforms.tolist(), ids)
        return draw_without_replacement(probs, uniforms, ids=ids, vocab_size=context.vocab_size)

    def _add(
        self, node: int, tokens: Sequence[int], draft_row: int, chances: Sequence[float]
    ) -> None:
        """Appends a node's children; chances: their draft probabilities."""
        count = min(len(tokens), self.num_children(node))
        added = self._below[node] = range(len(self.tokens), len(self.tokens) + count)
        kinds = [model_bin(chance) for chance in chances[:count]]
        above = self.estimates[node]
        self._last += added
        self.tokens += tokens[:count]
        self.parents += [node] * count
        self.place += [-1] * count
        self._rows += [draft_row] * count
        self._bins += kinds
        self.estimates += [above * self.rates[kind] for kind in kinds]
        if self.shape is not None:
            self._origins += self.shape[self._origins[node]][:count]


def _scored(
    row: Tensor, context: Context, path: Sequence[int], vocabulary: DraftVocabulary
) -> Tensor:
    """Scores [M] of a draft model's row [M]; penalties, bias and processor see the target's width.

    Tokens that the draft model does not score have next to no probability there. Where a processor
    allows none of the others, the row is returned unchanged: its draws are then rejected, by the
    right law.
    """
    width = len(row)
    whole = vocabulary.spread(row, context.vocab_size)
    try:
        made = scores(whole, context.params, context.history, path)
    except NumericalError:
        return row.double().cpu()
    made = vocabulary.gather(made, width)
    return made if float(made.max()) > -inf else row.double().cpu()


def _log_mass(logits: Tensor) -> Tensor:
    """Logarithms of the sums of exponentials, [W, 1]; a few rows at a time, which fit a cache."""
    rows = len(logits) if logits.device.type != "cpu" else max(1, _BLOCK // logits.shape[1])
    parts = [logits[at : at + rows] for at in range(0, len(logits), rows)]
    return torch.cat([part.logsumexp(-1, keepdim=True) for part in parts])
