"""Recording work on fixed memory, to repeat it with one launch: CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

_WARM_UPS = 2


class Recording(Protocol):
    """Work that can be repeated: `output` then holds its new result, in the same memory."""

    output: Tensor

    def replay(self) -> None:
        """Does the work again on what its tensors hold now."""
        ...


Recorder = Callable[[Callable[[], Tensor]], Recording]
"""Records work that takes its inputs from tensors which stay where they are."""


class CudaRecorder:
    """Records CUDA graphs on a stream of its own; they share one memory pool.

    Guarantee: an output is valid until the next recording of the same pool is replayed; whoever
    needs it longer copies it. Only one may run at a time.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], Tensor]) -> Recording:
        """Warms up, then records. Raises what torch raises where work cannot be recorded."""
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                for _ in range(_WARM_UPS):  # libraries allocate and choose kernels at first use
                    work()
            current.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(
                graph,
                pool=self._pool,
                stream=self._stream,
                # Other threads may go on using the GPU, as a server's do.
                capture_error_mode="thread_local",
            ):
                output = work()
        return _Graph(graph, output)


class _Graph:
    def __init__(self, graph: torch.cuda.CUDAGraph, output: Tensor) -> None:
        self._graph, self.output = graph, output

    def replay(self) -> None:
        self._graph.replay()


class Repeated:
    """Repeats the work without a graph, for tests and dry runs without a GPU."""

    def __init__(self, work: Callable[[], Tensor]) -> None:
        self._work = work
        self.output = work().clone()

    def replay(self) -> None:
        """Does the work; the result goes where the first one was."""
        self.output.copy_(self._work())
