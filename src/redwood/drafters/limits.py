"""Limits of drafters in one step, beside their budgets: levels and tree sizes that pay.

A value that the planner makes and `propose` passes on; it holds for that call alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from redwood.tree import TokenTree


class LevelPolicy(Protocol):
    """Decides, level by level, whether drafting another one pays."""

    def num_expansions(
        self,
        tokens: float,
        nodes: int,
        free: Sequence[float],
        gains: Sequence[float],
        added: Sequence[int],
        widths: Sequence[int],
    ) -> int:
        """Returns how many of the offers, the first ones, are expanded by another level.

        Args:
            tokens: expected of the nodes that are scored in any case, of all rows.
            nodes: number of these, roots included.
            free: estimates of drafted nodes that may be pruned.
            gains: [K] further tokens expected of each offer, not increasing.
            added: [K] nodes that each adds for the target.
            widths: [K] nodes that the drafter has yet to score for each; 0: a guess was right,
                and expanding it takes no pass.
        """
        ...


@dataclass(frozen=True)
class ModelLimits:
    """Limits of one model drafter; they do not apply to texts that depend on a seed alone.

    Args:
        policy: asked after each level; None: the tree is always filled.
        most_drawn: most nodes of a tree that is drawn at random, since none of them can be pruned
            afterwards; None: the budget. Not where the drafter was given a tree.
        pass_ms: latency of a pass over 1, 2, ... nodes of one row, by which nodes are guessed;
            empty: unknown.
    """

    policy: LevelPolicy | None = None
    most_drawn: int | None = None
    pass_ms: Sequence[float] = ()


@dataclass(frozen=True)
class Limits:
    """Limits of all drafters of a step.

    Args:
        models: by model drafter; one that is not named has no limits.
        least: smallest estimate of a node that an n-gram drafter drafts.
        guesses: by key of a context, a tree below its last token, of whatever source: nodes that
            model drafters may score in advance, see `redwood.drafters.guesses`.
    """

    models: Mapping[Any, ModelLimits] = field(default_factory=dict)
    least: float = 0.0
    guesses: Mapping[int, TokenTree] = field(default_factory=dict)


NO_LIMITS = Limits()
