"""The eager backend: stock Transformers modules, with our attention over our own KV slots.

Transformers calls the attention function registered for a model with whatever its cache returned as
keys and values. Our cache returns a handle on the slots of every row, so the stock module runs
unchanged, on any device, while keys and values of the past are never moved or joined. Attention is
the one place where tokens meet, and it knows the rows: so the nodes of all rows stand behind each
other as one text, and no position is computed for padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from redwood.backends.base import AcceptedPath, Nodes
from redwood.backends.eager.recurrent import Recurrent
from redwood.backends.eager.slots import Row, SlotIndex, Slots
from redwood.backends.rows import check_distinct, fill
from redwood.errors import ArgumentError, UnsupportedError
from redwood.models._transformers import CacheHandle, cached_logits
from redwood.models._transformers_states import state_bytes
from redwood.tree import ancestor_mask

ATTENTION = "redwood"  # the name under which our attention is registered

Together = Literal["flat", "padded", "apart"]
"""How rows share a forward: behind each other, padded to one length, or not at all."""


class _Span:
    """The new nodes of one row within one forward: where they stand and what they see.

    Args:
        at: column of the first of them.
        line: of the forward's token ids.
    """

    def __init__(self, row: Slots, nodes: Nodes, at: int, line: int = 0) -> None:
        self.row, self.line, self.num_new = row, line, len(nodes.token_ids)
        self.columns = slice(at, at + self.num_new)
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
        self.routes: dict[Any, Any] = {}  # of recurrent layers, for all of them
        self.served = 0  # layers that came through our attention, or are recurrent


def _attention(
    module: Any, query: Tensor, key: Any, value: Tensor, attention_mask: Any = None, **given: Any
) -> tuple[Tensor, None]:
    """Attention over slots. query: [rows, heads, n, dim]; returns [rows, n, heads, dim]."""
    if not isinstance(key, tuple):
        raise UnsupportedError("this model's attention does not take its keys from the cache")
    forward, layer, keys = key
    forward.served += 1
    scale = given.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    lines, heads, width, _ = query.shape
    out = query.new_zeros(lines, width, heads, value.shape[-1])
    for span in forward.spans:
        line, columns = span.line, span.columns
        held_keys, held_values = span.row.write(
            layer, keys[line, :, columns], value[line, :, columns], span.start
        )
        # Heads that share keys become more queries of the same head: no copy of the keys is made.
        kv_heads = held_keys.shape[0]
        groups = heads // kv_heads
        q = query[line, :, columns].reshape(1, kv_heads, groups * span.num_new, -1)
        mask = span.mask(given.get("sliding_window"), groups, query)
        softcap, sinks = given.get("softcap"), given.get("s_aux")
        if sinks is not None:
            o = _with_sinks(q, held_keys[None], held_values[None], mask, scale, sinks)
        elif softcap is None:
            o = scaled_dot_product_attention(
                q, held_keys[None], held_values[None], mask, scale=scale
            )
        else:
            scores = torch.tanh((q @ held_keys.transpose(1, 2)[None]) * (scale / softcap)) * softcap
            weights = (scores if mask is None else scores + mask).float().softmax(-1)
            o = weights.to(q.dtype) @ held_values[None]
        out[line, columns] = o.reshape(heads, span.num_new, -1).transpose(0, 1)
    return out, None


def _with_sinks(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, sinks: Tensor
) -> Tensor:
    """Attention [1, kv_heads, groups * n, dim] beside a learned score of nothing for each head."""
    kv_heads, lines = q.shape[1:3]
    groups = len(sinks) // kv_heads
    column = sinks.view(kv_heads, groups, 1).expand(-1, -1, lines // groups)
    scores = (q @ keys.transpose(2, 3)) * scale
    scores = scores if mask is None else scores + mask
    beside = torch.cat((scores, column.reshape(1, kv_heads, lines, 1).to(scores.dtype)), -1)
    return beside.float().softmax(-1)[..., :-1].to(q.dtype) @ values


AttentionInterface.register(ATTENTION, _attention)


def run_rows(
    model: PreTrainedModel, rows: Sequence[Slots], added: Sequence[Nodes], together: Together
) -> list[Tensor]:
    """Returns logits [n or num_logits, V] of these nodes, which their rows have counted already.

    Raises:
        UnsupportedError: a model whose attention does not come to us.
    """
    logits: list[Tensor] = [torch.empty(0)] * len(rows)
    for group in _groups([len(nodes.token_ids) for nodes in added], together):
        made = _run_group(
            model, [rows[i] for i in group], [added[i] for i in group], together == "padded"
        )
        for i, scored in zip(group, made, strict=True):
            logits[i] = scored
    return logits


def _groups(lengths: Sequence[int], together: Together) -> Iterator[list[int]]:
    """Which rows go into one forward. Padding to the longest is at most half of it."""
    if together == "flat":
        yield list(range(len(lengths)))
        return
    kinds: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        kinds.setdefault(i if together == "apart" else (length - 1).bit_length(), []).append(i)
    yield from kinds.values()


def _run_group(
    model: PreTrainedModel, rows: Sequence[Slots], added: Sequence[Nodes], padded: bool
) -> list[Tensor]:
    """One forward: a line of token ids for all rows, or, padded in front, one for each."""
    lengths = [len(nodes.token_ids) for nodes in added]
    counts = [len(n.token_ids) if n.num_logits is None else n.num_logits for n in added]
    width = max(lengths) if padded else sum(lengths)
    numbers = np.zeros((2, len(rows) if padded else 1, width), dtype=np.int64)
    spans, wanted, at = [], list[int](), 0
    for i, (row, nodes) in enumerate(zip(rows, added, strict=True)):
        # Padded rows end together: the last logits of all of them are then one slice.
        line, at = (i, width - lengths[i]) if padded else (0, at)
        span = _Span(row, nodes, at, line)
        numbers[0, line, span.columns] = nodes.token_ids
        numbers[1, line, span.columns] = span.positions
        spans.append(span)
        at += lengths[i]
        wanted += range(at - counts[i], at)
    forward = _Forward(spans)
    ids, positions = torch.from_numpy(numbers).to(model.device)
    kept: int | Tensor = max(1, *counts) if padded else max(1, len(wanted))
    if not padded and wanted and wanted[0] != width - len(wanted):
        kept = torch.tensor(wanted, device=model.device)  # not the last ones alone
    logits = cached_logits(model, ids, positions, forward, kept)
    if forward.served == 0:
        raise UnsupportedError(
            f"{type(model).__name__} does not use Transformers' attention interface, nor does it "
            "keep states in Transformers' cache"
        )
    if padded:
        return [logits[i, logits.shape[1] - count :] for i, count in enumerate(counts)]
    return list(torch.split(logits[0, logits.shape[1] - len(wanted) :], counts))


class EagerBackend:
    """Any causal language model of Transformers whose attention goes through its interface.

    Args:
        model: in eval mode, loaded with, or switched to, `attn_implementation=ATTENTION`.
        capacity: slots of one row; memory grows with use, not with this bound.
    """

    name = "eager"
    together: Together = "flat"
    """How rows share a forward; set at load by what the model does."""
    page_slots = 64
    """Slots of the unit that `pages` counts in; forked rows are copies and share none."""
    quantised = False
    """Whether activations are rounded to few bits on the way."""
    checkpoint_tokens = 512
    """Of recurrent layers: states are kept every so many tokens, so that rows may begin there anew;
    each takes `state_bytes`. 0: none are kept."""

    def __init__(self, model: PreTrainedModel, capacity: int) -> None:
        self.model = model
        self.capacity = capacity
        self.recurrent = Recurrent(model)
        self.vocab_size = int(model.config.get_text_config().vocab_size)
        self.token_bytes: int | None = None
        """Bytes of keys and values of one token; None before the first row has ended. Of a model
        without any, those of the states that are kept."""
        self.state_bytes = None if self.recurrent.modules else 0
        """Bytes of the states of recurrent layers after a token; None before a row has ended."""
        self._rows: dict[int, Row] = {}
        self._next_row = 0

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        device: torch.device = self.model.device
        return device

    def open(self) -> int:
        """Returns a new, empty row."""
        self._next_row += 1
        self._rows[self._next_row] = Row()
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
            row.recurrent.tokens += nodes.token_ids
        try:
            logits = self._forward(rows)
        except BaseException:
            for nodes in rows:  # nothing was appended
                row, n = self._row(nodes.row), len(nodes.token_ids)
                row.parents, row.depths = row.parents[:-n], row.depths[:-n]
                del row.recurrent.tokens[-n:]
            raise
        for nodes in rows:
            row = self._row(nodes.row)
            row.recurrent.mark(row.length, self.checkpoint_tokens)
        return logits

    @torch.inference_mode()
    def _forward(self, rows: Sequence[Nodes]) -> list[Tensor]:
        with self.recurrent.held_outside():
            return run_rows(self.model, [self._row(n.row) for n in rows], rows, self.together)

    @torch.inference_mode()
    def commit(self, rows: Sequence[AcceptedPath]) -> None:
        """Keeps a path of provisional nodes per row; see `Backend.commit`."""
        for kept in rows:
            self._row(kept.row).check_path(kept)
        moves = [self._row(kept.row).moved(kept.nodes) for kept in rows]
        index, done = SlotIndex([slot for sources in moves for slot in sources]), 0
        for kept, sources in zip(rows, moves, strict=True):
            row, end = self._row(kept.row), done + len(sources)
            if sources:
                row.pack(row.length + len(kept.nodes) - len(sources), slice(done, end), index)
            done = end
            row.recurrent.keep(row.length, kept.nodes)
            row.keep(len(kept.nodes))
            row.recurrent.mark(row.length, self.checkpoint_tokens)

    def truncate(self, row: int, length: int) -> None:
        """Drops provisional nodes and committed tokens past `length`."""
        held = self._row(row)
        held.cut(length)
        tokens, known = held.recurrent.tokens[:length], held.recurrent.reusable(length)
        if held.recurrent.holds(length):
            held.recurrent.keep(length, [])
        else:  # a state does not go back: what is behind the last one kept is read again
            held.length, held.recurrent = known, held.recurrent.copied(known)
            fill(self, row, tokens[known:])

    @torch.inference_mode()
    def fork(self, row: int, length: int) -> int:
        """Returns a row with a copy of the first `length` committed tokens of another.

        Raises:
            ArgumentError: a row that is not open, a length that it does not have.
        """
        held = self._row(row)
        if not 0 <= length <= held.length:
            raise ArgumentError(f"fork: length {length} is not in 0..{held.length}")
        made, known = self.open(), held.recurrent.reusable(length)
        copy = self._rows[made]
        copy.length, copy.recurrent = known, held.recurrent.copied(known)
        for layer, (keys, values) in held.layers.items() if known else ():
            copy.write(layer, keys[:, :known], values[:, :known], 0)
        fill(self, made, held.recurrent.tokens[known:length])
        return made

    def reusable(self, row: int, length: int) -> int:
        """Returns how many of a row's first `length` committed tokens a fork need not read again.

        All of them without recurrent layers; else those up to the last kept state among them. A
        fork of more is right, and reads the others.
        """
        return self._row(row).recurrent.reusable(length)

    def pages(self, rows: Sequence[int]) -> int:
        """Returns how many times 64 slots these rows hold, and states in such units."""
        held = [self._row(row) for row in rows]
        states = {id(state): state for row in held for state in row.recurrent.states()}
        size = sum(map(state_bytes, states.values()))
        slots = sum(-(-row.slots // self.page_slots) for row in held)
        token = self.token_bytes or max((2 * row.token_bytes for row in held), default=0) or 1
        return slots - (-size // (token * self.page_slots))

    def row_bytes(self, tokens: int) -> int:
        """Returns the memory that a row of so many tokens comes to take, as far as it is known."""
        kept = 2 + (tokens // self.checkpoint_tokens if self.checkpoint_tokens else 0)
        return tokens * (self.token_bytes or 0) + kept * (self.state_bytes or 0)

    def park(self, row: int) -> None:
        """Does nothing: a row that only stays takes no more than its slots."""
        self._row(row)

    def release(self, row: int) -> None:
        """Forgets the row and frees its slots."""
        held = self._row(row)
        if held.layers or held.recurrent.layers:
            size = sum(memory.state_bytes for memory in held.recurrent.layers.values())
            self.state_bytes = max(self.state_bytes or 0, size)
            # Slots grow by doubling: half may be empty. Where there are none, states are all.
            each = -(-self.state_bytes // (self.checkpoint_tokens or 512))
            self.token_bytes = 2 * held.token_bytes or each
        del self._rows[row]

    def _row(self, row: int) -> Row:
        if row not in self._rows:
            raise ArgumentError(f"row {row} is not open")
        return self._rows[row]
