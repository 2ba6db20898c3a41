"""The CUDA-graph backend: the eager one with keys and values in fixed places, replayed.

`static` holds them, `recording` records, `backend` chooses the graph.
"""

from redwood.backends.cuda_graph.backend import CudaGraphBackend

__all__ = ["CudaGraphBackend"]
