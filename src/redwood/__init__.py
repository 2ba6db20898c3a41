"""Redwood: exact tree-based speculative decoding.

Names are imported when they are first used, so that `import redwood` and the command line start at
once and torch is loaded only where it is needed.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING

from redwood import _moved

if TYPE_CHECKING:
    from redwood.drafters.base import Drafter, ModelDrafter, NgramDrafter, NoDrafter, UnionDrafter
    from redwood.engine.engine import Step
    from redwood.engine.load import load
    from redwood.engine.text import Engine, Output, Piece
    from redwood.errors import RedwoodError
    from redwood.sampling import SamplingParams
    from redwood.tree import Law, TokenTree
    from redwood.verify import Acceptance

__version__ = "0.1.0"

_moved.install()

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

_HOMES = {
    "drafters.base": ("Drafter", "ModelDrafter", "NgramDrafter", "NoDrafter", "UnionDrafter"),
    "engine.engine": ("Step",),
    "errors": ("RedwoodError",),
    "engine.text": ("Engine", "Output", "Piece"),
    "engine.load": ("load",),
    "sampling": ("SamplingParams",),
    "tree": ("Law", "TokenTree"),
    "verify": ("Acceptance",),
}
_MODULES = (
    "algorithms.sequoia",
    "algorithms.specinfer",
    "algorithms.sssd",
    "backends.base",
    "backends.load",
    "datastore",
    "hf",
    "models",
    "sampling",
    "engine",
    "testing",
    *_HOMES,
)

if not TYPE_CHECKING:  # a checker that saw this function would believe in any name

    def __getattr__(name: str) -> object:
        for home, names in _HOMES.items():
            if name in names:
                value = globals()[name] = getattr(import_module(f"redwood.{home}"), name)
                return value
        modules = [m for m in _MODULES if m.split(".")[0] == name]
        for module in modules:
            import_module(f"redwood.{module}")
        if not modules:
            raise AttributeError(f"module 'redwood' has no attribute {name!r}")
        return sys.modules[f"redwood.{name}"]

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
