"""The native backend: a decoder in C++ for CPUs, one call per forward.

Its kernels are made for 1 to 64 rows of activations, so that scoring a token tree costs little more
than one token. A node's logits are bit for bit the same alone, in any tree, with any other rows
and after any commit: every sum has one order, which depends on the node's own path only. Trees can
then not change one token of what plain decoding on this backend says (`docs/native.md`).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from redwood.backends.base import AcceptedPath, Nodes
from redwood.backends.native.parts import experts_of, layers_of, parts_of, recurrent_of
from redwood.backends.native.spec import DecoderSpec
from redwood.backends.rows import RowState, check_distinct
from redwood.errors import ArgumentError, UnsupportedError, check_process

if TYPE_CHECKING:
    from redwood._native import State

_LANES = 16  # the decoder writes logits in blocks of this many columns

CHECKPOINT_TOKENS = 512
"""From one kept state of recurrent layers to the next, where nobody says otherwise."""

Packed = Mapping[str, tuple[str, NDArray[np.uint8]]]
"""Matrices by name ("3.q", "embed", "output"): their format and bytes, see `packed`."""


def extension() -> Any:
    """Returns the compiled module.

    Raises: UnsupportedError if Redwood was installed without it.
    """
    try:
        from redwood import _native
    except ImportError as error:
        raise UnsupportedError(
            "the native backend was not built: install a C++17 compiler and CMake, then install "
            f"Redwood again, or use the eager backend ({error})"
        ) from error
    return _native


class NativeBackend:
    """A decoder-only model, computed by `redwood._native`.

    Args:
        spec: what the model is.
        matrices: packed weights; kept as they are, not copied.
        vectors: norms and biases by name ("3.attn_norm"), float32.
        capacity: slots of one row; memory grows with use, not with this bound.
        kv: "f16" or "f32", how keys and values are held.
        threads: threads that compute; pinned to the processors `cpus`, if any are given.
        isa: an instruction set of `_native.instruction_sets()`, or "auto", the best of them.
        outputs: score only this many tokens, the first ones; None: all. Drafters may leave out
            rare tokens, which a byte-pair vocabulary has at its end: the head is then cheaper.
        output_ids: int64, ascending: score these tokens alone; `matrices` has their rows as its
            "output". Not together with `outputs`.
        checkpoint_tokens: of recurrent layers, states are kept every so many tokens, so that rows
            may begin there anew; each takes `state_bytes`. 0: none are kept.

    Attributes:
        num_embeddings: tokens it can read; `vocab_size` are those it scores, one a column.
        output_ids: int64 [vocab_size], the tokens of the columns; None: column i is token i.
        batch_invariant: a node's logits are bit for bit the same whatever else a pass scores.
        formats: of its matrices, by name.
        own_threads: it computes with threads of its own, not with PyTorch's.
        page_slots: slots of a page, the unit in which memory is taken and shared.

    Raises:
        ArgumentError: weights that do not fit the spec, threads out of 1..64, ids out of order.
    """

    name = "native"
    device = torch.device("cpu")
    own_threads = True
    page_slots = 64
    batch_invariant = True

    def __init__(
        self,
        spec: DecoderSpec,
        matrices: Packed,
        vectors: Mapping[str, NDArray[np.float32]],
        *,
        capacity: int,
        kv: str = "f16",
        threads: int = 1,
        cpus: Sequence[int] = (),
        isa: str = "auto",
        outputs: int | None = None,
        output_ids: NDArray[np.int64] | None = None,
        checkpoint_tokens: int = CHECKPOINT_TOKENS,
    ) -> None:
        matrices, outputs = dict(matrices), spec.vocab_size if outputs is None else outputs
        self.output_ids: Tensor | None = None
        if output_ids is not None:
            _check_ids(output_ids, spec.vocab_size)
            outputs, self.output_ids = len(output_ids), torch.tensor(output_ids)
        elif outputs != spec.vocab_size:
            matrices["output"] = _first_rows(matrices["output"], outputs, spec)
        config = {
            name: getattr(spec, name)
            for name in (
                *("hidden", "heads", "vocab_size", "norm_eps", "value_norm", "ple", "ple_vocab"),
                *("attention_scale", "attention_softcap", "logit_softcap", "embedding_scale"),
                *(
                    "latent",
                    "query_latent",
                    "latent_eps",
                    "layer_norm",
                    "parallel",
                    "glu_limit",
                    "glu_alpha",
                ),
            )
        }
        config |= (
            experts_of(spec)
            | recurrent_of(spec, checkpoint_tokens)
            | parts_of(spec)
            | layers_of(spec)
            | {
                "outputs": outputs,
                "ffns": [spec.width(layer) for layer in range(spec.layers)],
                "gelu": spec.activation == "gelu_tanh",
                "half_cache": kv == "f16",
                "windows": list(spec.windows),
                "rope_of_layer": list(spec.rope_of_layer),
                "ropes": [(list(rope.inv_freq), rope.attention_factor) for rope in spec.ropes],
            }
        )
        try:
            self._decoder = extension().Decoder(
                config, matrices, dict(vectors), threads, list(cpus), isa
            )
        except ValueError as error:
            raise ArgumentError(f"native backend: {error}") from error
        self.checkpoint_tokens = checkpoint_tokens
        self.spec, self.kv, self._number_bytes = spec, kv, 2 if kv == "f16" else 4
        self.vocab_size = outputs
        self.num_embeddings = spec.vocab_size
        self.capacity = capacity
        self.threads = threads
        self.isa: str = self._decoder.isa
        self.formats = {name: layout for name, (layout, _) in matrices.items()}
        self.weight_bytes = {name: data.nbytes for name, (_, data) in matrices.items()}
        self._rows: dict[int, RowState] = {}
        self._pid, self._changing = os.getpid(), threading.Lock()

    def open(self) -> int:
        """Returns a new, empty row."""
        row = int(self._decoder.open())
        self._rows[row] = RowState()
        return row

    def length(self, row: int) -> int:
        """Returns the number of committed tokens."""
        return self._row(row).length

    def extend(self, rows: Sequence[Nodes]) -> list[Tensor]:
        """Appends provisional nodes and scores them in one call; see `Backend.extend`.

        Raises:
            UnsupportedError: a forked child, which has none of the threads that compute.
        """
        check_process(self._pid)
        check_distinct(rows)
        grown = [self._row(nodes.row).grown(nodes, self.capacity) for nodes in rows]
        counts = [len(n.token_ids) if n.num_logits is None else n.num_logits for n in rows]
        logits = torch.empty(sum(counts), -(-self.vocab_size // _LANES) * _LANES)
        entries = []
        for nodes, (parents, _), count in zip(rows, grown, counts, strict=True):
            tokens = np.asarray(nodes.token_ids)
            if tokens.min() < 0 or tokens.max() >= self.num_embeddings:
                raise ArgumentError(f"extend: tokens must be in 0..{self.num_embeddings - 1}")
            entries.append(
                (
                    nodes.row,
                    self._rows[nodes.row].length,
                    np.array(parents, np.int32),
                    tokens.astype(np.int32),
                    count,
                )
            )
        with self._changing:
            self._decoder.extend(entries, logits.numpy())
        for nodes, (parents, depths) in zip(rows, grown, strict=True):
            state = self._rows[nodes.row]
            state.parents, state.depths = parents, depths
        return list(torch.split(logits[:, : self.vocab_size], counts))

    def commit(self, rows: Sequence[AcceptedPath]) -> None:
        """Keeps a path of provisional nodes per row; see `Backend.commit`."""
        for kept in rows:
            self._row(kept.row).check_path(kept)
        for kept in rows:
            state = self._rows[kept.row]
            with self._changing:
                self._decoder.keep(kept.row, state.length, np.array(kept.nodes, np.int32))
            state.length += len(kept.nodes)
            state.parents, state.depths = [], []

    def truncate(self, row: int, length: int) -> None:
        """Drops provisional nodes and committed tokens past `length`."""
        self._row(row).cut(length)
        self._decoder.shrink(row, length)

    def fork(self, row: int, length: int) -> int:
        """Returns a row that holds the first `length` committed tokens of another.

        Pages of 64 slots are shared until one of the rows writes to them.

        Raises:
            ArgumentError: a row that is not open, a length that it does not have.
        """
        if not 0 <= length <= self._row(row).length:
            raise ArgumentError(f"fork: length {length} is not in 0..{self._row(row).length}")
        made = int(self._decoder.fork(row, length))
        self._rows[made] = RowState()
        self._rows[made].length = length
        return made

    def pages(self, rows: Sequence[int]) -> int:
        """Returns how many pages these rows hold, shared ones counted once, states as pages."""
        for row in rows:
            self._row(row)
        pages = int(self._decoder.pages(list(rows)))
        states = int(self._decoder.states(list(rows))) * self.state_bytes
        return pages - (-states // self.page_bytes)

    def reusable(self, row: int, length: int) -> int:
        """Returns how many of a row's first `length` committed tokens a fork need not read again.

        All of them without recurrent layers; else as far as the last kept state among them. A fork
        of more tokens is right, and reads the others once more before its next nodes.
        """
        self._row(row)
        return int(self._decoder.reusable(row, length))

    def park(self, row: int) -> None:
        """Does nothing: a row that only stays takes no more than its pages."""
        self._row(row)

    @property
    def page_bytes(self) -> int:
        """Bytes of a page, as `read_page` returns it."""
        return int(self._decoder.page_bytes)

    def page_ids(self, row: int) -> list[int]:
        """Returns numbers of the row's pages in order; shared pages have the same, while held."""
        self._row(row)
        return list(self._decoder.page_ids(row))

    def read_page(self, row: int, index: int) -> NDArray[np.uint8]:
        """Returns a copy of a page, uint8 [page_bytes]."""
        self._row(row)
        out = np.empty(self.page_bytes, np.uint8)
        self._decoder.read_page(row, index, out)
        return out

    def states_of(self, row: int) -> dict[int, State]:
        """Returns the states of recurrent layers that a row has, by how many tokens they follow."""
        self._row(row)
        return dict(self._decoder.states_of(row))

    def make_state(self, data: NDArray[np.uint8]) -> State:
        """Returns a state of these bytes, uint8 [state_bytes], as `State.read` gave them.

        Raises:
            ArgumentError: another size, or a model without recurrent layers.
        """
        if not self.state_bytes or data.nbytes != self.state_bytes:
            raise ArgumentError(f"make_state: a state has {self.state_bytes} bytes")
        made: State = self._decoder.make_state(data)
        return made

    def restore(
        self,
        row: int,
        pages: Iterable[NDArray[np.uint8]],
        length: int,
        token_ids: Sequence[int] = (),
        states: Mapping[int, State] | None = None,
    ) -> None:
        """Puts pages behind those of a row, which then holds `length` committed tokens.

        Args:
            row: without provisional nodes, its pages full.
            pages: uint8 [page_bytes] each, from `read_page` of this model, weights and build.
            token_ids: of a model with recurrent layers, all of the row's tokens.
            states: further ones of these tokens, as of `states_of`. Of those at no multiple of
                `checkpoint_tokens` the last one alone stays.

        Raises:
            ArgumentError: pages of another size, too many or too few of them; tokens, or states,
                that cannot be those of the row.
        """
        state, with_states = self._row(row), self.state_bytes > 0
        if len(token_ids) != (length if with_states else 0) or (states and not with_states):
            raise ArgumentError("restore: tokens and states are for recurrent layers, all of them")
        if state.parents or state.length % self.page_slots:
            raise ArgumentError("restore: pages go behind full ones")
        for page in pages:
            if page.nbytes != self.page_bytes:
                raise ArgumentError(f"restore: a page has {self.page_bytes} bytes")
            self._decoder.append_page(row, page)
        held = len(self._decoder.page_ids(row)) * self.page_slots
        if not held - self.page_slots < length <= min(held, self.capacity):
            raise ArgumentError(f"restore: length {length} is not that of {held} slots")
        if with_states:
            try:
                tokens = np.asarray(token_ids, np.int32)
                self._decoder.restore_states(row, tokens, dict(states or {}))
            except (ValueError, OverflowError) as error:
                raise ArgumentError(f"restore: {error}") from error
        state.length = length

    def release(self, row: int) -> None:
        """Forgets the row and frees its slots."""
        self._row(row)
        self._decoder.release(row)
        del self._rows[row]

    @property
    def token_bytes(self) -> int:
        """Memory that keys and values of one token take."""
        numbers = 0
        for layer in range(self.spec.layers):
            kv_heads, head_dim, value_dim = self.spec.heads_of(layer)
            padded = -(-value_dim // _LANES) * _LANES  # as values are
            numbers += kv_heads * (head_dim + padded) if self.spec.holds_keys(layer) else 0
        return numbers * self._number_bytes

    @property
    def state_bytes(self) -> int:
        """Memory of the states of recurrent layers after a token; 0: there are none."""
        return int(self._decoder.state_bytes)

    @property
    def node_bytes(self) -> int:
        """Memory of a provisional node beside its keys and values: what it does to states."""
        return int(self._decoder.record_bytes)

    def row_bytes(self, tokens: int, nodes: int = 16) -> int:
        """Memory that a row of `tokens` tokens comes to need, with trees of `nodes` nodes.

        With recurrent layers: keys and values, two states (a prompt's is written beside the last),
        those that are kept, and what the nodes of a tree do to them.
        """
        every = self.checkpoint_tokens
        states = (2 + (tokens // every if every else 0)) * self.state_bytes
        return tokens * self.token_bytes + states + nodes * self.node_bytes

    @property
    def cache_bytes(self) -> int:
        """Memory that keys, values and states of all rows take; may be asked by any thread.

        Raises:
            UnsupportedError: a forked child.
        """
        check_process(self._pid)
        with self._changing:  # passes take pages while they do not hold Python's lock
            return int(self._decoder.cache_bytes)

    def _row(self, row: int) -> RowState:
        if row not in self._rows:
            raise ArgumentError(f"row {row} is not open")
        return self._rows[row]


def _first_rows(
    matrix: tuple[str, NDArray[np.uint8]], rows: int, spec: DecoderSpec
) -> tuple[str, NDArray[np.uint8]]:
    """A packed matrix cut to its first rows: whole blocks, so nothing is packed anew."""
    if not 0 < rows <= spec.vocab_size or rows % _LANES:
        raise ArgumentError(
            f"outputs {rows} must be a multiple of {_LANES}, at most {spec.vocab_size}"
        )
    layout, data = matrix
    return layout, data[: extension().packed_bytes(layout, rows, spec.hidden)]


def _check_ids(ids: NDArray[np.int64], vocab_size: int) -> None:
    ordered = ids.ndim == 1 and len(ids) > 0 and bool((ids[1:] > ids[:-1]).all())
    if not ordered or ids[0] < 0 or ids[-1] >= vocab_size:
        raise ArgumentError(f"outputs must be tokens below {vocab_size}, each once, ascending")
