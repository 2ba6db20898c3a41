"""The graph backend: the eager backend's model, each forward launched as one CUDA graph.

A small forward on a GPU is bound by launching its kernels one by one. A graph launches all of them
at once, but repeats fixed work on fixed memory, so trees are padded: a graph is recorded for each
(rows, nodes, slots read), when it is first needed, and dropped when others are used more. Prefill
and larger trees run without a graph, as on the eager backend but for the slots. What is recorded is
in `static`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from redwood.backends.base import AcceptedPath, Nodes
from redwood.backends.cuda_graph.recording import CudaRecorder, Recorder, Recording
from redwood.backends.cuda_graph.static import (
    ATTENTION,
    GraphShape,
    StaticForward,
    StaticRow,
    StaticSlots,
)
from redwood.backends.eager.backend import EagerBackend, run_rows
from redwood.backends.eager.probe import allowed, distance, own_rounding
from redwood.backends.rows import check_distinct
from redwood.errors import ArgumentError, UnsupportedError
from redwood.models._transformers import attention_of

NODES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Nodes per row that graphs are recorded for."""

_MOST_TOKENS = 2048  # rows x nodes; beyond that, launching costs little compared to the work
_FEWEST_SLOTS = 128
_FIRST_SLOTS = 1024  # made for every row at once; more come when a row needs them
_TREES = (64, 512)  # provisional nodes per row that graphs are recorded for
_PROMPT, _PARENTS = 8, [-1, 0, 0, 1, 2, 3]  # what `with_graphs` checks


