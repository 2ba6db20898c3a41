"""Arms: the ways to draft that a planner chooses from, and the statistics of each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from redwood.drafters.base import Drafter, ModelDrafter, NoDrafter, UnionDrafter
from redwood.planner.budget import DecayedMean

BELIEF = 4.0
"""Weight of a prior, in steps; within a text it decays as other steps do."""
FIRST_PAUSE = 16
"""Steps before an arm that lost is explored again; doubled each time that it loses."""


class Arm(NamedTuple):
    """A way to draft, and the draft models that take part in it."""

    drafter: Drafter
    models: tuple[ModelDrafter, ...]


def arms_of(drafter: Drafter) -> list[Arm]:
    """Returns plain decoding, every part of the drafter alone, and all parts in one tree."""
    parts = list(drafter.parts) if isinstance(drafter, UnionDrafter) else [drafter]
    drafting = [part for part in parts if not isinstance(part, NoDrafter)]
    arms = [Arm(NoDrafter(), ())]
    arms += [Arm(p, (p,) if isinstance(p, ModelDrafter) else ()) for p in drafting]
    if len(drafting) > 1:
        arms.append(Arm(drafter, tuple(p for p in drafting if isinstance(p, ModelDrafter))))
    return arms


@dataclass
class ArmStats:
    """Statistics of an arm.

    Attributes:
        tokens, cost: priors: of a row per step; of a step, in plain passes.
        tokens_seen, cost_seen: means over all texts.
        texts: mean tokens per step by request.
        last: step in which it drafted last.
        pause: steps before it is explored again.
    """

    tokens: float
    cost: float
    tokens_seen: DecayedMean = field(default_factory=DecayedMean)
    cost_seen: DecayedMean = field(default_factory=DecayedMean)
    texts: dict[int, DecayedMean] = field(default_factory=dict)
    last: int = -FIRST_PAUSE
    pause: int = FIRST_PAUSE

    def tokens_of(self, key: int) -> float:
        """Tokens per step in this text."""
        return self.texts[key].value(1.0, 0.0) if key in self.texts else self.known()

    def known(self) -> float:
        """Tokens per step over all texts."""
        return self.tokens_seen.value(self.tokens, BELIEF)

    def cost_now(self) -> float:
        """Cost of a step, in plain passes."""
        return self.cost_seen.value(self.cost, BELIEF)
