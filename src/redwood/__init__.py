"""Redwood: exact tree-based speculative decoding."""

from redwood.drafting import Drafter, ModelDrafter, NgramDrafter, NoDrafter, UnionDrafter
from redwood.engine import Step
from redwood.errors import RedwoodError
from redwood.generate import Engine, Output, Piece, load
from redwood.sampling import SamplingParams
from redwood.tree import Law, TokenTree
from redwood.verify import Acceptance

__version__ = "0.1.0"

__all__ = [
    "Acceptance",
    "Drafter",
    "Engine",
    "Law",
    "ModelDrafter",
    "NgramDrafter",
    "NoDrafter",
    "Output",
    "Piece",
    "RedwoodError",
    "SamplingParams",
    "Step",
    "TokenTree",
    "UnionDrafter",
    "load",
]