class CudaGraphBackend:
    """The model of an eager backend behind recorded forwards.

    Args:
        eager: its model and capacity are used; it may still be used itself.
        rows: rows that slots are allocated for at first. They double when more are opened, and
            slots grow with the longest row; then every graph is recorded again.
        nodes: nodes per row that graphs are recorded for; larger trees run without one.
        graphs: most recordings to keep; the least recently used one is dropped first.
        graph_bytes: most bytes of their inputs and logits.
        recorder: makes the recordings; None: CUDA graphs.

    Raises:
        ArgumentError: no CUDA device and no recorder, rows or graphs below 1, no or wrong node
            counts.
    """

    name = "cuda_graph"
    page_slots = 64

    def __init__(
        self,
        eager: EagerBackend,
        *,
        rows: int = 1,
        nodes: Sequence[int] = NODES,
        graphs: int = 64,
        graph_bytes: int = 1 << 30,
        recorder: Recorder | None = None,
    ) -> None:
        if rows < 1 or not nodes or min(nodes) < 1 or graphs < 1:
            raise ArgumentError(
                f"rows {rows}, graphs {graphs} and nodes {list(nodes)} must be at least 1"
            )
        if recorder is None:
            if eager.device.type != "cuda":
                raise ArgumentError(f"CUDA graphs need a CUDA device, not {eager.device}")
            recorder = CudaRecorder(eager.device)
        self.model: PreTrainedModel = eager.model
        self.capacity, self.vocab_size = eager.capacity, eager.vocab_size
        self._record, self._nodes = recorder, sorted(nodes)
        row = eager.open()
        eager.extend([Nodes(row, [0])])
        # Attention kernels want aligned masks.
        self._most_slots = -(-(eager.capacity + 1) // 64) * 64
        slots = min(_FIRST_SLOTS + 64, self._most_slots)
        self._slots = StaticSlots(eager._row(row).layers, _power_of_two(rows), slots)
        eager.release(row)
        self.model.set_attn_implementation(ATTENTION)
        self._together = eager.together
        self._recorded: OrderedDict[GraphShape, tuple[StaticForward, Recording]] = OrderedDict()
        self._outputs: WeakValueDictionary[int, Tensor] = WeakValueDictionary()
        self._graphs, self._graph_bytes = graphs, graph_bytes
        self.recordings = 0
        """Number of recordings made so far; a forward that makes one takes longer than others."""
        self._rows: dict[int, StaticRow] = {}
        self._parked: dict[int, tuple[int, list[Tensor]]] = {}  # tokens, and their slots
        self._next_row = 0

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        device: torch.device = self.model.device
        return device

    @property
    def num_recorded(self) -> int:
        """How many graphs there are."""
        return len(self._recorded)

    @torch.inference_mode()
    def open(self) -> int:
        """Returns a new, empty row."""
        # Open rows fill the places from 0 on without a gap: a graph for n rows serves the first n.
        place = len(self._rows)
        if place == self._slots.rows:
            self._grow(2 * place, self._slots.slots)
        self._next_row += 1
        self._rows[self._next_row] = StaticRow(place, self._slots)
        return self._next_row

    def length(self, row: int) -> int:
        """Returns the number of committed tokens."""
        return self._parked[row][0] if row in self._parked else self._row(row).length

    def extend(self, rows: Sequence[Nodes]) -> list[Tensor]:
        """Appends provisional nodes and scores them in one forward; see `Backend.extend`.

        Raises:
            UnsupportedError: a forward that cannot be recorded.
        """
        check_distinct(rows)
        named = [self._row(nodes.row) for nodes in rows]
        grown = [row.grown(nodes, self.capacity) for row, nodes in zip(named, rows, strict=True)]
        before = [(row.parents, row.depths) for row in named]
        for row, (parents, depths) in zip(named, grown, strict=True):
            row.parents, row.depths = parents, depths
        try:
            return self._forward(named, rows)
        except BaseException:
            for row, (parents, depths) in zip(named, before, strict=True):  # nothing was appended
                row.parents, row.depths = parents, depths
            raise

    @torch.inference_mode()
    def _forward(self, named: Sequence[StaticRow], rows: Sequence[Nodes]) -> list[Tensor]:
        if self._together == "apart" and len(rows) > 1:  # in a graph, too, rows share a forward
            return [self._forward([row], [n])[0] for row, n in zip(named, rows, strict=True)]
        self._reserve(max(row.end for row in named))
        counts = [len(n.token_ids) if n.num_logits is None else n.num_logits for n in rows]
        places = [row.place for row in named]
        shape = self._recordable(
            max(places) + 1,
            max(len(nodes.token_ids) for nodes in rows),
            max(row.end for row in named),
            max(len(row.parents) for row in named),
        )
        if shape is None:
            for row in named:
                self._slots.ready(row.place, 1, row.end)
            if attention_of(self.model.config) != ATTENTION:
                self.model.set_attn_implementation(ATTENTION)
            return run_rows(self.model, named, rows, self._together)
        forward, recording = self._recording(shape)
        forward.fill(named, rows)
        recording.replay()
        # NOTE: copies of what was asked for, no more: the next replay overwrites the output.
        wanted = [
            recording.output[place, shape.nodes - count :]
            for place, count in zip(places, counts, strict=True)
        ]
        return list(torch.split(torch.cat(wanted), counts))

    @torch.inference_mode()
    def prepare(self, nodes: Sequence[int], lengths: Sequence[int], rows: int = 1) -> None:
        """Records the graphs for these node counts, lengths and number of rows ahead of use.

        Args:
            lengths: tokens and nodes of a row together.

        Raises:
            ArgumentError: more rows than there are slots for.
            UnsupportedError: a forward that cannot be recorded.
        """
        if rows > self._slots.rows:
            raise ArgumentError(f"there are slots for {self._slots.rows} rows, not {rows}")
        self._reserve(max(lengths, default=0))  # growing later would invalidate the recordings
        for count in nodes:
            for length in lengths:
                shape = self._recordable(rows, count, length, count)
                if shape is not None:
                    self._recording(shape)

    def _reserve(self, length: int) -> None:
        """Allocates slots for rows of this many tokens and nodes."""
        if length >= self._slots.slots:  # the last one is scratch
            slots = min(self._slots_read(length) + 64, self._most_slots)
            self._grow(self._slots.rows, slots)

    def _recordable(self, rows: int, nodes: int, length: int, tree: int) -> GraphShape | None:
        """The padded shape that serves these, its slots ready; None: there is none.

        Args:
            length: tokens and provisional nodes of the longest row.
            tree: most provisional nodes of a row.
        """
        slots = self._slots_read(length)
        rows = _power_of_two(rows)
        width = next((count for count in self._nodes if count >= nodes), None)
        if width is None or rows * width > _MOST_TOKENS or tree > _TREES[-1]:
            return None
        shape = GraphShape(rows, width, min(slots, self._slots.slots), _tree_width(width, tree))
        self._slots.ready(0, shape.rows, shape.slots)
        return shape

    def _recording(self, shape: GraphShape) -> tuple[StaticForward, Recording]:
        if shape in self._recorded:
            self._recorded.move_to_end(shape)
            return self._recorded[shape]
        self._drop(self._graphs - 1, self._graph_bytes)
        # Inputs are padding so far: that harms no row.
        forward = StaticForward(self.model, self._slots, shape, self._outputs)
        try:
            made = forward, self._record(forward.run)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UnsupportedError(
                f"{type(self.model).__name__} cannot be recorded as a CUDA graph: {error}"
            ) from error
        self._recorded[shape] = made
        self.recordings += 1
        self._drop(self._graphs, self._graph_bytes)
        return made

    def _drop(self, graphs: int, size: int) -> None:
        """Drops recordings until there are no more than these, but for the last one used."""
        while len(self._recorded) > max(graphs, 0) or (
            len(self._recorded) > 1 and self.graph_bytes > size
        ):
            self._finish()
            self._recorded.popitem(last=False)

    @property
    def graph_bytes(self) -> int:
        """Bytes that inputs and logits of the recordings take."""
        held: dict[int, int] = {}
        for forward, _ in self._recorded.values():
            held |= forward.buffers
        return sum(held.values())

    def _grow(self, rows: int, slots: int) -> None:
        self._finish()
        self._recorded.clear()
        self._slots.grow(rows, slots)

    def _finish(self) -> None:
        """Waits for launched work: a graph must not be freed while it runs."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _slots_read(self, needed: int) -> int:
        """Slots that attention reads: 128, 192, 256, 384, .. so that cost follows the context."""
        high = max(_FEWEST_SLOTS, _power_of_two(needed))
        low = high // 4 * 3
        return min(low if _FEWEST_SLOTS < needed <= low else high, self._most_slots)

    @torch.inference_mode()
    def commit(self, rows: Sequence[AcceptedPath]) -> None:
        """Keeps a path of provisional nodes per row; see `Backend.commit`."""
        for kept in rows:
            self._row(kept.row).check_path(kept)
        moves = []
        for kept in rows:
            row = self._row(kept.row)
            sources = row.moved(kept.nodes)
            if sources:
                moves.append((row.place, row.length + len(kept.nodes) - len(sources), sources))
        if moves:
            self._slots.pack(moves)
        for kept in rows:
            self._row(kept.row).keep(len(kept.nodes))

    def truncate(self, row: int, length: int) -> None:
        """Drops provisional nodes and committed tokens past `length`."""
        self._row(row).cut(length)

    @property
    def parked_token_bytes(self) -> int:
        """Bytes that keys and values of a token take in a parked row."""
        return self._slots.slot_bytes

    @torch.inference_mode()
    def park(self, row: int) -> None:
        """Moves a row out of the static slots: graphs run over all places that are taken."""
        held = self._row(row)
        parked = held.length, self._slots.copy_out(held.place, held.length)
        self.release(row)
        self._parked[row] = parked

    @torch.inference_mode()
    def fork(self, row: int, length: int) -> int:
        """Returns a row with a copy of the first `length` committed tokens of another.

        Raises:
            ArgumentError: a row that is not open, a length that it does not have.
        """
        if not 0 <= length <= self.length(row):
            raise ArgumentError(f"fork: length {length} is not in 0..{self.length(row)}")
        held = self._parked.get(row)
        slots = self._slots.copy_out(self._row(row).place, length) if held is None else held[1]
        made = self.open()
        self._reserve(length)
        self._slots.copy_in(self._row(made).place, slots, length)
        self._row(made).length = length
        return made

    def pages(self, rows: Sequence[int]) -> int:
        """Returns how many times 64 slots these rows hold; none is shared."""
        return sum(-(-self.length(row) // self.page_slots) for row in rows)

    @torch.inference_mode()
    def release(self, row: int) -> None:
        """Forgets the row; the last place moves into its gap."""
        if self._parked.pop(row, None) is not None:
            return
        gap = self._row(row).place
        del self._rows[row]
        self._slots.forget(gap)
        for other in self._rows.values():
            if other.place == len(self._rows) and other.place != gap:
                self._slots.move(other.place, gap, other.end)
                other.place = gap

    def _row(self, row: int) -> StaticRow:
        if row not in self._rows:
            raise ArgumentError(f"row {row} is not open")
        return self._rows[row]


def with_graphs(
    eager: EagerBackend,
    *,
    rows: int = 1,
    nodes: Sequence[int] = NODES,
    recorder: Recorder | None = None,
) -> CudaGraphBackend:
    """Returns a graph backend around this one, checked: a small tree must get the same logits.

    Args and ArgumentError: see `CudaGraphBackend`.

    Raises:
        UnsupportedError: the model cannot be recorded, or its logits differ.
    """
    if eager.recurrent.modules:
        raise UnsupportedError(
            f"{type(eager.model).__name__} has recurrent layers, which CUDA graphs do not run: "
            "use --backend eager"
        )
    made = CudaGraphBackend(eager, rows=rows, nodes=nodes, recorder=recorder)
    want, got = (_tree_logits(backend) for backend in (eager, made))
    worst, limit = distance(got, want), allowed(own_rounding(eager.model), eager.model.dtype)
    if not worst <= limit:
        raise UnsupportedError(
            f"{type(eager.model).__name__} gives other logits from a CUDA graph (difference "
            f"{worst:.2g} of their spread, where rounding explains {limit:.2g})"
        )
    return made


def _tree_logits(backend: EagerBackend | CudaGraphBackend) -> Tensor:
    """Logits [nodes, V] of a small tree, on the CPU."""
    tokens = [i % backend.vocab_size for i in range(1, _PROMPT + len(_PARENTS) + 1)]
    row = backend.open()
    try:
        backend.extend([Nodes(row, tokens[:_PROMPT], num_logits=1)])
        backend.commit([AcceptedPath(row, range(_PROMPT))])
        (logits,) = backend.extend([Nodes(row, tokens[_PROMPT:], _PARENTS)])
        return logits.float().cpu()
    finally:
        backend.release(row)


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _tree_width(nodes: int, tree: int) -> int:
    """Provisional nodes that a shape has inputs for: few sizes, as each is a graph of its own."""
    return next(width for width in (max(nodes, _TREES[0]), *_TREES) if width >= tree)
