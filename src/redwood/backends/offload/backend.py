"""The offload backend: a model larger than memory, whose weights are streamed in every forward.

One pass of the weights scores a whole token tree (Sequoia, section 4.2 of arXiv 2402.12374;
SpecInfer, section 6.3 of 2305.09781). Weights come from the disk, or from the computer's memory to
a GPU. Everything else is the eager backend's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from redwood.backends.base import Nodes
from redwood.backends.eager.backend import EagerBackend
from redwood.backends.offload.stream import Stream
from redwood.errors import ArgumentError, CapacityError

_MOST_NODES = {"cpu": 128, "cuda": 768}  # of a tree; 768 is Sequoia's for a GPU
_RESERVE = 64 << 20  # bytes for activations, keys and values that are still to come
_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}
_UNITS |= {f"{unit}i": 1024**power for power, unit in enumerate("KMGT", start=1)}


class Store(Protocol):
    """Where streamed weights are lent from: a `Stream`, or one and a GPU."""

    @property
    def kept_bytes(self) -> int:
        """Bytes of the weights that stay, once they have been used."""
        ...

    @property
    def held_bytes(self) -> int:
        """Bytes of those that are there now, buffers not counted."""
        ...

    @property
    def buffer_bytes(self) -> int:
        """Bytes that the buffers take once all are in use."""
        ...

    @property
    def made_bytes(self) -> int:
        """Bytes that the buffers take now."""
        ...

    def keep(self, room: int) -> None:
        """Keeps as many weights in memory as fit into `room` bytes, and drops the others."""
        ...


class OffloadBackend(EagerBackend):
    """The eager backend over streamed weights.

    Args:
        model: whose large weights come from `stream`.
        stream: of the weights, whose forwards this ends.
        store: where they are lent from: the stream, or what stands before it.
        memory: bytes that the process may take, of the GPU's memory where that computes; None: only
            the buffers hold weights.
        threads: that multiply.
        kernels: whether those are Redwood's own, not PyTorch's.
        setting: what else its times depend on, in a word or two.
    """

    name = "offload"

    def __init__(
        self,
        model: PreTrainedModel,
        capacity: int,
        stream: Stream,
        store: Store,
        memory: int | None,
        threads: int,
        kernels: bool,
        setting: str,
    ) -> None:
        super().__init__(model, capacity)
        self.stream, self.store, self.memory = stream, store, memory
        self.threads, self.setting, self._kernels = threads, setting, kernels
        self.quantised = kernels
        self._room: int | None = None
        self.quick_nodes = (1, 48, 96)
        """Sizes that `quick_curve` times: few, since forwards are slow and nearly flat in nodes."""
        self.most_nodes = _MOST_NODES[self.device.type]
        """Nodes of one row that may pay."""

    @property
    def reserve(self) -> int:
        """Bytes left free beside weights: logits of a large tree, activations, keys and values."""
        return _RESERVE + 6 * self.most_nodes * self.vocab_size

    def settle(self) -> None:
        """Decides what stays in memory, once everything else that the process needs is there.

        Raises:
            CapacityError: `memory` is too little; the message says what is needed.
        """
        if self.memory is None:
            return
        others = self._used() - self.store.held_bytes - self.store.made_bytes
        needed = others + self.store.buffer_bytes + self.reserve
        if needed > self.memory:
            raise CapacityError(
                f"memory {_readable(self.memory)} is not enough for this model: with what the "
                f"process holds by now it needs {_readable(needed)} at least"
            )
        self._room = self.memory - needed
        self.store.keep(self._room)

    def _used(self) -> int:
        if self.device.type == "cuda":
            return int(torch.cuda.memory_allocated(self.device))
        return resident_bytes()

    def _forward(self, rows: Sequence[Nodes]) -> list[Tensor]:
        if self._room is not None:
            self._give_way()
        threads = torch.get_num_threads()
        if self._kernels:
            # PyTorch's threads spin between its small operations, on processors that the kernels
            # and the disk need: with 64 nodes that costs a third of the time (docs/scale.md).
            torch.set_num_threads(1)
        try:
            return super()._forward(rows)
        finally:
            torch.set_num_threads(threads)
            self.stream.end()

    def _give_way(self) -> None:
        """Drops kept weights if keys, values or the rest of the process need their memory."""
        assert self.memory is not None and self._room is not None
        coming = self.store.kept_bytes - self.store.held_bytes
        over = self._used() + coming + self.reserve // 2 - self.memory
        if over > 0:
            self._room = max(0, self.store.kept_bytes - over - self.reserve // 2)
            self.store.keep(self._room)


def parse_bytes(size: str | int, name: str = "memory") -> int:
    """Returns the bytes of a size such as "2GiB", "1.5G" or 2147483648.

    Args:
        name: of the option, for the error.

    Raises:
        ArgumentError: no such size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?)B?\s*", str(size), re.IGNORECASE)
    unit = None if match is None else match[2].upper().replace("I", "i")
    if match is None or unit not in _UNITS or float(match[1]) * _UNITS[unit] < 1:
        raise ArgumentError(f"{name} {size!r} must be a size such as 2GiB or 1500MB")
    return int(float(match[1]) * _UNITS[unit])


def resident_bytes() -> int:
    """Returns the memory that this process holds now; where the system does not say, its most."""
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import resource
        import sys

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else 1024 * most


def _readable(size: int) -> str:
    return f"{size / 1024**3:.2f}GiB"
