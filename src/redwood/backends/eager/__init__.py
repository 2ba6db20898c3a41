"""The eager backend: Transformers' own modules with our attention function.

`stock` loads them, `backend` runs them, `load` joins both. `probe` checks at load that a tree's
logits are right, on a `small` model of the same make too, and `together` how rows may share a
forward. `packing` packs linear layers once for the CPU.
"""

from redwood.backends.eager.backend import EagerBackend

__all__ = ["EagerBackend"]
