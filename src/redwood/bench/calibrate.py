"""Calibration: latency and acceptance rates with this target, on this machine.

`calibrate` makes a `Profile`: latency (`profiling.measure`), acceptance rates of draft models by
rank (`acceptance`), tokens per pass by tree size for the other drafters (`sizes`), and the tables
that drafters learned meanwhile. Decisions are left to its readers, such as `choice`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from statistics import median

from redwood.bench.curves import Progress, curve_of, draft_kinds, target_kinds
from redwood.bench.decoding import Bench, measured
from redwood.drafters.base import Drafter, ModelDrafter
from redwood.engine.engine import RowEngine
from redwood.errors import ArgumentError
from redwood.profiling.measure import quick_curve
from redwood.profiling.profile import DrafterProfile, Profile, ProfileKey

__all__ = ["Progress", "calibrate", "quick_curve"]


def calibrate(
    engine: RowEngine,
    drafters: Mapping[str, Drafter],
    prompts: Sequence[Sequence[int]],
    *,
    key: ProfileKey,
    temperatures: Sequence[float] = (0.0, 0.6),
    max_tokens: int = 64,
    seconds: float = 60.0,
    on_progress: Progress | None = None,
) -> Profile:
    """Returns the profile. The engine must be idle, and is unchanged afterwards.

    Args:
        drafters: by name; single ones, no unions. Their `reliability` is unchanged afterwards.
        prompts: token ids; each must leave room for an answer.
        key: of the profile, with the same drafters.
        temperatures: at which acceptance rates are measured.
        max_tokens: of each answer.
        seconds: time limit of the target's latency, prefill apart; a quarter of it for a drafter's.
        on_progress: see `Progress`.

    Raises:
        ArgumentError: no prompts, no or negative temperatures, drafters that are not the key's.
        CapacityError: a prompt that does not fit.
    """
    if not prompts or not temperatures:
        raise ArgumentError("calibration needs prompts and temperatures")
    if drafters.keys() != key.drafters.keys():
        raise ArgumentError(f"drafters {list(drafters)} are not those of the key")
    report = on_progress or (lambda what, done, of: None)
    target = curve_of(engine.target, "target", target_kinds(engine.target), seconds, report)
    curves = {
        name: curve_of(drafter.backend, name, draft_kinds(drafter.backend), seconds / 4, report)
        for name, drafter in drafters.items()
        if isinstance(drafter, ModelDrafter)
    }
    made = {name: DrafterProfile(name, curves.get(name), 0.0) for name in drafters}
    step_ms: list[float] = []
    with _borrowed(engine):
        for temperature in temperatures:
            bench = Bench(engine, prompts, temperature, max_tokens, report)
            texts = bench.plain_texts()
            for name, drafter in drafters.items():
                made[name] = measured(bench, made[name], drafter, texts)
            step_ms += bench.step_ms
    stamp = datetime.now(UTC).isoformat(timespec="seconds")
    return Profile(key, stamp, target, median(step_ms), made)


@contextmanager
def _borrowed(engine: RowEngine) -> Iterator[None]:
    kept = engine.drafter, engine.budget, engine.planner
    engine.planner = None  # drafters and sizes are chosen here
    try:
        yield
    finally:
        engine.drafter, engine.budget, engine.planner = kept
