"""Pieces of a stream on a GPU: copied by a CUDA stream of their own while the last one computes.

Not yet run on a GPU; on a CPU, where a copy has ended when it returns, the tests run it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from redwood.backends.offload.stream import Stream

_SLOTS = 2  # one computes while the other is filled


class DevicePieces:
    """The pieces of a stream, on a device.

    Args:
        host: in pinned memory, if the device is a GPU.
        device: where pieces are lent.
    """

    def __init__(self, host: Stream, device: torch.device) -> None:
        self.host = host
        self._gpu = device if device.type == "cuda" else None
        self._slots = [
            torch.empty(host.largest, dtype=torch.uint8, device=device) for _ in range(_SLOTS)
        ]
        self._copier = None if self._gpu is None else torch.cuda.Stream(self._gpu)  # type: ignore[no-untyped-call]
        self._read: list[torch.cuda.Event | None] = [None] * _SLOTS
        self._turn = 0
        self._held: dict[int, Tensor] = {}

    @property
    def kept_bytes(self) -> int:
        """Bytes of the pieces that stay on the device, once they have been used."""
        return self.host.size_of(self.host.left_out)

    @property
    def held_bytes(self) -> int:
        """Bytes of the pieces that are there now."""
        return sum(len(held) for held in self._held.values())

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the buffers on the device."""
        return _SLOTS * self.host.largest

    made_bytes = buffer_bytes

    def keep(self, room: int) -> None:
        """Lets as many pieces stay on the device as fit into `room` bytes, and no more."""
        self.host.leave_out(self.host.evenly(room))
        for index in set(self._held) - self.host.left_out:
            del self._held[index]

    def announce(self, group: int, pieces: Sequence[int]) -> None:
        """Says which pieces of a group come next; see `Stream.announce`."""
        self.host.announce(group, [piece for piece in pieces if piece not in self._held])

    @contextmanager
    def piece(self, index: int) -> Iterator[Tensor]:
        """Lends the bytes of a piece on the device, uint8 [size], to the current CUDA stream."""
        held = self._held.get(index)
        if held is not None:
            self.host.pass_by(index)
            yield held
            return
        self._turn = (self._turn + 1) % _SLOTS
        with self.host.piece(index) as data:
            lent = self._slots[self._turn][: len(data)]
            self._copy(data, lent)
            yield lent
            if index in self.host.left_out:
                self._held[index] = lent.clone()
        if self._gpu is not None:
            self._read[self._turn] = torch.cuda.current_stream(self._gpu).record_event()

    def _copy(self, data: Tensor, into: Tensor) -> None:
        if self._copier is None:
            into.copy_(data)
            return
        used = self._read[self._turn]
        if used is not None:  # what was there may still be read
            self._copier.wait_event(used)
        with torch.cuda.stream(self._copier):
            into.copy_(data, non_blocking=True)
            copied = self._copier.record_event()
        torch.cuda.current_stream(self._gpu).wait_event(copied)
        if not self.host.is_held(data):
            copied.synchronize()  # the buffer is filled anew when the block ends
