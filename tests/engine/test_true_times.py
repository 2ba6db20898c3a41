"""True times: a launch is no pass, and a recording is not the time of a size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import tiny_llama
from redwood.backends.base import AcceptedPath, Nodes
from redwood.backends.cuda_graph.backend import CudaGraphBackend
from redwood.backends.cuda_graph.recording import Repeated
from redwood.backends.load import wrap_model
from redwood.bench import clocks
from redwood.drafters.base import ModelDrafter, NgramDrafter, UnionDrafter
from redwood.engine import stats as stats_module
from redwood.engine.engine import RowEngine
from redwood.planner.planner import Planner, StepPlan
from redwood.profiling import measure
from redwood.profiling.latency import LatencyModel, LatencyPoint
from redwood.profiling.measure import Kind, fill_seconds, measure_curve, wait_for
from redwood.sampling import SamplingParams

PASS_S, RECORDING_S, COMMIT_S = 1.0, 100.0, 0.25


class Device:
    """An eager backend on a made-up GPU: calls return at once, their work takes seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, records: bool = False) -> None:
        self.backend = wrap_model(tiny_llama())
        self.device = torch.device("cuda", 0)
        self.now = self.pending = 0.0
        self.records, self.recordings = records, 0
        self._seen: set[tuple[int, int]] = set()
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        for module in (stats_module, measure, clocks):
            monkeypatch.setattr(module, "perf_counter", lambda: self.now)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def synchronize(self, device: object = None) -> None:
        self.now, self.pending = self.now + self.pending, 0.0

    def extend(self, rows: Sequence[Nodes]) -> list[Tensor]:
        size = len(rows), max(len(nodes.token_ids) for nodes in rows)
        if self.records and size not in self._seen:
            self._seen.add(size)
            self.recordings += 1
            self.now += RECORDING_S
        self.pending += PASS_S
        return self.backend.extend(rows)

    def commit(self, rows: Sequence[AcceptedPath]) -> None:
        self.pending += COMMIT_S
        self.backend.commit(rows)


class Noting(Planner):
    """A planner that writes down what it is told to learn from."""

    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__(*args, **given)
        self.told: list[tuple[float | None, float]] = []
        self.dropped = 0

    def end(self, plan: StepPlan, *args: Any) -> None:
        self.told.append(args[-2:])
        super().end(plan, *args)

    def drop(self, plan: StepPlan) -> None:
        self.dropped += 1
        super().drop(plan)


def _curve() -> LatencyModel:
    points = [LatencyPoint(1, nodes, 0, ms=1e3, low=1e3, high=1e3) for nodes in (1, 4, 16)]
    return LatencyModel(tuple(points))


def test_a_pass_is_booked_where_it_was_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    engine = RowEngine(device, NgramDrafter(), budget=4)
    key = engine.add([5, 9, 5, 9, 5], SamplingParams(max_tokens=4))
    stats = engine.stats(key)
    steps = 0
    while engine.busy:
        engine.step()
        steps += 1
    assert stats.seconds == {
        "prefill": PASS_S + COMMIT_S,
        "draft": 0.0,
        "target": steps * PASS_S,
        "verify": 0.0,
        "other": steps * COMMIT_S,
    }


def test_the_planner_learns_the_time_of_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    planner = Noting(NgramDrafter(), _curve())
    engine = RowEngine(device, planner=planner)
    engine.add([5, 9, 5, 9, 5], SamplingParams(max_tokens=6))
    while engine.busy:
        engine.step()
    assert planner.told and set(planner.told) == {(PASS_S, COMMIT_S)}


def test_a_recording_is_not_learned_as_the_time_of_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch, records=True)
    planner = Noting(NgramDrafter(), _curve())
    engine = RowEngine(device, planner=planner)
    stats = [
        engine.stats(engine.add([5, 9, 5, 9, 5], SamplingParams(max_tokens=6))) for _ in range(2)
    ]
    while engine.busy:
        engine.step()
    assert {target for target, _ in planner.told} == {None, PASS_S}
    assert device.recordings > 1
    assert all(each.seconds["target"] % PASS_S == 0.0 for each in stats)
    assert all(each.seconds["target"] < RECORDING_S < each.seconds["prefill"] for each in stats)


def test_a_draft_that_recorded_something_teaches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    device, draft = Device(monkeypatch), wrap_model(tiny_llama(1, 1))
    model = ModelDrafter(draft)
    drafter = UnionDrafter([NgramDrafter(), model])
    planner = Noting(drafter, _curve(), {model: _curve()})
    engine = RowEngine(device, planner=planner)
    key = engine.add([5, 9, 5, 9, 5], SamplingParams(max_tokens=40, ignore_eos=True))
    stats = engine.stats(key)
    propose, recordings = ModelDrafter.propose, 0

    def recorded(self: ModelDrafter, *args: Any) -> Any:
        nonlocal recordings
        recordings += 1
        draft.recordings = recordings  # type: ignore[attr-defined]
        device.now += RECORDING_S
        return propose(self, *args)

    monkeypatch.setattr(ModelDrafter, "propose", recorded)
    steps = 0
    while engine.busy:
        engine.step()
        steps += 1
    assert recordings > 0 and len(planner.told) + recordings == steps - 1  # the last drafts nothing
    assert stats.seconds["draft"] < RECORDING_S <= stats.seconds["prefill"]


def test_filling_and_curves_wait_and_leave_recordings_out(monkeypatch: pytest.MonkeyPatch) -> None:
    device: Any = Device(monkeypatch, records=True)
    assert fill_seconds(device, 100) == PASS_S + COMMIT_S
    curve = measure_curve(device, [Kind(1, 1, 8), Kind(1, 4, 8)], repeats=1, seconds=1e6)
    assert [point.ms for point in curve.points] == [1e3 * PASS_S] * 2
    clocked = clocks.ClockedBackend(device)
    row = clocked.open()
    clocked.extend([Nodes(row, [1])])
    assert clocked.seconds == PASS_S


def test_only_a_gpu_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    wait_for(torch.zeros(1))
    wait_for(torch.device("cpu"))
    wait_for(torch.device("cuda", 1))
    assert waited == [torch.device("cuda", 1)]


def test_the_graph_backend_says_when_it_recorded() -> None:
    made = CudaGraphBackend(wrap_model(tiny_llama()), graphs=1, recorder=Repeated)
    row, counts = made.open(), []
    for size in (1, 1, 2, 1):
        made.extend([Nodes(row, [5] * size)])
        made.truncate(row, 0)
        counts.append(measure.recordings_of(made))
    assert counts == [1, 1, 2, 3] and made.num_recorded == 1
