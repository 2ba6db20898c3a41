"""One model over several processes, by tensor or pipeline parallelism.

`ranks` talks between processes, `load` opens the parts, `backend` is what rank 0's engine sees.
"""

from redwood.backends.parallel.backend import ParallelBackend

__all__ = ["ParallelBackend"]
