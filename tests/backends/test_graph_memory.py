"""What the graph backend holds, zeroes, copies and sends to the device: counted, not timed."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from test_backends import PARENTS, TOKENS, _filled
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import tiny_llama
from graph_kit import Tape
from redwood.backends.base import AcceptedPath, Nodes
from redwood.backends.cuda_graph import static
from redwood.backends.cuda_graph.backend import CudaGraphBackend, with_graphs
from redwood.backends.eager.backend import EagerBackend
from redwood.backends.load import wrap_model
from redwood.errors import ArgumentError

CONTEXT = 8192
TEXT = np.random.default_rng(0).integers(2, 300, CONTEXT).tolist()


class InPlace:
    """A recorder whose output is what the work returned, as that of a CUDA graph."""

    def __init__(self, work: Callable[[], Tensor]) -> None:
        work()
        self._work, self.output = work, work()

    def replay(self) -> None:
        self._work()


class Written(TorchDispatchMode):
    """Counts the bytes that are zeroed or copied into tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        made = func(*args, **(kwargs or {}))
        if name in ("zero_", "fill_", "copy_", "cat", "zeros", "new_zeros", "zeros_like", "clone"):
            self.bytes += made.nbytes
        return made


def _eager(**changes: Any) -> EagerBackend:
    return wrap_model(tiny_llama(max_position_embeddings=CONTEXT, **changes))


def _graphs(eager: EagerBackend | None = None, **options: Any) -> CudaGraphBackend:
    return CudaGraphBackend(eager or _eager(), **{"recorder": InPlace, **options})


def _held(made: CudaGraphBackend) -> int:
    return sum(block.nbytes for block in made._slots._blocks)


def _slot_bytes(made: CudaGraphBackend) -> int:
    """Bytes of a slot of one row."""
    return _held(made) // (made._slots.rows * made._slots.slots)


def _close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, atol=2e-4, rtol=2e-4)


def _tree(backend: Any, row: int) -> Tensor:
    (logits,) = backend.extend([Nodes(row, TOKENS, PARENTS)])
    backend.truncate(row, backend.length(row))
    return logits


def test_a_long_context_takes_memory_only_where_it_is_used() -> None:
    eager = _eager()
    made = _graphs(eager)
    assert made.capacity == CONTEXT
    short = _filled(made, TEXT[:100])
    assert made._slots.slots <= 1088
    for length in (1087, 1500, 5000, CONTEXT - len(TOKENS)):
        row = _filled(made, TEXT[:length], chunk=700)
        _close(_tree(made, row), _tree(eager, _filled(eager, TEXT[:length], chunk=700)))
        assert made._slots.slots <= 1.5 * (length + len(TOKENS)) + 128
        _close(_tree(made, short), _tree(eager, _filled(eager, TEXT[:100])))
        made.release(row)


def test_opening_and_releasing_touches_what_rows_hold_and_no_more() -> None:
    made = _graphs(rows=4)
    _filled(made, TEXT[:5000], chunk=700)
    rows = [_filled(made, TEXT[:100]) for _ in range(3)]
    with Written() as written:
        made.release(rows[0])  # the last place moves into its gap
    assert 100 * _slot_bytes(made) <= written.bytes < 110 * _slot_bytes(made)
    with Written() as written:
        made.open()
    assert written.bytes == 0


def test_growing_needs_old_and_new_of_a_part_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = _graphs(_eager(layers=8))
    first = _filled(made, TEXT[:300])
    live = peak = _held(made)
    usual = Tensor.new_empty

    def new_empty(self: Tensor, *sizes: Any, **given: Any) -> Tensor:
        nonlocal live, peak
        tensor = usual(self, *sizes, **given)
        live += tensor.nbytes
        peak = max(peak, live)
        weakref.finalize(tensor, freed, tensor.nbytes)
        return tensor

    def freed(size: int) -> None:
        nonlocal live
        live -= size

    for block in made._slots._blocks:
        weakref.finalize(block, freed, block.nbytes)
    del block
    before, place = _held(made), made._slots.rows
    with Written() as written, monkeypatch.context() as patch:
        patch.setattr(Tensor, "new_empty", new_empty)
        second = made.open()
        gc.collect()
    assert made._slots.rows == 2 * place and _held(made) == live == 2 * before
    assert peak <= 2 * before + before // 4
    assert written.bytes < 600 * _slot_bytes(made)  # what was held, not the capacity
    made.extend([Nodes(second, [5])])
    eager = _eager(layers=8)
    _close(_tree(made, first), _tree(eager, _filled(eager, TEXT[:300])))


