"""Memory that runs out, and a step that is interrupted, wherever the backend is asked: nothing is
leaked, and what is asked next is answered."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from redwood.drafters.base import ModelDrafter
from redwood.engine.engine import RowEngine
from redwood.sampling import SamplingParams
from redwood.testing import TableBackend

MIB = 1 << 20
TEXT = [(7 * i + i * i) % 89 + 1 for i in range(100)]
PROMPTS = [[*TEXT[:90], i, i] for i in range(3)] + [[*TEXT[:40], 80 + i] for i in range(3)]
PARAMS = SamplingParams(max_tokens=3, ignore_eos=True, temperature=0)


class _Failing(TableBackend):
    """One call of one method raises, and does nothing."""

    method, at = "", 0
    error: type[BaseException] = MemoryError

    def _count(self, method: str) -> None:
        if self.method == method:
            self.at -= 1
            if self.at == 0:
                raise self.error

    def open(self) -> int:
        self._count("open")
        return super().open()

    def fork(self, row: int, length: int) -> int:
        self._count("fork")
        return super().fork(row, length)

    def pages(self, rows: Any) -> int:
        self._count("pages")
        return super().pages(rows)

    def park(self, row: int) -> None:
        self._count("park")
        super().park(row)

    def truncate(self, row: int, length: int) -> None:
        self._count("truncate")
        super().truncate(row, length)

    def extend(self, rows: Any) -> Any:
        self.during()
        self._count("extend")
        return super().extend(rows)

    def during(self) -> None:
        """Happens in each pass."""


def _answers(engine: RowEngine) -> list[list[int]]:
    keys = [engine.add(prompt, PARAMS) for prompt in PROMPTS]
    made = {key: list[int]() for key in keys}
    while engine.busy:
        for step in engine.step():
            made.setdefault(step.request, []).extend(step.token_ids)
    return [made[key] for key in keys]


@pytest.mark.parametrize("kv_tokens", [None, 400])
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("method", ["open", "fork", "pages", "park", "truncate"])
def test_a_call_that_fails_leaks_nothing_and_the_next_requests_are_answered(
    method: str, error: type[BaseException], kv_tokens: int | None
) -> None:
    right = _answers(RowEngine(TableBackend(90, capacity=512, order=512)))
    for at in range(1, 9):
        target = _Failing(90, capacity=512, order=512)
        model = ModelDrafter(TableBackend(90, seed=1, capacity=512, order=512))
        model.keep(MIB)
        how: dict[str, Any] = dict(kv_cache=MIB, kv_tokens=kv_tokens, prefill_chunk=64, max_rows=4)
        engine = RowEngine(target, model, budget=4, **how)
        engine.add(TEXT, PARAMS)
        while engine.busy:
            engine.step()
        target.method, target.at, target.error = method, at, error
        for prompt in PROMPTS:
            engine.add(prompt, PARAMS)
        while engine.busy:
            try:
                engine.step()
            except error:
                assert target.at == 0
        target.method = ""
        assert _answers(engine) == right
        engine.prefixes.clear()
        model.clear()
        assert target.num_rows == model.backend.num_rows == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", ["pages", "park", "truncate"])
def test_what_cannot_be_kept_ends_no_request(method: str, caplog: pytest.LogCaptureFixture) -> None:
    target = _Failing(90, capacity=512, order=512)
    engine = RowEngine(target, kv_cache=MIB, prefill_chunk=64)
    target.method, target.at = method, 1
    assert _answers(engine) == _answers(RowEngine(TableBackend(90, capacity=512, order=512)))
    assert target.at <= 0 and "could not be kept" in caplog.text
    engine.prefixes.clear()
    assert target.num_rows == 0


def test_requests_that_could_not_be_admitted_wait_on() -> None:
    target = _Failing(90, capacity=512, order=512)
    engine = RowEngine(target, prefill_chunk=64)  # keeps nothing
    keys = [engine.add(prompt, PARAMS) for prompt in PROMPTS]
    target.method, target.at = "open", 4
    with pytest.raises(MemoryError):
        engine.step()
    assert target.num_rows == 0 and engine.busy
    ended = set[int]()
    while engine.busy:
        ended |= {step.request for step in engine.step() if step.finish_reason == "length"}
    assert ended == set(keys) and target.num_rows == 0


def _cached(engine: RowEngine) -> int:
    """Tokens of a text that need not be read."""
    stats = engine.stats(engine.add(TEXT, PARAMS))
    while engine.busy:
        engine.step()
    return stats.num_cached_tokens


def test_an_interrupted_step_costs_its_own_requests_and_nothing_that_was_kept() -> None:
    target = _Failing(90, capacity=512, order=512)
    engine = RowEngine(target, kv_cache=MIB)
    assert _cached(engine) == 0
    target.method, target.at, target.error = "extend", 2, KeyboardInterrupt
    engine.add([*TEXT, 1, 2, 3], PARAMS)
    with pytest.raises(KeyboardInterrupt):
        while engine.busy:
            engine.step()
    assert not engine.busy and target.num_rows == 1
    assert _cached(engine) == len(TEXT) - 1


def test_all_may_be_forgotten_in_the_middle_of_a_step() -> None:
    target = _Failing(90, capacity=512, order=512)
    engine = RowEngine(target, kv_cache=MIB)
    _cached(engine)
    rows = list[int]()

    def clear() -> None:
        thread = threading.Thread(target=engine.prefixes.clear)
        thread.start()
        thread.join()  # it does not wait for the step
        rows.append(target.num_rows)

    target.during = clear  # type: ignore[method-assign]
    engine.add([5, *TEXT], PARAMS)
    engine.step()
    assert rows and rows[0] == 2  # none went in the middle
    assert target.num_rows == 1  # that of the request
    target.during = lambda: None  # type: ignore[method-assign]
    assert _cached(engine) == 0
