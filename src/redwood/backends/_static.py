"""A forward that finds everything at fixed addresses: slots, inputs, and attention over them.

A CUDA graph repeats the same work on the same memory. So keys and values live in tensors that stay
where they are, what differs between forwards is written into input tensors, and the forward itself
reads nothing else. Recording and repeating it is in `cuda_graph.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from redwood._transformers import CacheHandle, attention_of, cached_logits
from redwood.backends import eager
from redwood.backends._rows import RowState
from redwood.backends.base import Nodes
from redwood.tree import ancestor_mask

ATTENTION = "redwood_static"  # the name under which this attention is registered


class StaticRow(RowState):
    """One sequence; `place` is its index in the static slots."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.place = place


class Shape(NamedTuple):
    """What one forward computes.

    Args:
        first: place of the first row.
        rows: number of places from there on, those without nodes in this forward included.
        nodes: nodes per row; rows with fewer are padded in front.
        slots: how many slots of a row attention reads.
        kept: how many of the last nodes get logits.
    """

    first: int
    rows: int
    nodes: int
    slots: int
    kept: int


class StaticSlots:
    """Keys and values of all layers and rows. The last slot of a row is scratch, for padding.

    Args:
        layers: keys and values [heads, any, dim] by layer, for their sizes, dtype and device.
        rows: number of rows that there is room for.
        slots: slots of a row, the scratch slot included.
    """

    def __init__(self, layers: Mapping[int, tuple[Tensor, Tensor]], rows: int, slots: int) -> None:
        self.rows, self.slots = rows, slots
        self._blocks: list[Tensor] = []  # [layers and parts of one size, rows, heads, slots, dim]
        self._index: dict[tuple[int, int], tuple[int, int]] = {}
        sizes: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for layer, pair in layers.items():
            for part, tensor in enumerate(pair):
                sizes.setdefault((tensor.shape[0], tensor.shape[2]), []).append((layer, part))
        like = next(iter(layers.values()))[0]
        for (heads, dim), members in sizes.items():
            for i, member in enumerate(members):
                self._index[member] = (len(self._blocks), i)
            # NOTE: zeros, not empty: a masked slot has weight 0, and 0 times NaN is NaN.
            self._blocks.append(like.new_zeros(len(members), rows, heads, slots, dim))

    def view(self, layer: int, part: int, first: int, rows: int) -> Tensor:
        """Returns keys (part 0) or values (1) of these rows, [rows, heads, slots, dim]."""
        block, i = self._index[layer, part]
        return self._blocks[block][i, first : first + rows]

    def grow(self) -> None:
        """Doubles the rows. Everything moves: what was recorded before is void."""
        self._blocks = [torch.cat([block, torch.zeros_like(block)], 1) for block in self._blocks]
        self.rows *= 2

    def clear(self, place: int) -> None:
        """Empties a row, so that nothing of the one that had it before can be read."""
        for block in self._blocks:
            block[:, place].zero_()

    def move(self, source: int, place: int) -> None:
        """Copies a row to another place."""
        for block in self._blocks:
            block[:, place] = block[:, source]

    def pack(self, place: int, start: int, sources: Sequence[int]) -> None:
        """Copies these slots of a row, in order, to the slots from `start` on."""
        for block in self._blocks:
            index = torch.tensor(sources, device=block.device)
            block[:, place, :, start : start + len(sources)] = block[:, place].index_select(
                2, index
            )


