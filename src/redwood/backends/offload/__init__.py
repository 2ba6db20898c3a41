"""Models larger than memory: weights stream from disk or host memory, piece by piece.

`load` opens a model so, `file` reads its weights, `forms` are the ways they are held, `stream`,
`streamed`, `streamed_experts` and `to_device` bring them where they are needed, `backend` runs the
passes. `stored_experts` knows where folders keep the experts that Transformers stacks.
"""

from redwood.backends.offload.backend import OffloadBackend

__all__ = ["OffloadBackend"]
