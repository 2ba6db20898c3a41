"""The eager backend: stock Transformers modules, with our attention over our own KV slots.

Transformers calls the attention function registered for a model with whatever its cache returned as
keys and values. Our cache returns a handle on the slots of every row, so the stock module runs
unchanged, on any device, while keys and values of the past are never moved or joined.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from redwood._transformers import CacheHandle, cached_logits
from redwood.backends._rows import RowState, check_distinct
from redwood.backends.base import Kept, Nodes
from redwood.errors import ArgumentError, UnsupportedError
from redwood.tree import ancestor_mask

ATTENTION = "redwood"  # the name under which our attention is registered
_FIRST_SLOTS = 256


class _Row(RowState):
    """One sequence, with the slots of every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}  # keys, values: [kv_heads, slots, dim]

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

    def keep(self, nodes: Sequence[int]) -> None:
        """Closes up the slots of these provisional nodes behind the prefix; drops the others."""
        moved = next((i for i, node in enumerate(nodes) if node != i), len(nodes))
        if moved < len(nodes):
            source = torch.tensor([self.length + node for node in nodes[moved:]])
            start, end = self.length + moved, self.length + len(nodes)
            for keys, values in self.layers.values():
                index = source.to(keys.device)
                keys[:, start:end] = keys[:, index]
                values[:, start:end] = values[:, index]
        self.length += len(nodes)
        self.parents, self.depths = [], []


class _Span:
    """The new nodes of one row within one forward: where they stand and what they see."""

    def __init__(self, row: _Row, nodes: Nodes, pad: int) -> None:
        self.row, self.pad, self.num_new = row, pad, len(nodes.token_ids)
        self.start = row.length + len(row.parents) - self.num_new  # first slot written
        self.positions = np.array(row.depths[-self.num_new :]) + row.length
        self._seen = ancestor_mask(row.parents, self.num_new)
        self._masks: dict[tuple[int | None, int], Tensor | None] = {}

    def mask(self, window: int | None, groups: int, like: Tensor) -> Tensor | None:
        """Additive mask [1, 1, groups * n, slots] in the dtype of `like`; None: all is seen."""
        key = (window, groups)
        if key not in self._masks:
            seen = self._seen if window is None else self._near(window)
            mask = None
            if not seen.all():
                slots = self.row.length + len(self.row.parents)
                bias = like.new_zeros(groups, self.num_new, slots)
                unseen = torch.from_numpy(~seen).to(like.device)
                bias[..., slots - seen.shape[1] :].masked_fill_(unseen, float("-inf"))
                mask = bias.view(1, 1, -1, slots)
            self._masks[key] = mask
        return self._masks[key]

    def _near(self, window: int) -> NDArray[np.bool_]:
        """What is seen of all slots, the prefix's too: at most `window` positions back."""
        prefix = np.ones((self.num_new, self.row.length), dtype=np.bool_)
        seen = np.concatenate([prefix, self._seen], axis=1)
        held = np.concatenate(
            [np.arange(self.row.length), np.array(self.row.depths) + self.row.length]
        )
        seen &= held[None] > self.positions[:, None] - window
        return seen


class _Forward(CacheHandle):
    """One forward: the cache handed to the module, and the handle handed to our attention."""

    def __init__(self, spans: list[_Span]) -> None:
        self.spans = spans
        self.served = 0  # layers that came through our attention


def _attention(
    module: Any, query: Tensor, key: Any, value: Tensor, attention_mask: Any = None, **given: Any
) -> tuple[Tensor, None]:
    """Attention over slots. query: [rows, heads, n, dim]; returns [rows, n, heads, dim]."""
    if not isinstance(key, tuple):
        raise UnsupportedError("this model's attention does not take its keys from the cache")
    if given.get("s_aux") is not None:
        raise UnsupportedError("attention sinks are not supported")
    forward, layer, keys = key
    forward.served += 1
    scale = given.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    rows, heads, width, _ = query.shape
    out = query.new_zeros(rows, width, heads, value.shape[-1])
    for i, span in enumerate(forward.spans):
        held_keys, held_values = span.row.write(
            layer, keys[i, :, span.pad :], value[i, :, span.pad :], span.start
        )
        # Heads that share keys become more queries of the same head: no copy of the keys is made.
        kv_heads = held_keys.shape[0]
        groups = heads // kv_heads
        q = query[i, :, span.pad :].reshape(1, kv_heads, groups * span.num_new, -1)
        mask = span.mask(given.get("sliding_window"), groups, query)
        softcap = given.get("softcap")
        if softcap is None:
            o = scaled_dot_product_attention(
                q, held_keys[None], held_values[None], mask, scale=scale
            )
        else:
            scores = torch.tanh((q @ held_keys.transpose(1, 2)[None]) * (scale / softcap)) * softcap
            weights = (scores if mask is None else scores + mask).float().softmax(-1)
            o = weights.to(q.dtype) @ held_values[None]
        out[i, span.pad :] = o.reshape(heads, span.num_new, -1).transpose(0, 1)
    return out, None


