"""Collective boost-tuning: small drafters that learn the answers of one target, then draft as one.

Source: arXiv 2305.09781, section 3, learning-based speculator. The target answers prompts
(`collect`); a small model, maybe the target's own first layers (`shallow`), is trained on the
answers (`training`); what it says right is marked, and the next model is trained on the rest
(`boost`). `measure` tells on held-out prompts what that brought, and `project` does all of it in a
folder, so that an interrupted run goes on. Nothing here can change a text: drafts are verified.
"""

from __future__ import annotations

from redwood.tuning.boost import boost
from redwood.tuning.checkpoint import TrainingHistory
from redwood.tuning.collect import collect
from redwood.tuning.corpus import Sample, read_corpus
from redwood.tuning.measure import Rates, measure, union_rates
from redwood.tuning.packing import agreement
from redwood.tuning.project import Project, TuningPlan
from redwood.tuning.shallow import shallow_copy
from redwood.tuning.training import Settings, tune

__all__ = [
    "TrainingHistory",
    "TuningPlan",
    "Project",
    "Rates",
    "Sample",
    "Settings",
    "agreement",
    "boost",
    "collect",
    "measure",
    "read_corpus",
    "shallow_copy",
    "tune",
    "union_rates",
]
