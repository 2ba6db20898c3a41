"""The graph backend: padding, static slots, buckets of length, and what a recording may not do.

What every backend must do is in `test_backends.py`. On a CPU, `Tape` stands for the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_backends import ARCHITECTURES, PARENTS, TOKENS, _filled, _random_model
from torch import Tensor

from conftest import tiny_llama
from graph_kit import Tape
from redwood.backends.base import AcceptedPath, Backend, Nodes
from redwood.backends.cuda_graph.backend import CudaGraphBackend, with_graphs
from redwood.backends.cuda_graph.recording import Repeated
from redwood.backends.load import load_eager, open_model, wrap_model
from redwood.drafters.base import ModelDrafter, NgramDrafter
from redwood.engine.engine import RowEngine
from redwood.errors import ArgumentError, CapacityError, UnsupportedError
from redwood.sampling import SamplingParams

TEXT = np.random.default_rng(0).integers(2, 300, 256).tolist()


def _tree(backend: Backend, text: list[int]) -> Tensor:
    """Logits of a tree behind a text, in a row of its own."""
    row = _filled(backend, text, chunk=50)
    (logits,) = backend.extend([Nodes(row, TOKENS, PARENTS)])
    backend.release(row)
    return logits


def _read(made: CudaGraphBackend, rows: int) -> Tensor:
    """A copy of all slots of these places that may be read."""
    slots = min(made._slots._finite[:rows])
    return torch.cat([block[:, :rows, :, :slots].clone() for block in made._slots._blocks])


def _close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("length", [1, 119, 120, 121, 184, 185, 240, 248])
def test_trees_are_right_on_both_sides_of_every_bucket_of_length(length: int) -> None:
    eager = wrap_model(tiny_llama())
    made = with_graphs(eager, recorder=Tape)
    _close(_tree(made, TEXT[:length]), _tree(eager, TEXT[:length]))


def test_attention_reads_little_more_than_what_is_held() -> None:
    made = CudaGraphBackend(wrap_model(tiny_llama(max_position_embeddings=4096)), recorder=Tape)
    for needed in (1, 128, 129, 192, 193, 256, 257, 1000, 1537, 4000, 4096):
        read = made._slots_read(needed)
        assert needed <= read <= max(128, 1.5 * needed) and read % 64 == 0
    made._slots.grow(1, made._most_slots)
    assert made._slots_read(4096) == 4096 < made._slots.slots  # the scratch slot lies behind


@pytest.mark.parametrize("kind", sorted(ARCHITECTURES))
def test_architectures_with_windows_and_soft_caps_are_served(kind: str) -> None:
    eager = wrap_model(_random_model(kind))
    made = with_graphs(eager, recorder=Tape)
    _close(_tree(made, TEXT[:40]), _tree(eager, TEXT[:40]))


def test_a_tree_deeper_than_a_window_sees_by_depth_not_by_slot() -> None:
    eager = wrap_model(_random_model("mistral"))  # sees 8 positions
    made = with_graphs(eager, recorder=Tape)
    parents = [-1] + [node // 2 * 2 for node in range(23)]  # a path of even nodes, odd leaves
    found = []
    for backend in (eager, made):
        row = _filled(backend, TEXT[:5])
        (logits,) = backend.extend([Nodes(row, TEXT[50:74], parents)])
        found.append(logits)
    _close(found[1], found[0])


def test_any_walk_of_calls_gives_the_logits_of_the_eager_backend() -> None:
    eager = wrap_model(tiny_llama())
    made = with_graphs(eager, nodes=(1, 4, 16), recorder=Tape)
    rng, rows = np.random.default_rng(3), list[tuple[int, int]]()
    for _ in range(80):
        if len(rows) < 5 and rng.random() < 0.2 or not rows:
            rows.append((eager.open(), made.open()))
        chosen = [pair for pair in rows if rng.random() < 0.6] or rows[:1]
        entries: list[tuple[list[int], list[int] | None, int | None]] = []
        for _ in chosen:
            count = int(rng.choice([1, 2, 5, 16, 20]))
            parents = [int(rng.integers(-1, i)) for i in range(count)]
            tokens = rng.integers(0, 300, count).tolist()
            entries.append((tokens, parents, rng.choice([None, 1, 0]) if count > 1 else None))
        if any(eager.length(a) > 200 for a, _ in chosen):
            for pair in chosen:
                eager.release(pair[0])
                made.release(pair[1])
                rows.remove(pair)
            continue
        want = eager.extend([Nodes(a, *e) for (a, _), e in zip(chosen, entries, strict=True)])
        got = made.extend([Nodes(b, *e) for (_, b), e in zip(chosen, entries, strict=True)])
        for x, y in zip(got, want, strict=True):
            _close(x, y)
        for (a, b), (_, parents, _) in zip(chosen, entries, strict=True):
            assert parents is not None
            path = [int(rng.integers(len(parents)))]
            while parents[path[0]] >= 0:
                path.insert(0, parents[path[0]])
            if rng.random() < 0.8:
                eager.commit([AcceptedPath(a, path)])
                made.commit([AcceptedPath(b, path)])
            else:
                cut = int(rng.integers(eager.length(a) + 1))
                eager.truncate(a, cut)
                made.truncate(b, cut)
            assert eager.length(a) == made.length(b)


def test_a_shape_is_recorded_once_and_replayed() -> None:
    tapes: list[Tape] = []

    def recorder(work: Callable[[], Tensor]) -> Tape:
        tapes.append(Tape(work))
        return tapes[-1]

    made = CudaGraphBackend(wrap_model(tiny_llama()), recorder=recorder)
    row = _filled(made, TEXT[:20])
    for step in range(5):
        made.extend([Nodes(row, TOKENS[: 5 + step % 3], PARENTS[: 5 + step % 3])])
        made.commit([AcceptedPath(row, [0])])
    assert made.num_recorded == len(tapes) == 2  # 32 nodes for the prompt, 8 for the trees
    assert [tape.num_replays for tape in tapes] == [1, 5]


def test_prepared_shapes_are_not_recorded_again() -> None:
    made = CudaGraphBackend(wrap_model(tiny_llama()), recorder=Tape, rows=2)
    made.prepare([1, 3, 4, 8, 1000], [20, 150], rows=2)
    assert made.num_recorded == 3 * 2
    a, b = made.open(), made.open()
    made.extend([Nodes(a, TOKENS, PARENTS), Nodes(b, [1])])
    assert made.num_recorded == 3 * 2
    with pytest.raises(ArgumentError, match="2 rows, not 3"):
        made.prepare([1], [1], rows=3)


def test_larger_trees_run_without_a_recording() -> None:
    eager = wrap_model(tiny_llama())
    made = CudaGraphBackend(eager, nodes=(1, 2), recorder=Tape)
    _close(_tree(made, TEXT[:30]), _tree(eager, TEXT[:30]))
    assert made.num_recorded == 0


def test_logits_stay_after_later_forwards() -> None:
    made = CudaGraphBackend(wrap_model(tiny_llama()), recorder=Tape)
    row = _filled(made, TEXT[:20])
    (first,) = made.extend([Nodes(row, [3])])
    held = first.clone()
    made.truncate(row, 20)
    made.extend([Nodes(row, [250])])
    assert torch.equal(first, held)


def test_rows_and_their_texts_survive_growth_and_the_release_of_others() -> None:
    eager = wrap_model(tiny_llama())
    made = CudaGraphBackend(eager, recorder=Tape)
    texts = [TEXT[i : i + 10 + 7 * i] for i in range(5)]
    rows = [_filled(made, text) for text in texts]
    for gone in (0, 3):
        made.release(rows[gone])
    left = [1, 2, 4]
    got = made.extend([Nodes(rows[i], TOKENS, PARENTS) for i in left])
    for i, logits in zip(left, got, strict=True):
        _close(logits, _tree(eager, texts[i]))
    assert sorted(row.place for row in made._rows.values()) == [0, 1, 2]


def test_rows_that_are_kept_leave_their_places_and_are_forked_from() -> None:
    made = CudaGraphBackend(wrap_model(tiny_llama()), recorder=Tape)
    rows = [_filled(made, text, chunk=50) for text in (TEXT[:90], TEXT[5:60], TEXT[9:150])]
    made.park(rows[0])
    assert len(made._rows) == 2 and made.length(rows[0]) == 90 and made.pages(rows[:1]) == 2
    with pytest.raises(ArgumentError, match="fork: length"):
        made.fork(rows[0], 91)
    for source, length in ((0, 90), (0, 33), (2, 141), (0, 0)):
        text = (TEXT, TEXT[5:], TEXT[9:])[source]
        fork = made.fork(rows[source], length)
        assert made.length(fork) == length
        (logits,) = made.extend([Nodes(fork, TOKENS, PARENTS)])
        _close(logits, _tree(made, text[:length]) if length else logits)
        made.release(fork)
    for row in rows:
        made.release(row)
    assert not made._rows and not made._parked
    with pytest.raises(ArgumentError, match="not open"):
        made.fork(rows[0], 1)


def test_prompts_that_were_read_stay_and_texts_are_those_without() -> None:
    plain = RowEngine(load := with_graphs(wrap_model(tiny_llama()), rows=4, recorder=Repeated))
    engine = RowEngine(load, NgramDrafter(), kv_cache=1 << 24, max_rows=3, prefill_chunk=40)
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    cached = 0
    for text in (TEXT[:100], TEXT[:140], TEXT[:90] + TEXT[3:60], TEXT[:101]):
        said: list[list[int]] = []
        for each in (plain, engine):
            stats = each.stats(each.add(text, params))
            said.append([])
            while each.busy:
                for step in each.step():
                    said[-1] += step.token_ids
        cached += stats.num_cached_tokens
        assert said[0] == said[1]
    assert cached > 250
    engine.prefixes.clear()
    assert not load._rows and not load._parked


def test_a_forward_touches_no_slot_of_other_rows() -> None:
    made = CudaGraphBackend(wrap_model(tiny_llama()), recorder=Tape)
    rows = [_filled(made, TEXT[:20]) for _ in range(4)]
    before = _read(made, 4)
    made.extend([Nodes(rows[2], TOKENS, PARENTS)])
    after = _read(made, 4)
    after[:, 2, :, 20 : 20 + len(TOKENS)] = before[:, 2, :, 20 : 20 + len(TOKENS)]
    assert torch.equal(after, before)


def test_a_row_reads_nothing_that_was_there_before_it() -> None:
    made = CudaGraphBackend(wrap_model(tiny_llama()), recorder=Tape)
    want = _tree(made, TEXT[:10])
    _filled(made, TEXT[:200])
    row = _filled(made, TEXT[:200])
    with torch.inference_mode():
        for block in made._slots._blocks:
            block[:, 1] = float("nan")  # as an overflow would leave it
    made.release(row)
    (got,) = made.extend([Nodes(_filled(made, TEXT[:10]), TOKENS, PARENTS)])
    _close(got, want)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_padding_never_makes_a_number_that_is_not_finite(kind: str) -> None:
    made = CudaGraphBackend(wrap_model(_random_model(kind)), rows=4, recorder=Tape)
    row = made.open()
    made.extend([Nodes(row, [5, 6, 7])])
    for _, recording in made._recorded.values():
        assert torch.isfinite(recording.output).all()
    assert made._slots._finite == [128, 0, 0, 0]  # the others are not read
    assert torch.isfinite(_read(made, 1)).all()
    for block in made._slots._blocks:
        assert torch.isfinite(block[:, 0, :, -1]).all()  # the scratch slot


def test_one_model_serves_the_eager_backend_and_this_one_in_turn() -> None:
    eager = wrap_model(tiny_llama())
    made = CudaGraphBackend(eager, recorder=Tape)
    for _ in range(2):
        _close(_tree(made, TEXT[:20]), _tree(eager, TEXT[:20]))
    eager.model.set_attn_implementation("sdpa")  # as somebody else may leave it
    _close(_tree(made, TEXT[:90]), _tree(eager, TEXT[:90]))


def test_what_cannot_be_recorded_is_refused_and_nothing_is_appended() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    eager = wrap_model(tiny_llama(rope_parameters=rope))
    made = CudaGraphBackend(eager, recorder=Tape)
    row = made.open()
    with pytest.raises(UnsupportedError, match="cannot be recorded"):
        made.extend([Nodes(row, [1])])
    assert made._rows[row].parents == [] and made.num_recorded == 0
    with pytest.raises(UnsupportedError, match="cannot be recorded"):
        with_graphs(eager, recorder=Tape)


def test_logits_that_differ_are_refused() -> None:
    class Wrong(Tape):
        def replay(self) -> None:
            super().replay()
            self.output += torch.linspace(0, 9, self.output.shape[-1])

    with pytest.raises(UnsupportedError, match="other logits from a CUDA graph"):
        with_graphs(wrap_model(tiny_llama()), recorder=Wrong)


@pytest.mark.parametrize("params", [{}, {"temperature": 0.9, "seed": 5}])
def test_trees_on_graphs_give_the_text_of_plain_decoding(params: dict[str, Any]) -> None:
    def graphs(seed: int, layers: int) -> CudaGraphBackend:
        return with_graphs(wrap_model(tiny_llama(seed, layers)), rows=4, recorder=Repeated)

    prompts = [TEXT[:12], TEXT[40:45] * 4, TEXT[7:9]]
    texts = []
    for target, drafter, budget in (
        (wrap_model(tiny_llama(0, 2)), None, 1),
        (graphs(0, 2), None, 1),
        (graphs(0, 2), NgramDrafter(), 9),
        (graphs(0, 2), ModelDrafter(graphs(1, 1)), 6),
    ):
        engine = RowEngine(target, drafter, budget=budget)
        keys = [engine.add(p, SamplingParams(max_tokens=16, **params)) for p in prompts]
        text: dict[int, list[int]] = {key: [] for key in keys}
        while engine.busy:
            for step in engine.step():
                text[step.request] += step.token_ids
        texts.append(list(text.values()))
    assert texts[1:] == texts[:1] * 3


def test_wrong_arguments_are_refused(tiny_model_folder: Path) -> None:
    eager = wrap_model(tiny_llama())
    with pytest.raises(ArgumentError, match="at least 1"):
        CudaGraphBackend(eager, rows=0, recorder=Tape)
    with pytest.raises(ArgumentError, match="at least 1"):
        CudaGraphBackend(eager, nodes=(), recorder=Tape)
    with pytest.raises(ArgumentError, match="need a CUDA device, not cpu"):
        CudaGraphBackend(eager)
    with pytest.raises(ArgumentError, match="cuda_graph backend needs a CUDA device, not cpu"):
        open_model(str(tiny_model_folder), backend="cuda_graph", device="cpu")
    made = CudaGraphBackend(eager, recorder=Tape)
    row = made.open()
    with pytest.raises(CapacityError, match="capacity"):
        made.extend([Nodes(row, [1] * 300)])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_cuda_graphs_give_the_logits_of_the_eager_backend(
    dtype: str, tiny_model_folder: Path
) -> None:
    eager = load_eager(tiny_model_folder, dtype=dtype, device="cuda")
    made = with_graphs(eager)
    limit = {"bfloat16": 0.2, "float16": 0.03, "float32": 1e-2}[dtype]
    for length in (5, 100, 200):
        got, want = _tree(made, TEXT[:length]), _tree(eager, TEXT[:length])
        assert float((got - want).abs().max()) < limit * float(want.float().std())
