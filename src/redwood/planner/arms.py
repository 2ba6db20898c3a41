"""The ways to draft that a planner chooses from, and what it learned of each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from redwood.drafters.base import Drafter, ModelDrafter, NoDrafter, UnionDrafter
from redwood.planner.budget import DecayedMean

BELIEF = 4.0
"""Steps that count for what is believed beforehand; in a text they fade as others do."""
FIRST_PAUSE = 16
"""Steps before an arm that lost is tried again; twice as many each time."""


class Arm(NamedTuple):
    """A way to draft, and the models that take part in it."""

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
    """What is known of an arm: tokens per step, and cost in plain passes."""

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
        """Time of a step, in plain passes."""
        return self.cost_seen.value(self.cost, BELIEF)
