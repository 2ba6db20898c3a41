"""Drafters: they propose draft trees.

Inside: `base` (the protocol, plain decoding, unions), `ngram`, `model`, `prediction` (an expected
answer), `draft_tree` (growing a tree level by level), `context` (a request as drafters see it),
`limits` (what they may do in a step), `proposing` (calls that survive a faulty drafter), `names`.
Not here: tree sizes, which the planner chooses. May import: algorithms, datastore, backends and all
below.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from redwood.drafters.base import (
        Drafter,
        ModelDrafter,
        NgramDrafter,
        NoDrafter,
        UnionDrafter,
        join_drafters,
    )

__all__ = ["Drafter", "ModelDrafter", "NgramDrafter", "NoDrafter", "UnionDrafter", "join_drafters"]

if not TYPE_CHECKING:  # the command line reads drafters' names, and must not wait for PyTorch

    def __getattr__(name: str) -> object:
        if name in __all__:
            return getattr(import_module("redwood.drafters.base"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
