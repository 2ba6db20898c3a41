"""Models larger than memory: weights stream from disk or host memory, piece by piece.

`load` opens a model so, `file` reads its weights, `forms` are the ways they are held, `stream`,
`streamed` and `to_device` bring them where they are needed, `backend` runs the passes.
"""

from redwood.backends.offload.backend import OffloadBackend

__all__ = ["OffloadBackend"]