AttentionInterface.register(ATTENTION, _attention)


class EagerBackend:
    """Any causal language model of Transformers whose attention goes through its interface.

    Args:
        model: in eval mode, loaded with, or switched to, `attn_implementation=ATTENTION`.
        capacity: slots of one row; memory grows with use, not with this bound.
    """

    name = "eager"

    def __init__(self, model: PreTrainedModel, capacity: int) -> None:
        self.model = model
        self.capacity = capacity
        self.vocab_size = int(model.config.get_text_config().vocab_size)
        self.token_bytes: int | None = None
        """Memory that keys and values of one token take; None before the first row has ended."""
        self._rows: dict[int, _Row] = {}
        self._next_row = 0

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        device: torch.device = self.model.device
        return device

    def open(self) -> int:
        """Returns a new, empty row."""
        self._next_row += 1
        self._rows[self._next_row] = _Row()
        return self._next_row

    def length(self, row: int) -> int:
        """Returns the number of committed tokens."""
        return self._row(row).length

    def extend(self, rows: Sequence[Nodes]) -> list[Tensor]:
        """Appends provisional nodes and scores them in one forward; see `Backend.extend`."""
        check_distinct(rows)
        grown = [self._row(nodes.row).grown(nodes, self.capacity) for nodes in rows]
        for nodes, (parents, depths) in zip(rows, grown, strict=True):
            row = self._row(nodes.row)
            row.parents, row.depths = parents, depths
        try:
            return self._forward(rows)
        except BaseException:
            for nodes in rows:  # nothing was appended
                row, n = self._row(nodes.row), len(nodes.token_ids)
                row.parents, row.depths = row.parents[:-n], row.depths[:-n]
            raise

    @torch.inference_mode()
    def _forward(self, rows: Sequence[Nodes]) -> list[Tensor]:
        width = max(len(nodes.token_ids) for nodes in rows)
        ids = torch.zeros((len(rows), width), dtype=torch.int64)
        positions = torch.zeros((len(rows), width), dtype=torch.int64)
        spans = []
        for i, nodes in enumerate(rows):
            # Rows end together: the last logits of all rows are then one slice.
            span = _Span(self._row(nodes.row), nodes, width - len(nodes.token_ids))
            ids[i, span.pad :] = torch.as_tensor(nodes.token_ids)
            positions[i, span.pad :] = torch.from_numpy(span.positions)
            spans.append(span)
        counts = [len(n.token_ids) if n.num_logits is None else n.num_logits for n in rows]
        forward = _Forward(spans)
        logits = cached_logits(
            self.model,
            ids.to(self.device),
            positions.to(self.device),
            forward,
            max(1, *counts),
        )
        if forward.served == 0:
            raise UnsupportedError(
                f"{type(self.model).__name__} does not use Transformers' attention interface"
            )
        return [logits[i, logits.shape[1] - n :] for i, n in enumerate(counts)]

    @torch.inference_mode()
    def commit(self, rows: Sequence[Kept]) -> None:
        """Keeps a path of provisional nodes per row; see `Backend.commit`."""
        for kept in rows:
            self._row(kept.row).check_path(kept)
        for kept in rows:
            self._row(kept.row).keep(kept.nodes)

    def truncate(self, row: int, length: int) -> None:
        """Drops provisional nodes and committed tokens past `length`."""
        self._row(row).cut(length)

    def release(self, row: int) -> None:
        """Forgets the row and frees its slots."""
        held = self._row(row).layers.values()
        if held:  # slots grow by doubling: at worst half of them are empty
            self.token_bytes = 2 * sum(x[:, :1].nbytes for pair in held for x in pair)
        del self._rows[row]

    def _row(self, row: int) -> _Row:
        if row not in self._rows:
            raise ArgumentError(f"row {row} is not open")
        return self._rows[row]
