"""Drafters: whatever proposes a tree of tokens for a text.

Inside: `base` (the protocol, plain decoding, unions), `ngram`, `model`, `prediction` (an expected
answer), `draft_tree` (growing a tree level by level), `context` (a request as drafters see it),
`limits` (what they may do in a step), `proposing` (asking them, whatever they answer). Not here:
how many nodes pay, which the planner decides. May import: algorithms, datastore, backends and all
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
