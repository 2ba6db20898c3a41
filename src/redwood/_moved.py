"""Where modules of the first layout are now: old imports work until version 0.3, with a warning."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODULES = {
    "algorithms.dynamic": "algorithms.acceptance",
    "algorithms.prediction": "drafters.prediction",
    "backends._forms": "backends.offload.forms",
    "backends._stream": "backends.offload.stream",
    "backends._to_device": "backends.offload.to_device",
    "benchmarking": "bench.report",
    "calibration": "bench.calibrate",
    "chance": "sampling.noise",
    "context": "drafters.context",
    "drafting": "drafters.base",
    "generate": "engine.text",
    "growing": "drafters.draft_tree",
    "loading": "engine.load",
    "model_drafter": "drafters.model",
    "ngram_drafter": "drafters.ngram",
    "pacing": "planner.budget",
    "peek": "planner.ngram_lookahead",
    "planning": "planner.from_profile",
    "plotting": "bench.plot",
    "profile": "profiling.profile",
    "profile_key": "profiling.key",
    "racing": "bench.interleave",
    "replicas": "server.replicas",
    "requests": "engine.request",
    "rowmath": "sampling.kernels",
    "scheduling": "engine.scheduler",
    "stats": "engine.stats",
    "text": "engine.detokenizer",
    "time_curve": "profiling.latency",
    "timing": "profiling.measure",
    "tokenizers": "models.tokenizer",
}
NAMES = {
    "Contender": "Candidate",
    "Correction": "LatencyCorrection",
    "Growing": "TreeBuilder",
    "Kept": "AcceptedPath",
    "Lane": "Stepper",
    "Levels": "LevelBudget",
    "Mean": "DecayedMean",
    "Peek": "NgramLookahead",
    "Reliability": "AcceptanceTable",
    "Seen": "Preview",
    "StepTimes": "StepBudget",
    "TimeCurve": "LatencyModel",
    "TimePoint": "LatencyPoint",
    "race": "run_interleaved",
}
"""Names in them that changed, old to new."""


class _Old(ModuleType):
    """Stands for a module under its old name."""

    def __getattr__(self, name: str) -> Any:
        home = import_module(f"redwood.{MODULES[self.__name__.removeprefix('redwood.')]}")
        if name == "__all__":  # for `import *`
            old = [was for was, now in NAMES.items() if hasattr(home, now)]
            return [*old, *(each for each in vars(home) if not each.startswith("_"))]
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(home, name if hasattr(home, name) else NAMES.get(name, name))


class _Finder(MetaPathFinder, Loader):
    """Asked where nothing else finds a module."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        name = fullname.removeprefix("redwood.")
        return ModuleSpec(fullname, self) if name != fullname and name in MODULES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Old(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        new = MODULES[module.__name__.removeprefix("redwood.")]
        # FutureWarning: users of a library see it, once a place; DeprecationWarning they do not.
        warnings.warn(
            f"{module.__name__} is redwood.{new} now; the old name goes with version 0.3",
            FutureWarning,
            stacklevel=2,
        )


def install() -> None:
    """Lets old names be imported; they cost nothing unless they are."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
