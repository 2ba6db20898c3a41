"""Drafts under a constraint: paths that it forbids are dropped, and what it forces is drafted.

Only nodes chosen without chance are dropped. A node that was drawn stays even where the constraint
forbids it: its refusal is part of the law of what follows. (Draft models draw from masked rows, so
they draw such nodes only where their vocabulary lacks all that is allowed.) New nodes are POINT
nodes behind all drawn siblings, so they may depend on what was drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from time import perf_counter

from redwood.algorithms.sources import Source
from redwood.algorithms.specinfer import merge_trees
from redwood.drafters.context import Context
from redwood.sampling.constraint import Chain, Constraint
from redwood.tree import Law, TokenTree

MOST_ASKED = 6
"""Nodes of a tree at most that a constraint is asked to continue."""
_SLOW_S = 0.005  # seconds of a step after which no further node is asked about
_LEAST = 0.05  # estimate of a node that is worth the question
_DEEPER = 0.5  # estimate of a node over its parent's, where none is known
_UNDRAWN = (int(Law.POINT), int(Law.COUPLED))


def allowed(context: Context, tree: TokenTree) -> TokenTree:
    """Returns the tree without the undrawn nodes that the request's constraint forbids.

    Without a constraint the tree itself.

    Raises: what the constraint raises.
    """
    constraint = context.constraint
    if constraint is None or len(tree) == 1:
        return tree
    return _pruned(constraint, context, tree)


def continued(context: Context, tree: TokenTree, budget: int) -> TokenTree:
    """Returns the tree with what the constraint expects below its best nodes.

    Without a constraint the tree itself.

    Args:
        tree: as `allowed` returns it.
        budget: nodes at most, if the tree has no more; the best ones of both stay.

    Raises: what the constraint raises.
    """
    constraint = context.constraint
    if constraint is None or budget <= 1:
        return tree
    return _continued(constraint, context, tree, budget)


def _pruned(constraint: Constraint, context: Context, tree: TokenTree) -> TokenTree:
    fine, tokens = {0}, tree.token_list
    for leaf, below in enumerate(tree.children):
        if below or leaf == 0:
            continue
        path = tree.path(leaf)[1:]
        count = constraint.accepts(context.token_ids, [tokens[node] for node in path])
        fine.update(path[:count])
    if len(fine) == len(tree):
        return tree
    return tree.kept(sorted(fine | _drawn(tree)))


def _drawn(tree: TokenTree) -> set[int]:
    """The drawn nodes, and those above them."""
    found: set[int] = set()
    for node, law in enumerate(tree.law_list):
        while node > 0 and law not in _UNDRAWN and node not in found:
            found.add(node)
            node = tree.parent_list[node]
    return found


def _continued(constraint: Constraint, context: Context, tree: TokenTree, budget: int) -> TokenTree:
    chances = _estimates(tree)
    order = sorted(range(len(tree)), key=lambda node: -chances[node])
    grafts, start = [], perf_counter()
    for node in order[: 1 if context.unsteered else MOST_ASKED]:
        depth = tree.depths[node]
        if node and not context.unsteered and perf_counter() - start > _SLOW_S:
            break
        if chances[node] < _LEAST or depth + 1 >= budget:
            continue
        nodes = tree.path(node)
        path = [tree.token_list[each] for each in nodes]
        for chain in constraint.ahead(context.token_ids, path[1:], budget - 1 - depth):
            if chain.token_ids:
                grafts.append(_graft(path, [chances[each] for each in nodes], chain))
    if not grafts:
        return tree
    known = tree.estimates is not None or len(tree) == 1
    if not known:
        tree = _with_estimates(tree, chances)
    made = merge_trees([tree, *grafts])
    if len(made) > max(budget, len(tree)):
        made = _best(made, max(budget, len(tree)))
    return made if known else _with_estimates(made, None)


def _graft(path: list[int], chances: list[float], chain: Chain) -> TokenTree:
    """A tree of one path: to a node, and the chain below it."""
    below = list(accumulate(chain.chances, mul, initial=chances[-1]))[1:]
    tokens = [*path, *chain.token_ids]
    sources = [0] * len(path) + [int(Source.GRAMMAR)] * len(below)
    return TokenTree.point(tokens, range(-1, len(tokens) - 1), [*chances, *below], sources)


def _estimates(tree: TokenTree) -> list[float]:
    if tree.estimates is not None:
        return [1.0, *map(float, tree.estimates[1:])]
    return [_DEEPER**depth for depth in tree.depths]


def _with_estimates(tree: TokenTree, estimates: Sequence[float] | None) -> TokenTree:
    return TokenTree.of_lists(
        tree.token_list,
        tree.parent_list,
        tree.law_list,
        tree.draft_row_list,
        tree.draft_probs,
        tree.draft_ids,
        estimates,
        tree.sources,
    )


def _best(tree: TokenTree, count: int) -> TokenTree:
    """The nodes with the best estimates, parents with their children; drawn nodes all stay."""
    chances, stay = _estimates(tree), _drawn(tree)
    order = sorted(range(len(tree)), key=lambda node: (node not in stay, -chances[node], node))
    kept = {0}
    for node in order:  # no child's estimate exceeds its parent's, so parents come first
        if len(kept) == count and node not in stay:
            break
        if node in stay or tree.parent_list[node] in kept:
            kept.add(node)
    return tree.kept(sorted(kept))
