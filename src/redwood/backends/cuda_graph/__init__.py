"""The CUDA-graph backend: the eager one with keys and values in fixed places, replayed.

`static` holds them, `recording` records, `backend` chooses the graph.
"""
