"""The forwards that are timed for a profile."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from redwood.backends.base import Backend
from redwood.profiling.latency import LatencyModel
from redwood.profiling.measure import Kind, fill_seconds, measure_curve

Progress = Callable[[str, int, int], None]
"""Called with the name of the measurement, the number of rounds done, and that of all."""

NODES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48, 64)
LARGE = (96, 128, 192, 256, 384, 512, 768)
"""Sizes beyond those, for a backend whose `most_nodes` go so far."""
CONTEXT = 128
"""Tokens before most timed forwards."""

_FURTHER_CONTEXTS, _FEW_NODES = (1024, 4096), (1, 4, 16, 64)
_ROWS, _ROW_NODES = (2, 4), (1, 4, 16)
_WIDTHS = 8
_REPEATS = 21
_MOST_FILL_SECONDS = 20.0


def target_kinds(target: Backend) -> list[Kind]:
    """Returns the forwards of a target to time: most behind 128 tokens, some with more."""
    sizes = [*NODES, *(nodes for nodes in LARGE if nodes <= getattr(target, "most_nodes", 0))]
    context = max(0, min(CONTEXT, target.capacity - sizes[-1]))
    kinds = [Kind(1, nodes, context) for nodes in sizes]
    kinds += [Kind(rows, nodes, context) for rows in _ROWS for nodes in _ROW_NODES]
    return kinds + [Kind(1, nodes, longer) for longer in _contexts(target) for nodes in _FEW_NODES]


def draft_kinds(draft: Backend) -> list[Kind]:
    """Returns the forwards of a draft model to time: levels of 1 to 8 nodes."""
    context = max(0, min(CONTEXT, draft.capacity - _WIDTHS))
    kinds = [Kind(1, width, context) for width in range(1, _WIDTHS + 1)]
    kinds += [Kind(rows, width, context) for rows in _ROWS for width in (1, 4)]
    return kinds + [Kind(1, width, longer) for longer in _contexts(draft) for width in (1, 8)]


def _contexts(backend: Backend) -> list[int]:
    """Further contexts that fit the backend and are quickly prefilled."""
    fitting = [each for each in _FURTHER_CONTEXTS if each + NODES[-1] <= backend.capacity]
    if not fitting:
        return []
    per_token = fill_seconds(backend, CONTEXT) / CONTEXT
    return [each for each in fitting if each * per_token <= _MOST_FILL_SECONDS]


def curve_of(
    backend: Backend, name: str, kinds: Sequence[Kind], seconds: float, report: Progress
) -> LatencyModel:
    """Returns the measured latency model of a backend; `name` is for progress."""
    what = f"Timing {name}"
    report(what, 0, _REPEATS)
    return measure_curve(
        backend,
        kinds,
        repeats=_REPEATS,
        seconds=seconds,
        on_round=lambda done: report(what, done, _REPEATS),
    )