@pytest.mark.parametrize("rows", [True, False])
def test_memory_that_runs_out_while_growing_leaves_all_as_it_was(
    rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager = _eager()
    made = _graphs(eager)
    row = _filled(made, TEXT[:300])
    calls, usual = 0, Tensor.new_empty

    def new_empty(self: Tensor, *sizes: Any, **given: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise torch.OutOfMemoryError("no memory")
        return usual(self, *sizes, **given).fill_(float("nan"))

    with monkeypatch.context() as patch:
        patch.setattr(static.Tensor, "new_empty", new_empty)
        with pytest.raises(torch.OutOfMemoryError):
            if rows:
                made.open()
            else:
                made._reserve(2000)
    want = _tree(eager, _filled(eager, TEXT[:300]))
    _close(_tree(made, row), want)
    other = _filled(made, TEXT[:2000], chunk=700)
    _close(_tree(made, row), want)
    _close(_tree(made, other), _tree(eager, _filled(eager, TEXT[:2000], chunk=700)))


def test_the_graph_unused_for_longest_goes_first() -> None:
    eager = _eager()
    made = _graphs(eager, graphs=2)
    row = _filled(made, TEXT[:10])  # 16 nodes
    for count in (1, 2, 1, 4, 1):
        (logits,) = made.extend([Nodes(row, TOKENS[:count])])
        made.truncate(row, 10)
        assert made.num_recorded <= 2
    assert {shape.nodes for shape in made._recorded} == {1, 4}
    assert made.recordings == 4  # 16, 1, 2, 4
    made.extend([Nodes(row, TOKENS[:2])])
    assert made.recordings == 5 and {shape.nodes for shape in made._recorded} == {1, 2}
    made.truncate(row, 10)
    _close(_tree(made, row), _tree(eager, _filled(eager, TEXT[:10])))
    with pytest.raises(ArgumentError, match="graphs 0"):
        _graphs(graphs=0)


def test_inputs_and_logits_of_graphs_keep_within_their_bound() -> None:
    made = _graphs()
    made.prepare([1, 2, 4, 8, 16, 32], [100, 300, 700])
    assert made.num_recorded == 18
    bound = made.graph_bytes // 2
    small = _graphs(graph_bytes=bound)
    small.prepare([1, 2, 4, 8, 16, 32], [100, 300, 700])
    assert 1 <= small.num_recorded < 18 and small.graph_bytes <= bound
    assert small.recordings == 18


def test_graphs_prepared_for_long_rows_leave_those_for_short_ones() -> None:
    made = _graphs()
    made.prepare([1, 4], [100, 5000])
    assert made.num_recorded == made.recordings == 4
    row = _filled(made, TEXT[:10])
    _tree(made, row)
    made.extend([Nodes(row, [5])])
    assert made.recordings == 6  # a prompt of 16 and a tree of 8 nodes


def test_graphs_share_their_logits_and_callers_get_copies_of_theirs_alone() -> None:
    made = _graphs(rows=2)
    made.prepare([8], [100, 150, 300, 700], rows=2)
    outputs = {recording.output.data_ptr() for _, recording in made._recorded.values()}
    assert made.num_recorded == 4 and len(outputs) == 1
    one, other = made.open(), made.open()
    got = made.extend([Nodes(one, TOKENS[:5]), Nodes(other, TOKENS[:7], num_logits=1)])
    assert [len(logits) for logits in got] == [5, 1]
    row_bytes = got[0].element_size() * made.vocab_size
    assert got[0].untyped_storage().nbytes() == 6 * row_bytes
    held = got[0].clone()
    made.extend([Nodes(one, [9]), Nodes(other, [8])])
    assert torch.equal(got[0], held)
    assert made.num_recorded == 5
    made._recorded.clear()
    gc.collect()
    assert len(made._outputs) == 0


def test_what_is_sent_for_a_step_does_not_grow_with_the_context(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = _graphs()
    sent: list[int] = []
    usual = torch.from_numpy

    def from_numpy(array: Any) -> Tensor:
        sent.append(array.nbytes)
        return usual(array)

    totals = []
    for length in (10, 1000, 7000):
        row = _filled(made, TEXT[:length], chunk=700)
        _tree(made, row)
        sent.clear()
        with monkeypatch.context() as patch:
            patch.setattr(torch, "from_numpy", from_numpy)
            _tree(made, row)
        totals.append(sum(sent))
        made.release(row)
    assert len(set(totals)) == 1 and totals[0] < 4096


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("first", [3, 60, 70, 500, 600])
def test_trees_that_grow_over_several_forwards_see_all_their_nodes(
    first: int, window: int | None
) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    config = tiny_llama(max_position_embeddings=2048).config.to_dict()
    for name in ("architectures", "model_type"):
        config.pop(name)
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**config, sliding_window=window)).eval()
    eager = wrap_model(model)
    made = with_graphs(eager, recorder=Tape)
    rng = np.random.default_rng(first)
    parents = [int(rng.integers(max(-1, i - 9), i)) for i in range(first + 5)]
    found = []
    for backend in (eager, made):
        row = _filled(backend, TEXT[:50])
        backend.extend([Nodes(row, TEXT[:first], parents[:first], num_logits=0)])
        (logits,) = backend.extend([Nodes(row, TEXT[first : first + 5], parents[first:])])
        found.append(logits)
        path = [first + 4]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        backend.commit([AcceptedPath(row, path)])
        found.append(backend.extend([Nodes(row, [7])])[0])
    _close(found[2], found[0])
    _close(found[3], found[1])


def test_a_commit_of_several_rows_takes_one_index(monkeypatch: pytest.MonkeyPatch) -> None:
    made = _graphs(_eager(layers=6), rows=4)
    rows = [_filled(made, TEXT[:n]) for n in (4, 9, 6)]
    made.extend([Nodes(row, TOKENS, PARENTS) for row in rows])
    sent: list[Any] = []
    usual = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *a, **k: (sent.append(a), usual(*a, **k))[1])
    made.commit([AcceptedPath(row, [0, 2, 4]) for row in rows])
    monkeypatch.undo()
    assert len(sent) == 1
    eager = _eager(layers=6)
    text = [*TEXT[:9], TOKENS[0], TOKENS[2], TOKENS[4]]
    _close(_tree(made, rows[1]), _tree(eager, _filled(eager, text)))
