"""A forward that finds everything at fixed addresses: slots, inputs, and attention over them.

A CUDA graph repeats the same work on the same memory. So keys and values live in tensors that stay
where they are, what differs between forwards is written into input tensors, and the forward itself
reads nothing else. Recording and repeating it is in `backend`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from redwood.backends.base import Nodes
from redwood.backends.eager import backend as eager
from redwood.backends.eager.slots import SlotIndex
from redwood.backends.rows import RowState
from redwood.errors import UnsupportedError
from redwood.models._transformers import CacheHandle, attention_of, cached_logits
from redwood.tree import ancestor_mask

ATTENTION = "redwood_static"  # the name under which this attention is registered
_BLOCKS = 8  # that layers of one size lie in


class GraphShape(NamedTuple):
    """What one forward computes.

    Args:
        rows: number of places, those without nodes in this forward included.
        nodes: nodes per row; rows with fewer are padded in front.
        slots: how many slots of a row attention reads.
        tree: provisional nodes that a row may have, those of earlier forwards included.
    """

    rows: int
    nodes: int
    slots: int
    tree: int


class StaticSlots:
    """Keys and values of all layers and rows. The last slot of a row is scratch, for padding.

    Layers lie in a few blocks: one copy serves many of them, and growing needs the old and the new
    of one block at a time. Nothing is zeroed or copied but what a forward reads or a row holds.

    Args:
        layers: keys and values [heads, any, dim] by layer, for their sizes, dtype and device.
        rows: number of rows to allocate.
        slots: slots of a row, the scratch slot included.
    """

    def __init__(self, layers: Mapping[int, tuple[Tensor, Tensor]], rows: int, slots: int) -> None:
        self.rows, self.slots = rows, slots
        self._blocks: list[Tensor] = []  # [layers and parts of one size, rows, heads, slots, dim]
        self._index: dict[tuple[int, int], tuple[int, int]] = {}
        # NOTE: a slot that is read must hold a number, masked or not: its weight is 0, and 0 times
        # NaN is NaN. Of each place, this many slots from 0 on do.
        self._finite = [0] * rows
        sizes: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for layer, pair in layers.items():
            for part, tensor in enumerate(pair):
                sizes.setdefault((tensor.shape[0], tensor.shape[2]), []).append((layer, part))
        like = next(iter(layers.values()))[0]
        for (heads, dim), members in sizes.items():
            share = -(-len(members) // _BLOCKS)
            for first in range(0, len(members), share):
                some = members[first : first + share]
                self._index |= {one: (len(self._blocks), i) for i, one in enumerate(some)}
                self._blocks.append(like.new_empty(len(some), rows, heads, slots, dim))

    def view(self, layer: int, part: int, first: int, rows: int) -> Tensor:
        """Returns keys (part 0) or values (1) of these rows, [rows, heads, slots, dim]."""
        block, i = self._index[layer, part]
        return self._blocks[block][i, first : first + rows]

    def grow(self, rows: int, slots: int) -> None:
        """Reallocates with more rows or slots and copies the contents; recordings become invalid.

        If memory runs out on the way, nothing is changed.
        """
        for i in range(len(self._blocks)):
            old = self._blocks[i]
            members, _, heads, _, dim = old.shape
            new = old.new_empty(members, rows, heads, slots, dim)
            for last in (self.slots - 1, slots - 1):  # scratch, now and if a later block fails
                new[:, :, :, last] = 0.0
            for place, count in enumerate(self._finite):
                new[:, place, :, :count] = old[:, place, :, :count]
            self._blocks[i] = new
        self._finite += [0] * (rows - self.rows)
        self.rows, self.slots = rows, slots

    def ready(self, first: int, rows: int, slots: int) -> None:
        """Zeroes what was never written of the first `slots` slots of these places."""
        for place in range(first, first + rows):
            held = self._finite[place]
            if held >= slots:
                continue
            for block in self._blocks:
                block[:, place, :, held:slots] = 0.0
            if held == 0:
                self._clean_scratch(place)
            self._finite[place] = slots

    def forget(self, place: int) -> None:
        """Marks the slots of a place as empty, after its row was released."""
        self._finite[place] = 0

    def move(self, source: int, place: int, count: int) -> None:
        """Copies the first `count` slots of a row to another place, and forgets the first one."""
        self._clean_scratch(place)
        for block in self._blocks:
            block[:, place, :, :count] = block[:, source, :, :count]
        self._finite[place] = count
        self.forget(source)

    def copy_out(self, place: int, count: int) -> list[Tensor]:
        """Returns a copy of the first `count` slots of a row."""
        return [block[:, place, :, :count].clone() for block in self._blocks]

    def copy_in(self, place: int, held: Sequence[Tensor], count: int) -> None:
        """Writes the first `count` slots of a copy to a row that holds nothing."""
        self._clean_scratch(place)
        for block, copy in zip(self._blocks, held, strict=True):
            block[:, place, :, :count] = copy[..., :count, :]
        self._finite[place] = count

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot of one row."""
        return sum(block[:, :1, :, :1].nbytes for block in self._blocks)

    def _clean_scratch(self, place: int) -> None:
        for block in self._blocks:
            block[:, place, :, self.slots - 1] = 0.0

    def pack(self, moves: Sequence[tuple[int, int, Sequence[int]]]) -> None:
        """Copies slots within rows: (place, first slot to copy to, slots to copy from) each."""
        index = SlotIndex([slot for _, _, sources in moves for slot in sources])
        for block in self._blocks:
            rest = index.on(block.device)
            for place, start, sources in moves:
                chosen, rest = rest[: len(sources)], rest[len(sources) :]
                end = start + len(sources)
                block[:, place, :, start:end] = block[:, place].index_select(2, chosen)


