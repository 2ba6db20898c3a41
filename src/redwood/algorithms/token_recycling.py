"""Token Recycling (arXiv 2408.08696): drafts from the rows that earlier passes threw away.

An adjacency matrix keeps, for every token of the vocabulary, the k best next tokens of the last row
that stood after it, whether its node was accepted or not. A draft fills a static tree from it,
breadth first: the child of rank j below a node is the j-th best successor of the node's token. The
published method in its published form; nodes are POINT, so any verification of `redwood.verify`
that knows these is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from redwood.errors import ArgumentError, check_count
from redwood.tree import TokenTree

K = 8
"""Successors of a token that are kept (section 4.1)."""
Levels: TypeAlias = Sequence[Sequence[int]]
"""Children of each node, level by level from the root; levels and nodes left out have none."""
PUBLISHED_LEVELS: Levels = (
    (8,),
    (8, 4, 3, 2, 1, 1, 1, 1),
    (8, 3, 2, 1, 1, 1, 1, 1, 2, 1, 0, 0, 1, 0, 0, 1, 0, 1, 1),
    (5, 2, 1, 1, 1, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 1, 1),
    (3, 1, 1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 1),
    (2, 0, 0, 1),
)
"""The static, imbalanced tree of appendix 8.1: 80 nodes below the root, 6 levels of them."""
_NONE = -1


def static_tree(levels: Levels = PUBLISHED_LEVELS) -> tuple[list[int], list[int]]:
    """Returns the parents of a static tree, root first, and the rank of each node below its parent.

    Args:
        levels: children of each node.

    Raises:
        ArgumentError: more entries in a level than it has nodes, or a count below 0.
    """
    parents, ranks, level = [-1], [0], [0]
    for counts in levels:
        if len(counts) > len(level):
            raise ArgumentError(f"{len(counts)} counts for a level of {len(level)} nodes")
        first = len(parents)
        for node, count in zip(level, counts, strict=False):
            check_count("children", count, 0)
            parents += [node] * count
            ranks += range(count)
        level = list(range(first, len(parents)))
    return parents, ranks


def best_tokens(rows: NDArray[np.floating], k: int = K) -> NDArray[np.int64]:
    """Returns int64 [N, k]: the best tokens of each row, best first; the lowest id among equals.

    Args:
        rows: [N, V], logits or probabilities, V >= k.
        k: tokens to return.
    """
    return np.argsort(-rows, axis=-1, kind="stable")[:, :k]


class AdjacencyMatrix:
    """The k best next tokens by token (section 3.1); kept over requests, which is the hot start.

    The published matrix begins with zeros, and so drafts token 0 where nothing is known. Here such
    a place is empty and the node, with all below it, is left out: the same drafts, fewer nodes.

    Args:
        vocab_size: tokens of the vocabulary.
        k: successors of each.

    Attributes:
        successors: int64 [V, k], best first; -1 where nothing is known.

    Raises:
        ArgumentError: an argument below 1.
    """

    def __init__(self, vocab_size: int, k: int = K) -> None:
        check_count("vocab_size", vocab_size)
        check_count("k", k)
        self.successors = np.full((vocab_size, k), _NONE, np.int64)

    def update(self, token_ids: Sequence[int], best: NDArray[np.int64]) -> None:
        """Overwrites the successors of every scored node's token (section 3.3).

        Of nodes with the same token the last one stays: the published code leaves open which, and
        section 5.2 finds the last one best.

        Args:
            token_ids: [N], the scored nodes of a pass, accepted or not, the root included.
            best: [N, k], the best next tokens after each.

        Raises:
            ArgumentError: shapes that do not fit, or a token outside the vocabulary.
        """
        vocab_size, k = self.successors.shape
        if best.shape != (len(token_ids), k):
            raise ArgumentError(
                f"{len(token_ids)} tokens need a row of {k} each, not {list(best.shape)}"
            )
        for tokens in (np.asarray(token_ids, np.int64), best):
            if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab_size:
                raise ArgumentError(f"a token is outside the vocabulary of {vocab_size}")
        for token, row in zip(token_ids, best, strict=True):
            self.successors[token] = row

    def draft(self, root: int, levels: Levels = PUBLISHED_LEVELS) -> TokenTree:
        """Returns a tree of POINT nodes below `root`, filled level by level (algorithm 1).

        Args:
            root: the last token of the text.
            levels: the static tree; no node has more than k children.

        Raises:
            ArgumentError: more than k children, or as of `static_tree`.
        """
        parents, ranks = static_tree(levels)
        if max(ranks) >= self.successors.shape[1]:
            raise ArgumentError(f"a node has at most {self.successors.shape[1]} children")
        tokens, above = [root], [-1]
        place = {0: 0}  # of the static tree's nodes among those that are made
        for node in range(1, len(parents)):
            parent = place.get(parents[node])
            if parent is None:
                continue
            token = int(self.successors[tokens[parent], ranks[node]])
            if token != _NONE:
                place[node] = len(tokens)
                tokens.append(token)
                above.append(parent)
        return TokenTree.point(tokens, above)
