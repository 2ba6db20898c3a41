"""What drafters may do in one step beside their budgets: levels and sizes that pay, by time.

A value that the planner makes and `propose` hands on; it holds for that call alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


class LevelPolicy(Protocol):
    """Decides, level by level, whether drafting on is worth its time."""

    def num_expansions(
        self,
        tokens: float,
        nodes: int,
        free: Sequence[float],
        gains: Sequence[float],
        added: Sequence[int],
        widths: Sequence[int],
    ) -> int:
        """Returns how many of the offers, the first ones, draft another level.

        Args:
            tokens: expected of this step from what will be scored anyway, for all rows.
            nodes: that will be scored anyway, roots included.
            free: chances of drafted nodes of which the best will be scored.
            gains: [K] further tokens that an offer promises, falling.
            added: [K] nodes that it adds for the target.
            widths: [K] nodes that the drafter scores for it.
        """
        ...


@dataclass(frozen=True)
class ModelLimits:
    """What one model drafter may do; nothing of it holds for texts that depend on a seed alone.

    Args:
        policy: asked after each level; None: the tree is always filled.
        most_drawn: nodes of a tree that is drawn with chance, since none of them can be left out
            afterwards; None: the budget. Not where the drafter was given a tree.
    """

    policy: LevelPolicy | None = None
    most_drawn: int | None = None


@dataclass(frozen=True)
class Limits:
    """What all drafters of a step may do.

    Args:
        models: by model drafter; one that is not named has no limits.
        least: chance that a node of an n-gram drafter must have to be drafted.
    """

    models: Mapping[Any, ModelLimits] = field(default_factory=dict)
    least: float = 0.0


NO_LIMITS = Limits()
