"""The graph backend: the eager backend's model, each forward launched as one CUDA graph.

A small forward on a GPU is bound by launching its kernels one by one. A graph launches all of them
at once, but repeats fixed work on fixed memory, so trees are padded: a graph is recorded for each
(rows, nodes, slots read), when it is first needed. Prefill and larger trees run without a graph, on
the same slots. What is recorded is in `_static.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from redwood.backends._probe import allowed, distance, own_rounding
from redwood.backends._recording import CudaRecorder, Recorder, Recording
from redwood.backends._rows import check_distinct
from redwood.backends._static import ATTENTION, Shape, StaticForward, StaticRow, StaticSlots
from redwood.backends.base import Kept, Nodes
from redwood.backends.eager import EagerBackend
from redwood.errors import ArgumentError, UnsupportedError

NODES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Nodes per row that graphs are recorded for."""

_MOST_TOKENS = 2048  # of rows x nodes: from there on a launch costs little beside the work
_FEWEST_SLOTS = 128
_PROMPT, _PARENTS = 8, [-1, 0, 0, 1, 2, 3]  # what `with_graphs` checks


class CudaGraphBackend:
    """The model of an eager backend behind recorded forwards.

    Args:
        eager: its model and capacity are taken; it may be used beside this one.
        rows: rows that slots are made for at once. They double when more are opened, and then
            every graph is recorded anew.
        nodes: nodes per row that graphs are recorded for; larger trees run without one.
        recorder: makes the recordings; None: CUDA graphs.

    Memory is taken at once: `rows` x capacity slots.

    Raises:
        ArgumentError: no CUDA device and no recorder, rows below 1, no or wrong node counts.
    """

    name = "cuda_graph"

    def __init__(
        self,
        eager: EagerBackend,
        *,
        rows: int = 1,
        nodes: Sequence[int] = NODES,
        recorder: Recorder | None = None,
    ) -> None:
        if rows < 1 or not nodes or min(nodes) < 1:
            raise ArgumentError(f"rows {rows} and nodes {list(nodes)} must be at least 1")
        if recorder is None:
            if eager.device.type != "cuda":
                raise ArgumentError(f"CUDA graphs need a CUDA device, not {eager.device}")
            recorder = CudaRecorder(eager.device)
        self.model: PreTrainedModel = eager.model
        self.capacity, self.vocab_size = eager.capacity, eager.vocab_size
        self._record, self._nodes = recorder, sorted(nodes)
        row = eager.open()
        eager.extend([Nodes(row, [0])])
        slots = -(-(eager.capacity + 1) // 64) * 64  # attention kernels want aligned masks
        self._slots = StaticSlots(eager._row(row).layers, _power_of_two(rows), slots)
        eager.release(row)
        self.model.set_attn_implementation(ATTENTION)
        self._recorded: dict[Shape, tuple[StaticForward, Recording]] = {}
        self._rows: dict[int, StaticRow] = {}
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
            self._recorded.clear()
            self._slots.grow()
        self._slots.clear(place)
        self._next_row += 1
        self._rows[self._next_row] = StaticRow(place)
        return self._next_row

    def length(self, row: int) -> int:
        """Returns the number of committed tokens."""
        return self._row(row).length

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
        most = max(len(nodes.token_ids) for nodes in rows)
        counts = [len(n.token_ids) if n.num_logits is None else n.num_logits for n in rows]
        slots = self._slots_read(max(row.length + len(row.parents) for row in named))
        places = [row.place for row in named]
        shape = self._recordable(max(places) + 1, most, slots)
        if shape is None:
            first, last = min(places), max(places)
            shape = Shape(first, last - first + 1, most, slots, max(1, *counts))
            forward = StaticForward(self.model, self._slots, shape)
            forward.fill(named, rows)
            logits = forward.run()
        else:
            forward, recording = self._recording(shape)
            forward.fill(named, rows)
            recording.replay()
            logits = recording.output.clone()  # the next replay overwrites it
        return [
            logits[place - shape.first, shape.kept - count :]
            for place, count in zip(places, counts, strict=True)
        ]

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
        for count in nodes:
            for length in lengths:
                shape = self._recordable(rows, count, self._slots_read(length))
                if shape is not None:
                    self._recording(shape)

    def _recordable(self, rows: int, nodes: int, slots: int) -> Shape | None:
        """The padded shape that serves these; None: there is none."""
        rows = _power_of_two(rows)
        width = next((count for count in self._nodes if count >= nodes), None)
        if width is None or rows * width > _MOST_TOKENS:
            return None
        return Shape(0, rows, width, slots, width)

    def _recording(self, shape: Shape) -> tuple[StaticForward, Recording]:
        if shape not in self._recorded:
            forward = StaticForward(self.model, self._slots, shape)  # padding: harms no row
            try:
                self._recorded[shape] = forward, self._record(forward.run)
            except torch.cuda.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise UnsupportedError(
                    f"{type(self.model).__name__} cannot be recorded as a CUDA graph: {error}"
                ) from error
        return self._recorded[shape]

    def _slots_read(self, needed: int) -> int:
        """Slots that attention reads: 128, 192, 256, 384, .. so that cost follows the context."""
        high = max(_FEWEST_SLOTS, _power_of_two(needed))
        low = high // 4 * 3
        return min(low if _FEWEST_SLOTS < needed <= low else high, self._slots.slots)

    @torch.inference_mode()
    def commit(self, rows: Sequence[Kept]) -> None:
        """Keeps a path of provisional nodes per row; see `Backend.commit`."""
        for kept in rows:
            self._row(kept.row).check_path(kept)
        for kept in rows:
            row, nodes = self._row(kept.row), kept.nodes
            moved = next((i for i, node in enumerate(nodes) if node != i), len(nodes))
            if moved < len(nodes):
                sources = [row.length + node for node in nodes[moved:]]
                self._slots.pack(row.place, row.length + moved, sources)
            row.cut(row.length)
            row.length += len(nodes)

    def truncate(self, row: int, length: int) -> None:
        """Drops provisional nodes and committed tokens past `length`."""
        self._row(row).cut(length)

    @torch.inference_mode()
    def release(self, row: int) -> None:
        """Forgets the row; the last place moves into its gap."""
        gap = self._row(row).place
        del self._rows[row]
        for other in self._rows.values():
            if other.place == len(self._rows) and other.place != gap:
                self._slots.move(other.place, gap)
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
        backend.commit([Kept(row, range(_PROMPT))])
        (logits,) = backend.extend([Nodes(row, tokens[_PROMPT:], _PARENTS)])
        return logits.float().cpu()
    finally:
        backend.release(row)


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
