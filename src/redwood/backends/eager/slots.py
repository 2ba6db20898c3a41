"""Rows of the eager backend: slots of keys and values by layer, and what recurrent layers left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from redwood.backends.eager.memory import RowMemory
from redwood.backends.rows import RowState

_FIRST_SLOTS = 256


class Slots(Protocol):
    """A row as a forward sees it."""

    length: int
    parents: list[int]
    depths: list[int]

    def write(self, layer: int, keys: Tensor, values: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Stores keys and values [kv_heads, n, dim] from slot `start`; returns all up to there."""
        ...


class SlotIndex:
    """Slots to copy from: their numbers go to a device once, for all its layers and rows."""

    def __init__(self, sources: Sequence[int]) -> None:
        self._sources = torch.tensor(sources)
        self._there: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """Returns the numbers, int64, on this device."""
        if device not in self._there:
            self._there[device] = self._sources.to(device)
        return self._there[device]


class Row(RowState):
    """One sequence, with the slots of every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}  # keys, values: [kv_heads, slots, dim]
        self.recurrent = RowMemory()

    @property
    def slots(self) -> int:
        """Slots that memory is taken for."""
        return max((keys.shape[1] for keys, _ in self.layers.values()), default=0)

    @property
    def token_bytes(self) -> int:
        """Bytes of keys and values of one slot."""
        return sum(x[:, :1].nbytes for pair in self.layers.values() for x in pair)

    def write(self, layer: int, keys: Tensor, values: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Stores keys and values [kv_heads, n, dim] from slot `start`; returns all up to there."""
        end = start + keys.shape[1]
        held = self.layers.get(layer)
        if held is None or held[0].shape[1] < end:
            slots = max(_FIRST_SLOTS, 1 << (end - 1).bit_length())
            grown = tuple(x.new_empty(x.shape[0], slots, x.shape[2]) for x in (keys, values))
            for old, new in zip(held or (), grown, strict=False):
                new[:, :start] = old[:, :start]
            held = self.layers[layer] = (grown[0], grown[1])
        held[0][:, start:end] = keys
        held[1][:, start:end] = values
        return held[0][:, :end], held[1][:, :end]

    def pack(self, start: int, sources: slice, index: SlotIndex) -> None:
        """Copies the slots index[sources], in order, to those from `start` on."""
        end = start + sources.stop - sources.start
        for keys, values in self.layers.values():
            chosen = index.on(keys.device)[sources]
            keys[:, start:end] = keys.index_select(1, chosen)
            values[:, start:end] = values.index_select(1, chosen)
