"""Verification: the rule that a request asks for, applied to its tree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from redwood import verify
from redwood.drafters.context import Context
from redwood.engine.request import Request
from redwood.sampling import PathRows
from redwood.tree import TokenTree


class Scored(NamedTuple):
    """The target's logits by row and node, and the seconds of the pass; usual: no recording."""

    logits: Sequence[Tensor]
    seconds: float
    usual: bool


class Accepted(NamedTuple):
    """A row's tree after verification."""

    request: Request
    tree: TokenTree
    rows: PathRows
    kept: verify.Acceptance


def verify_rows(context: Context, tree: TokenTree, rows: PathRows) -> verify.Acceptance:
    """Returns what the request's rule accepts of a tree, given the target's rows."""
    params = context.params
    if params.temperature == 0.0:
        return verify.greedy(tree, rows.best)
    if context.noise is not None:
        noise, first = context.noise, len(context.token_ids)
        return verify.coupled_by(
            tree, lambda node: rows.choice(node, noise, first + tree.depths[node])
        )
    rule: Callable[..., verify.Acceptance] = verify.traversal
    if params.verifier == "recursive":
        rule = verify.recursive
    return rule(tree, rows, context.rng.random(len(tree)))