class StaticRow(RowState):
    """One sequence; `place` is its index in the static slots."""

    def __init__(self, place: int, slots: StaticSlots) -> None:
        super().__init__()
        self.place, self._slots = place, slots

    @property
    def end(self) -> int:
        """Slots in use."""
        return self.length + len(self.parents)

    def write(self, layer: int, keys: Tensor, values: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Stores keys and values [kv_heads, n, dim] from slot `start`; returns all up to there."""
        end = start + keys.shape[1]
        held = [self._slots.view(layer, part, self.place, 1)[0] for part in (0, 1)]
        for part, new in zip(held, (keys, values), strict=True):
            part[:, start:end] = new
        return held[0][:, :end], held[1][:, :end]


class StaticForward(CacheHandle):
    """One forward of a fixed shape: its inputs, and the cache handle that the module is given.

    Inputs are of the size of the nodes, not of the context: which slots a node sees, and what
    position they hold, is worked out on the device from the rows' lengths.

    Args:
        outputs: where forwards with as many logits put them, each after the other.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        slots: StaticSlots,
        shape: GraphShape,
        outputs: WeakValueDictionary[int, Tensor],
    ) -> None:
        self._model, self._slots, self.shape = model, slots, shape
        self._outputs, self._output = outputs, outputs.get(shape.rows * shape.nodes)
        nodes, device = shape.nodes, model.device
        self._numbers = torch.zeros(
            (shape.rows, 4 * nodes + 1 + shape.tree), dtype=torch.int64, device=device
        )
        four = self._numbers[:, : 4 * nodes].chunk(4, 1)
        self._ids, self._positions, self._targets, self._before = four
        self._length = self._numbers[:, 4 * nodes : 4 * nodes + 1]
        self._depths = self._numbers[:, 4 * nodes + 1 :]
        # Whether a node sees a provisional one.
        self._tree = torch.zeros((shape.rows, nodes, shape.tree), dtype=torch.bool, device=device)
        self._row_index = torch.arange(shape.rows, device=device)[:, None]
        self._slot = torch.arange(shape.slots, device=device)[None]
        self._seen: tuple[Tensor, Tensor] | None = None
        self._biases: dict[tuple[int | None, int], Tensor] = {}
        self.fill([], [])

    @property
    def buffers(self) -> dict[int, int]:
        """Bytes of what it holds, by address; forwards may share some."""
        held = [self._numbers, self._tree, self._row_index, self._slot]
        if self._output is not None:
            held.append(self._output)
        return {tensor.data_ptr(): tensor.nbytes for tensor in held}

    def fill(self, rows: Sequence[StaticRow], nodes: Sequence[Nodes]) -> None:
        """Writes the inputs: these new nodes, already counted in their rows, and padding.

        A padded node writes to the scratch slot and sees slot 0 only: a softmax over nothing would
        be NaN, and its keys would stay NaN in the scratch slot.
        """
        width = self.shape.nodes
        numbers = np.zeros(self._numbers.shape, dtype=np.int64)
        ids, positions, targets, before = np.split(numbers[:, : 4 * width], 4, axis=1)
        lengths, depths = numbers[:, 4 * width], numbers[:, 4 * width + 1 :]
        targets[:] = self._slots.slots - 1
        before[:] = 1
        tree = np.zeros(self._tree.shape, dtype=np.bool_)
        for row, added in zip(rows, nodes, strict=True):
            i, count, held = row.place, len(added.token_ids), len(row.parents)
            lengths[i] = before[i, -count:] = row.length
            depths[i, :held] = row.depths
            ids[i, -count:] = added.token_ids
            positions[i, -count:] = row.length + depths[i, held - count : held]
            targets[i, -count:] = np.arange(row.end - count, row.end)
            tree[i, -count:, :held] = ancestor_mask(row.parents, count)
        self._numbers.copy_(torch.from_numpy(numbers))
        self._tree.copy_(torch.from_numpy(tree))

    def run(self) -> Tensor:
        """Returns logits [rows, nodes, V], and stores keys and values of the nodes.

        They are valid until the next forward with as many of them.
        """
        if attention_of(self._model.config) != ATTENTION:
            self._model.set_attn_implementation(ATTENTION)
        nodes = self.shape.nodes
        try:
            logits = cached_logits(self._model, self._ids, self._positions, self, nodes)
        finally:
            self._seen, self._biases = None, {}  # they hold for these inputs only
        if self._output is None:
            # NOTE: made in the warm-up. What is made while recording stays for this graph alone.
            made = self._output = torch.empty_like(logits, memory_format=torch.contiguous_format)
            self._outputs[self.shape.rows * nodes] = made
        return self._output.view(logits.shape).copy_(logits)

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
        held = self._slots.view(layer, part, 0, self.shape.rows)
        held.transpose(1, 2)[self._row_index, self._targets] = new.transpose(1, 2)
        return held[:, :, : self.shape.slots]

    def _bias(self, window: int | None, groups: int, dtype: torch.dtype) -> Tensor:
        """0 where a node sees a slot, else -inf: [rows, 1, groups * nodes, slots]."""
        key = (window, groups)
        if key not in self._biases:
            if self._seen is None:
                self._seen = self._look()
            seen, held = self._seen
            if window is not None:
                # Slot 0 stays open to padded nodes, whose position is 0.
                seen = seen & (held[:, None] > self._positions[:, :, None] - window)
            bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
            bias = bias.masked_fill(~seen, float("-inf"))
            self._biases[key] = bias.repeat(1, groups, 1)[:, None]
        return self._biases[key]

    def _look(self) -> tuple[Tensor, Tensor]:
        """Whether a node sees a slot, [rows, nodes, slots], and its position, [rows, slots]."""
        rows, nodes, slots, tree = self.shape
        place = self._slot - self._length  # among the provisional nodes of the row
        inside, place = (place >= 0) & (place < tree), place.clamp(0, tree - 1)
        drafted = self._tree.gather(2, place[:, None].expand(rows, nodes, slots))
        prefix = self._slot[None] < self._before[:, :, None]
        deep = self._length + self._depths.gather(1, place)
        return prefix | drafted & inside[:, None], torch.where(inside, deep, self._slot)


_EAGER = AttentionInterface()[eager.ATTENTION]


def _attention(
    module: Any, query: Tensor, key: Any, value: Tensor, attention_mask: Any = None, **given: Any
) -> tuple[Tensor, None]:
    """Serves both backends, so that they can share one model."""
    if not isinstance(key, tuple) or not isinstance(key[0], StaticForward):
        served: tuple[Tensor, None] = _EAGER(module, query, key, value, attention_mask, **given)
        return served
    if given.get("s_aux") is not None:
        raise UnsupportedError(
            "attention sinks are not recorded in graphs: the eager backend computes them"
        )
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
