"""Predictions from a profile: tokens per step and speed by tree size and levels, and the best tree.

Sequoia's optimiser on measured numbers: one static tree for all steps, which adapts to nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from redwood.algorithms.sequoia import choose_tree, expected_tokens, optimal_tree
from redwood.bench.curves import CONTEXT
from redwood.profiling.profile import Profile, temperature_name

MOST_NODES = 64
_LEVEL_WIDTH = 2  # nodes of a level that the drafter is timed with; most levels are this narrow


class Choice(NamedTuple):
    """The fastest tree of one drafter at one temperature.

    `levels` is None for a drafter without a model; `tokens` are expected per step, `tokens_per_s`
    and `speedup` over plain decoding follow from the measured times.
    """

    drafter: str
    temperature: str
    size: int
    levels: int | None
    tokens: float
    tokens_per_s: float
    speedup: float


def step_times(profile: Profile, drafter: str, context: int = CONTEXT) -> dict[int, float]:
    """Returns milliseconds of a step by nodes, 1 to 64, without the forwards of a draft model."""
    target = profile.target.times(context, MOST_NODES)
    per_node = profile.drafters[drafter].draft_ms
    return {
        nodes: float(target[nodes]) + profile.step_ms + per_node * (nodes - 1)
        for nodes in range(1, MOST_NODES + 1)
    }


def level_ms(profile: Profile, drafter: str, context: int = CONTEXT) -> float:
    """Returns milliseconds of a level of a draft model; 0 without a model."""
    curve = profile.drafters[drafter].curve
    return 0.0 if curve is None else curve.ms([_LEVEL_WIDTH], [context])


def choices(profile: Profile, context: int = CONTEXT) -> list[Choice]:
    """Returns the best tree for every drafter and temperature that were measured.

    A model's tree is `choose_tree`'s for its teacher-forced acceptance rates and the target's
    latency behind `context` tokens. Other drafters have the best of the measured sizes only.
    """
    made = []
    for name, drafter in profile.drafters.items():
        times = step_times(profile, name, context)
        for at in sorted({*drafter.acceptance, *drafter.tokens_by_size}, key=float):
            if at in drafter.acceptance:
                rates = drafter.acceptance[at][0].rates
                plan = choose_tree(rates, times, level_ms(profile, name, context))
                size, tokens, ms = plan.size, plan.expected_tokens, plan.time_per_token
                levels: int | None = plan.levels
            else:
                sizes = drafter.tokens_by_size[at]
                known = {1: 1.0} | {n: t for n, t in sizes.items() if n in times}
                size = min(known, key=lambda n: (times[n] / known[n], n))
                tokens, ms, levels = known[size], times[size] / known[size], None
            made.append(Choice(name, at, size, levels, tokens, 1000.0 / ms, times[1] / ms))
    return made


def speeds(
    profile: Profile,
    drafter: str,
    temperature: float,
    sizes: Sequence[int],
    levels: Sequence[int],
    context: int = CONTEXT,
) -> list[list[float]]:
    """Returns the predicted speedup over plain decoding, [levels][sizes], of a model's best trees.

    NaN where a tree of this size cannot have this many levels.
    """
    rates = profile.drafters[drafter].acceptance[temperature_name(temperature)][0].rates
    times, per_level = step_times(profile, drafter, context), level_ms(profile, drafter, context)
    table = []
    for most in levels:
        row = []
        for size in sizes:
            if (most == 1) != (size == 1) or most > size:
                row.append(float("nan"))
                continue
            tokens = expected_tokens(optimal_tree(rates, size, max_levels=most), rates)
            step = times[size] + (per_level * most if size > 1 else 0.0)
            row.append(times[1] * tokens / step)
        table.append(row)
    return table
