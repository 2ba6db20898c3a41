"""Timing forwards: what is run, in which order, and what is given back. No time is judged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import redwood
from redwood.backends.base import AcceptedPath, Nodes
from redwood.errors import ArgumentError
from redwood.profiling import measure
from redwood.profiling.measure import Kind, fill_seconds, measure_curve, quick_curve


class Watched:
    """A backend that writes down what it is asked for; every forward takes a second."""

    name, vocab_size, device = "watched", 300, torch.device("cpu")

    def __init__(self, capacity: int = 64) -> None:
        self.capacity = capacity
        self.forwards: list[tuple[int, int, int]] = []
        self.lengths: dict[int, int] = {}
        self.now, self.opened = 0.0, 0

    def open(self) -> int:
        self.opened += 1
        self.lengths[self.opened] = 0
        return self.opened

    def extend(self, rows: Sequence[Nodes]) -> list[torch.Tensor]:
        self.now += 1.0
        if rows[0].num_logits is None:
            first = rows[0]
            forward = (len(rows), len(first.token_ids), self.lengths[first.row])
            self.forwards.append(forward)
        return [torch.zeros(len(row.token_ids), 300) for row in rows]

    def commit(self, rows: Sequence[AcceptedPath]) -> None:
        for kept in rows:
            self.lengths[kept.row] += len(kept.nodes)

    def truncate(self, row: int, length: int) -> None:
        assert self.lengths[row] == length

    def release(self, row: int) -> None:
        del self.lengths[row]


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Any:
    made = Watched()
    monkeypatch.setattr(measure, "perf_counter", lambda: made.now)
    return made


def test_kinds_take_turns_and_all_rows_are_given_back(watched: Any) -> None:
    kinds = [Kind(1, 1, 8), Kind(1, 4, 8), Kind(2, 2, 8), Kind(1, 1, 16), Kind(1, 60, 8)]
    rounds: list[int] = []
    curve = measure_curve(watched, kinds, repeats=3, seconds=99, on_round=rounds.append)
    timed = [tuple(kind) for kind in kinds[:4]]  # the last one does not fit
    assert watched.forwards[0] == (1, 1, 8)  # warms up
    assert watched.forwards[1:5] == timed
    for turn in (1, 2):
        assert sorted(watched.forwards[1 + 4 * turn : 5 + 4 * turn]) == sorted(timed)
    assert rounds == [1, 2, 3]
    assert watched.lengths == {} and watched.opened == 3
    assert {(p.rows, p.nodes, p.context) for p in curve.points} == set(timed)
    assert all((p.ms, p.low, p.high) == (1000.0, 1000.0, 1000.0) for p in curve.points)


def test_no_forward_begins_after_the_time_is_over_but_one(watched: Any) -> None:
    kinds = [Kind(1, n, 8) for n in (1, 2, 4, 8)]
    curve = measure_curve(watched, kinds, repeats=5, seconds=6.0)
    assert len(watched.forwards) == 1 + 6
    assert [p.nodes for p in curve.points] == [1, 2, 4, 8]
    watched.forwards.clear()
    curve = measure_curve(watched, kinds, repeats=5, seconds=0.0)
    assert [p.nodes for p in curve.points] == [1] and len(watched.forwards) == 2


def test_rows_are_given_back_when_a_forward_fails(
    watched: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(row: int, length: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watched, "truncate", fail)
    with pytest.raises(KeyboardInterrupt):
        measure_curve(watched, [Kind(1, 1, 8)], repeats=1, seconds=1.0)
    assert watched.lengths == {}


def test_a_quick_curve_fits_into_small_contexts(watched: Any) -> None:
    assert [(p.nodes, p.context) for p in quick_curve(watched, 9).points][:2] == [(1, 9), (2, 9)]
    watched.capacity, watched.now = 4, 0.0
    assert {p.nodes for p in quick_curve(watched).points} <= {1, 2, 4}


def test_filling_is_timed_on_a_row_of_its_own(watched: Any) -> None:
    watched.capacity = 2048
    assert fill_seconds(watched, 1025) == 3.0  # chunks
    assert watched.lengths == {}


@pytest.mark.parametrize(
    ("kinds", "repeats"),
    [([], 1), ([Kind(1, 2, 0)], 1), ([Kind(2, 1, 0)], 1), ([Kind(1, 1, 0)], 0)],
)
def test_wrong_timings_are_refused(watched: Any, kinds: list[Kind], repeats: int) -> None:
    with pytest.raises(ArgumentError):
        measure_curve(watched, kinds, repeats=repeats, seconds=1.0)


@pytest.mark.parametrize("backend", ["native", "eager"])
def test_real_backends_are_timed(tiny_model_folder: Path, backend: str) -> None:
    target = redwood.load(str(tiny_model_folder), backend=backend).target
    curve = measure_curve(
        target, [Kind(1, 1, 20), Kind(1, 8, 20), Kind(2, 3, 20)], repeats=2, seconds=20.0
    )
    assert len(curve.points) == 3
    assert 0.0 < curve.ms([1], [20]) <= curve.ms([8], [20])
    assert quick_curve(target).ms([4], [30]) > 0.0