class StaticForward(CacheHandle):
    """One forward of a fixed shape: its inputs, and the cache handle that the module is given."""

    def __init__(self, model: PreTrainedModel, slots: StaticSlots, shape: Shape) -> None:
        self._model, self._slots, self.shape = model, slots, shape
        nodes, device = shape.nodes, model.device
        self._numbers = torch.zeros(
            (shape.rows, 3 * nodes + shape.slots), dtype=torch.int64, device=device
        )
        self._ids, self._positions, self._targets = self._numbers[:, : 3 * nodes].chunk(3, 1)
        self._held = self._numbers[:, 3 * nodes :]  # positions of what the slots hold
        self._seen = torch.zeros(
            (shape.rows, nodes, shape.slots), dtype=torch.bool, device=device
        )  # whether a node sees a slot
        self._row_index = torch.arange(shape.rows, device=device)[:, None]
        self._biases: dict[tuple[int | None, int], Tensor] = {}
        self.fill([], [])

    def fill(self, rows: Sequence[StaticRow], nodes: Sequence[Nodes]) -> None:
        """Writes the inputs: these new nodes, already counted in their rows, and padding.

        A padded node writes to the scratch slot and sees slot 0 only: a softmax over nothing would
        be NaN, and its keys would stay NaN in the scratch slot.
        """
        width = self.shape.nodes
        numbers = np.zeros(self._numbers.shape, dtype=np.int64)
        ids, positions, targets = np.split(numbers[:, : 3 * width], 3, axis=1)
        held = numbers[:, 3 * width :]
        targets[:] = self._slots.slots - 1
        seen = np.zeros(self._seen.shape, dtype=np.bool_)
        seen[:, :, 0] = True
        for row, added in zip(rows, nodes, strict=True):
            i, count = row.place - self.shape.first, len(added.token_ids)
            end = row.length + len(row.parents)
            depths = np.array(row.depths) + row.length
            ids[i, -count:] = added.token_ids
            positions[i, -count:] = depths[-count:]
            targets[i, -count:] = np.arange(end - count, end)
            held[i, : row.length] = np.arange(row.length)
            held[i, row.length : end] = depths
            seen[i, -count:, : row.length] = True
            seen[i, -count:, row.length : end] = ancestor_mask(row.parents, count)
        self._numbers.copy_(torch.from_numpy(numbers))
        self._seen.copy_(torch.from_numpy(seen))

    def run(self) -> Tensor:
        """Returns logits [rows, kept, V], and stores keys and values of the nodes."""
        if attention_of(self._model.config) != ATTENTION:
            self._model.set_attn_implementation(ATTENTION)
        try:
            return cached_logits(self._model, self._ids, self._positions, self, self.shape.kept)
        finally:
            self._biases = {}  # they hold for these inputs only

    def attend(
        self,
        layer: int,
        query: Tensor,
        new: tuple[Tensor, Tensor],
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """Attention over the slots, after `new` keys and values are written to theirs.

        Args:
            query: [rows, heads, nodes, dim].
            new: keys and values of the nodes, [rows, kv_heads, nodes, dim] each.
            window: positions that a node sees, itself included; None: all.

        Returns: [rows, nodes, heads, dim of the values].
        """
        keys, values = (self._write(layer, part, added) for part, added in enumerate(new))
        rows, heads, nodes, dim = query.shape
        kv_heads = keys.shape[1]
        groups = heads // kv_heads
        # Heads that share keys become more queries of the same head: no copy of the keys is made.
        q = query.reshape(rows, kv_heads, groups * nodes, dim)
        bias = self._bias(window, groups, query.dtype)
        if softcap is None:
            out = scaled_dot_product_attention(q, keys, values, bias, scale=scale)
        else:
            scores = softcap * torch.tanh((q @ keys.transpose(2, 3)) * (scale / softcap))
            out = (scores + bias).float().softmax(-1).to(q.dtype) @ values
        return out.reshape(rows, heads, nodes, -1).transpose(1, 2)

    def _write(self, layer: int, part: int, new: Tensor) -> Tensor:
        """Stores the nodes' keys or values; returns the slots that attention reads."""
        held = self._slots.view(layer, part, self.shape.first, self.shape.rows)
        held.transpose(1, 2)[self._row_index, self._targets] = new.transpose(1, 2)
        return held[:, :, : self.shape.slots]

    def _bias(self, window: int | None, groups: int, dtype: torch.dtype) -> Tensor:
        """0 where a node sees a slot, else -inf: [rows, 1, groups * nodes, slots]."""
        key = (window, groups)
        if key not in self._biases:
            seen = self._seen
            if window is not None:
                near = self._held[:, None, :] > self._positions[:, :, None] - window
                # Slot 0 stays open to padded nodes, whose position is 0.
                seen = seen & near
            bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
            bias = bias.masked_fill(~seen, float("-inf"))
            self._biases[key] = bias.repeat(1, groups, 1)[:, None]
        return self._biases[key]


_EAGER = AttentionInterface()[eager.ATTENTION]


def _attention(
    module: Any, query: Tensor, key: Any, value: Tensor, attention_mask: Any = None, **given: Any
) -> tuple[Tensor, None]:
    """Serves both backends, so that they can share one model."""
    if not isinstance(key, tuple) or not isinstance(key[0], StaticForward):
        served: tuple[Tensor, None] = _EAGER(module, query, key, value, attention_mask, **given)
        return served
    forward, layer, keys = key
    scale = given.get("scaling")
    out = forward.attend(
        layer,
        query,
        (keys, value),
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        window=given.get("sliding_window"),
        softcap=given.get("softcap"),
    )
    return out, None


AttentionInterface.register(ATTENTION, _attention)
