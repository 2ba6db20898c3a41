"""SpecInfer (arXiv 2305.09781): expansion trees, merged trees, i.i.d. draws.

Its verification, multi-step speculative sampling (section 4.3, algorithm 2), is `verify.recursive`
for WITH_REPLACEMENT nodes; its greedy verification is `verify.greedy`. The published expansion
takes the top-k tokens and verifies them as if they had been drawn, which is not exact; here top-k
children are POINT nodes and are verified as such.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice, repeat

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from redwood.errors import ArgumentError, check_count
from redwood.sampling import draw
from redwood.tree import Law, TokenTree

_POINT, _COUPLED = int(Law.POINT), int(Law.COUPLED)


def expansion_tree(widths: Sequence[int]) -> list[int]:
    """Returns the parents of the tree <k1, .., km>: every node of level i has k_i children.

    Source: section 3, expansion-based construction. Level by level, the root first;
    <2, 2, 1> gives 1 + 2 + 4 + 4 nodes.

    Raises:
        ArgumentError: no list, or a width that is not a whole number of at least 1.
    """
    if not isinstance(widths, Iterable):
        raise ArgumentError(f"expansion widths {widths!r} must be a list of whole numbers")
    for width in widths:
        check_count("expansion width", width)
    parents, level = [-1], [0]
    for width in widths:
        first = len(parents)
        parents += [node for node in level for _ in range(width)]
        level = list(range(first, len(parents)))
    return parents


def draw_with_replacement(
    probs: NDArray[np.float64], uniforms: Sequence[float], ids: NDArray[np.int64] | None = None
) -> list[int]:
    """Returns i.i.d. draws from probs [V], one per uniform; with ids [M], probs is over these.

    Source: the candidates for which algorithm 2 is stated. Duplicates are separate trials.
    """
    drawn = [draw(probs, uniform) for uniform in uniforms]
    return drawn if ids is None else [int(ids[i]) for i in drawn]


def merge_trees(trees: Sequence[TokenTree]) -> TokenTree:
    """Returns one tree with the paths of all; every child keeps its own law and draft row.

    Source: section 3, definition 3.2, where equal siblings become one. Here a node joins an equal
    sibling only if it was chosen without chance of its own: a POINT node joins any, a COUPLED node
    joins POINT and COUPLED ones. (Neither is a trial of its own: once a drawn sibling is refused
    nothing of its token is left, so a POINT trial after it is void.) Two drafters that *drew* the
    same token made two trials, and both stay. Siblings stand in the order of `trees`, so a tree
    with drawn nodes belongs before a tree of POINT nodes.

    Raises:
        ArgumentError: no tree, or different root tokens.
    """
    if not trees or len({tree.token_list[0] for tree in trees}) != 1:
        raise ArgumentError("merge needs trees with one and the same root token")
    if len(trees) == 1:
        return trees[0]
    tokens, parents = [trees[0].token_list[0]], [-1]
    laws, rows = [int(Law.POINT)], [-1]
    # By parent and token, the first child of any law, and the first without chance of its own.
    either: dict[tuple[int, int], int] = {}
    sure: dict[tuple[int, int], int] = {}
    chances, sources = [1.0], [0]
    first_row = 0
    for tree in trees:
        place = [0]
        own = repeat(0.0) if tree.estimates is None else tree.estimates
        named = repeat(0) if tree.sources is None else tree.sources
        drafted = zip(tree.token_list, tree.parent_list, tree.law_list, own, named, strict=False)
        for node, (token, above, law, chance, by) in enumerate(islice(drafted, 1, None), start=1):
            parent = place[above]
            key = parent, token
            same = either.get(key) if law == _POINT else sure.get(key) if law == _COUPLED else None
            if same is not None:
                place.append(same)
                chances[same] = max(chances[same], chance)
                sources[same] |= by
                continue
            new = len(tokens)
            either.setdefault(key, new)
            if law in (_POINT, _COUPLED):
                sure.setdefault(key, new)
            place.append(new)
            chances.append(chance)
            sources.append(by)
            tokens.append(token)
            parents.append(parent)
            laws.append(law)
            row = tree.draft_row_list[node]
            rows.append(row + first_row if row >= 0 else -1)
        first_row += 0 if tree.draft_probs is None else len(tree.draft_probs)
    guessed = all(tree.estimates is not None for tree in trees if len(tree) > 1)
    probs, ids = _stack_rows([t for t in trees if t.draft_probs is not None])
    estimates = _shared(chances, parents) if guessed else None
    noted = sources if any(sources) else None
    return TokenTree.of_lists(tokens, parents, laws, rows, probs, ids, estimates, noted)


def _shared(chances: Sequence[float], parents: Sequence[int]) -> list[float]:
    """Estimates of several drafters in one tree, scaled so that siblings sum to at most 1."""
    sums = [0.0] * len(parents)
    for chance, parent in zip(chances[1:], parents[1:], strict=True):
        sums[parent] += chance
    made, factors = [1.0], [1.0 / max(1.0, sums[0])]
    for node in range(1, len(parents)):
        factor = factors[parents[node]]
        made.append(chances[node] * factor)
        scale = chances[node] / sums[node] if sums[node] > chances[node] else 1.0
        factors.append(factor * scale)
    return made


def _stack_rows(trees: Sequence[TokenTree]) -> tuple[Tensor | None, Tensor | None]:
    """The draft rows of all trees under each other, in one form."""
    if not trees:
        return None, None
    probs = [t.draft_probs for t in trees if t.draft_probs is not None]
    if all(t.draft_ids is None for t in trees):
        return torch.cat(probs), None
    width = max(p.shape[1] for p in probs)
    padded, ids = [], []
    for tree, row in zip(trees, probs, strict=True):
        held = tree.draft_ids
        held = torch.arange(row.shape[1]).expand(len(row), -1) if held is None else held
        # Padding: tokens of zero probability.
        padded.append(torch.nn.functional.pad(row, (0, width - row.shape[1])))
        ids.append(torch.nn.functional.pad(held, (0, width - row.shape[1])))
    return torch.cat(padded), torch.cat(ids)
