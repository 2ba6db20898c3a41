"""Drafters: they propose draft trees.

Inside: `base` (the protocol, plain decoding, unions), `ngram`, `model`, `prediction` (an expected
answer), `draft_tree` (growing a tree level by level), `context` (a request as drafters see it),
`limits` (what they may do in a step), `proposing` (calls that survive a faulty drafter), `names`.
Not here: tree sizes, which the planner chooses. May import: algorithms, datastore, backends and all
below.
"""

from redwood.drafters.base import (
    Drafter,
    ModelDrafter,
    NgramDrafter,
    NoDrafter,
    UnionDrafter,
    join_drafters,
)

__all__ = ["Drafter", "ModelDrafter", "NgramDrafter", "NoDrafter", "UnionDrafter", "join_drafters"]
