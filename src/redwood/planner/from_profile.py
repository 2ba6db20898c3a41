"""A planner from what is known of the machine: a profile if there is one, else quick timings."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from redwood.backends.base import Backend
from redwood.drafters.base import Drafter, ModelDrafter, NgramDrafter
from redwood.errors import ArgumentError, ProfileError, RedwoodError
from redwood.planner.arms import arms_of
from redwood.planner.planner import Measure, Planner
from redwood.profiling.key import profile_key
from redwood.profiling.latency import LatencyModel
from redwood.profiling.measure import quick_curve
from redwood.profiling.profile import DrafterProfile, Profile, profile_path
from redwood.tree import Law

_log = logging.getLogger(__name__)


def open_planner(
    target: Backend, name: str, drafter: Drafter, named: Mapping[str, Drafter], **options: Any
) -> Planner:
    """Returns a planner with what `redwood calibrate` left; arguments as of the two below."""
    return make_planner(target, drafter, known_profile(target, name, named, **options), named)


def make_planner(
    target: Backend,
    drafter: Drafter,
    profile: Profile | None = None,
    named: Mapping[str, Drafter] | None = None,
) -> Planner:
    """Returns a planner for a drafter, or for the parts of a union, together or apart.

    Without a profile, latency is measured when it is first needed, which takes a few seconds at
    most, and acceptance rates begin at typical values. With one, drafters begin with the rates that
    were measured.

    Args:
        named: parts of `drafter` by their names in the profile.
    """
    curves: dict[ModelDrafter, LatencyModel | Measure] = {
        model: partial(quick_curve, model.backend) for model in arms_of(drafter)[-1].models
    }
    for name, part in (named or {}).items():
        known = None if profile is None else profile.drafters.get(name)
        if known is not None:
            _teach(part, known)
            if isinstance(part, ModelDrafter) and known.curve is not None:
                curves[part] = known.curve
    times = partial(quick_curve, target) if profile is None else profile.target
    most: dict[str, int] = {"most": target.most_nodes} if hasattr(target, "most_nodes") else {}
    return Planner(drafter, times, curves, **most)


def known_profile(
    target: Backend, name: str, drafters: Mapping[str, Drafter], **options: Any
) -> Profile | None:
    """Returns the profile that `redwood calibrate` left for these, or None.

    One that is damaged or was made for something else is not used; a warning says so.

    Args:
        name: of the target, and drafters by name, as `redwood.load` took them.
        options: weights, kv and cpus, as `redwood.load` took them.
    """
    try:
        key = profile_key(target, name, drafters, **options)
        path = profile_path(key)
        if not path.exists():
            return None
        profile = Profile.load(path)
        for each, identity in key.drafters.items():
            if profile.key.drafters.get(each, identity) != identity:
                raise ProfileError(f"{path}: {each} has changed")
        return profile
    except RedwoodError as error:
        _log.warning("%s; `redwood calibrate` measures again", error)
        return None


def _teach(drafter: Drafter, known: DrafterProfile) -> None:
    """Loads the measured acceptance rates into a drafter."""
    sampled = [at for at in known.reliability if at != "0"]
    try:
        if isinstance(drafter, NgramDrafter):
            for tables in _first(known.reliability, ["0", *sampled]):
                drafter.reliability.load(tables)
        elif isinstance(drafter, ModelDrafter):
            drafter.acceptance = known.rates(0.0) or known.rates(1.0) or drafter.acceptance
            for law, table in drafter.reliability.items():
                order = ["0"] if law == Law.POINT else sampled
                for tables in _first(known.reliability, order):
                    if law.name in tables:
                        table.load(tables[law.name])
    except (ArgumentError, TypeError) as error:
        _log.warning("the profile cannot be used for %s: %s", known.name, error)


def _first(tables: Mapping[str, Any], order: Sequence[str]) -> list[Any]:
    return [tables[at] for at in order if at in tables][:1]
