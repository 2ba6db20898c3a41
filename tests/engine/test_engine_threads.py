"""One engine, many callers: threads take turns, what must not wait is put off."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from redwood.drafters.base import ModelDrafter, NgramDrafter, NoDrafter, UnionDrafter
from redwood.engine.engine import RowEngine
from redwood.engine.scheduler import one_pool
from redwood.engine.text import Engine
from redwood.errors import RedwoodError, UnsupportedError
from redwood.sampling import SamplingParams
from redwood.testing import TableBackend

PROMPTS = [[1, 2, 3], [4, 5], [6], [7, 8, 7, 8, 7], [9, 10, 11], [0, 1]]
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.9, "seed": 3},
    {"temperature": 1.2, "seed": 4, "top_k": 5, "repetition_penalty": 1.3},
]


@pytest.fixture(autouse=True)
def _threads_change_often() -> Iterator[None]:
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(usual)


class Alone(TableBackend):
    """Finds out two threads that are in it at a time; may wait, raise or collect in a pass."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._inside = threading.Lock()
        self.entered, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()
        self.error: BaseException | None = None
        self.collect = False

    def _once(self, call: Callable[[], Any]) -> Any:
        assert self._inside.acquire(blocking=False), "two threads in one model"
        try:
            return call()
        finally:
            self._inside.release()

    def extend(self, rows: Any) -> Any:
        self.entered.set()
        assert self.go_on.wait(30)
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        made = self._once(lambda: TableBackend.extend(self, rows))
        if self.collect:
            self.collect = False
            gc.collect()
        return made

    def commit(self, rows: Any) -> None:
        self._once(lambda: TableBackend.commit(self, rows))

    def open(self) -> int:
        return int(self._once(lambda: TableBackend.open(self)))

    def release(self, row: int) -> None:
        self._once(lambda: TableBackend.release(self, row))


def _drafter() -> UnionDrafter:
    return UnionDrafter([ModelDrafter(Alone(seed=1)), NgramDrafter()])


def _wanted() -> list[list[int]]:
    plain = Engine(TableBackend(), budget=1)
    return [
        plain.generate(prompt, max_tokens=30, **params).token_ids
        for prompt in PROMPTS
        for params in SETTINGS
    ]


def _in_threads(ask: Callable[[int], Any], count: int, threads: int = 6) -> list[Any]:
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(ask, range(count), timeout=60))


@pytest.mark.parametrize("how", ["generate", "stream", "batch"])
def test_answers_asked_for_in_several_threads_are_those_of_one(how: str) -> None:
    engine, wanted = Engine(Alone(), _drafter(), budget=6, max_rows=4), _wanted()

    def ask(i: int) -> list[int]:
        i %= len(wanted)
        prompt, params = PROMPTS[i // len(SETTINGS)], SETTINGS[i % len(SETTINGS)]
        if how == "stream":
            pieces = engine.stream(prompt, max_tokens=30, **params)
            return [token for piece in pieces for token in piece.token_ids]
        if how == "batch":
            first, second = engine.generate([prompt, prompt], max_tokens=30, **params)
            assert first.token_ids == second.token_ids
            return list(first.token_ids)
        return list(engine.generate(prompt, max_tokens=30, **params).token_ids)

    assert _in_threads(ask, 3 * len(wanted)) == 3 * wanted
    assert not engine.busy and engine.target.num_rows == 0


def test_requests_are_added_cancelled_and_looked_at_while_another_thread_steps() -> None:
    engine, wanted = Engine(Alone(), _drafter(), budget=6, max_rows=4), _wanted()[0]
    got: dict[int, list[int]] = {}
    done = threading.Event()

    def loop() -> None:
        while not (done.is_set() and not engine.busy):
            for step in engine.step():
                got.setdefault(step.request, []).extend(step.token_ids)

    owner = threading.Thread(target=loop)
    owner.start()

    def ask(i: int) -> int:
        key = engine.add(PROMPTS[0], SamplingParams(max_tokens=30))
        if i % 3 == 0:
            engine.cancel(key)
        return key

    keys = _in_threads(ask, 60)
    done.set()
    owner.join(60)
    assert not owner.is_alive() and engine.target.num_rows == 0
    for i, key in enumerate(keys):
        assert got[key] == wanted if i % 3 else len(got.get(key, [])) <= 30


def test_a_reader_that_takes_its_time_holds_nobody_up() -> None:
    engine, wanted = Engine(Alone(), _drafter(), budget=6), _wanted()
    slow = engine.stream(PROMPTS[0], max_tokens=30)
    first = next(slow)  # and then nothing for a while
    assert _in_threads(lambda i: engine.generate(PROMPTS[1], max_tokens=30).token_ids, 4) == (
        4 * [wanted[3]]
    )
    assert [*first.token_ids, *(t for piece in slow for t in piece.token_ids)] == wanted[0]


def test_what_must_not_wait_does_not_wait_for_a_step() -> None:
    target = Alone()
    engine = Engine(target, budget=1)
    key = engine.add(PROMPTS[0], SamplingParams(max_tokens=30))
    target.go_on.clear()
    stepping = threading.Thread(target=engine.step)
    stepping.start()
    assert target.entered.wait(30)
    late = engine.add(PROMPTS[1], SamplingParams(max_tokens=2))
    assert engine.busy and engine.stats(late).num_generated_tokens == 0
    engine.cancel(key)
    assert target.num_rows == 1, "it is dropped at the end of the step"
    target.go_on.set()
    stepping.join(30)
    assert target.num_rows == 0
    assert {step.request for _ in range(3) for step in engine.step()} == {late}


@pytest.mark.parametrize("shared", ["target", "drafter", "draft model", "all"])
def test_engines_in_several_threads_may_share_models_and_drafters(shared: str) -> None:
    target, drafter, wanted = Alone(), _drafter(), _wanted()

    def engine() -> Engine:
        own = _drafter()
        if shared == "draft model":
            own = UnionDrafter([ModelDrafter(drafter.parts[0].backend), NgramDrafter()])
        return Engine(
            target if shared in ("target", "all") else Alone(),
            drafter if shared in ("drafter", "all") else own,
            budget=6,
        )

    engines = [engine() for _ in range(3)]

    def ask(i: int) -> list[int]:
        prompt = PROMPTS[i % len(PROMPTS)]
        return list(engines[i % 3].generate(prompt, max_tokens=30).token_ids)

    got = _in_threads(ask, 24, 3)
    assert got == [wanted[len(SETTINGS) * (i % len(PROMPTS))] for i in range(24)]
    assert target.num_rows == drafter.parts[0].backend.num_rows == 0


def test_a_row_of_a_shared_target_is_freed_when_the_others_step_ends() -> None:
    target = Alone()
    one, other = Engine(target, budget=1), Engine(target, budget=1)
    stream = one.stream(PROMPTS[0], max_tokens=30)
    next(stream)
    key = other.add(PROMPTS[1], SamplingParams(max_tokens=1))
    target.entered.clear()
    target.go_on.clear()
    stepping = threading.Thread(target=other.step)
    stepping.start()
    assert target.entered.wait(30)
    stream.close()  # type: ignore[attr-defined]
    assert target.num_rows == 2
    target.go_on.set()
    stepping.join(30)
    other.cancel(key)
    assert target.num_rows == 0 and not one.busy


@pytest.mark.parametrize("call", ["generate", "step"])
def test_a_step_inside_a_step_is_refused_instead_of_waiting_for_itself(call: str) -> None:
    engine = Engine(Alone(), budget=1)

    def processor(ids: Any, scores: Any) -> Any:
        engine.step() if call == "step" else engine.generate([1], max_tokens=2)
        return scores

    with pytest.raises(UnsupportedError, match="inside a step"):
        engine.generate(PROMPTS[0], max_tokens=3, logits_processor=processor)
    assert engine.generate(PROMPTS[0], max_tokens=30).token_ids == _wanted()[0]


@pytest.mark.parametrize("error", [RuntimeError("no memory left"), KeyboardInterrupt()])
def test_a_step_that_fails_in_one_thread_tells_the_others_why(error: BaseException) -> None:
    target = Alone()
    engine = Engine(target, _drafter(), budget=4)
    both = threading.Barrier(2)

    def ask(i: int) -> BaseException | None:
        stream = engine.stream(PROMPTS[i], max_tokens=60)
        try:
            next(stream)
            both.wait(30)
            if i == 0:
                target.error = error
            for _ in stream:
                pass
        except BaseException as raised:
            return raised
        return None

    told = _in_threads(ask, 2)
    assert error in told
    other = told[1 - told.index(error)]
    assert other is error or (isinstance(other, RedwoodError) and "interrupted" in str(other))
    assert not engine.busy and target.num_rows == 0
    assert engine.generate(PROMPTS[0], max_tokens=30).token_ids == _wanted()[0]


@pytest.mark.parametrize("drafts", [False, True])
def test_a_stream_that_the_garbage_collector_ends_in_a_step_waits_for_its_end(drafts: bool) -> None:
    target = Alone()
    engine = Engine(target, _drafter() if drafts else NoDrafter(), budget=4)
    other = engine.stream(PROMPTS[0], max_tokens=30)
    got = list(next(other).token_ids)

    class Holder:
        me: Any
        stream: Any

    gc.disable()
    try:
        holder = Holder()
        holder.me, holder.stream = holder, engine.stream(PROMPTS[1], max_tokens=30)
        next(holder.stream)
        assert target.num_rows == 2
        del holder  # in a cycle: only the collector finds it
        target.collect = True
        got += [token for piece in other for token in piece.token_ids]
    finally:
        gc.enable()
    assert not target.collect and got == _wanted()[0]
    assert target.num_rows == 0 and not engine.busy


class _Owning:
    own_threads = True


@pytest.fixture
def _two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def _block() -> Any:
    return one_pool(_Owning(), NoDrafter())  # type: ignore[arg-type]


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_blocks_of_one_pool_that_overlap_give_pytorch_its_threads_back(
    order: tuple[int, int],
) -> None:
    blocks = [_block(), _block()]
    for block in blocks:
        block.__enter__()
        assert torch.get_num_threads() == 1
    blocks[order[0]].__exit__(None, None, None)
    assert torch.get_num_threads() == 1
    blocks[order[1]].__exit__(None, None, None)
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("_two_threads")
def test_every_thread_gets_its_threads_back_from_one_pool() -> None:
    both = threading.Barrier(2)

    def run(i: int) -> list[int]:
        seen = []
        for _ in range(20):
            both.wait(30)
            with _block():
                seen.append(torch.get_num_threads())
            both.wait(30)
            seen.append(torch.get_num_threads())
        return seen

    assert _in_threads(run, 2, 2) == 2 * [20 * [1, 2]]
    assert torch.get_num_threads() == 2


def test_a_row_engine_is_refused_nothing_by_its_own_thread_between_steps() -> None:
    engine = RowEngine(Alone(), NgramDrafter(), budget=4)
    key = engine.add([1, 2], SamplingParams(max_tokens=5))
    while engine.busy:
        for step in engine.step():
            assert step.request == key
            engine.cancel(engine.add([3]))
    assert engine.target.num_rows == 0  # type: ignore[attr-defined]


def test_eight_threads_that_generate_and_stream_share_what_was_read() -> None:
    target = TableBackend(12, capacity=96, order=96)
    engine = Engine(target, NgramDrafter(), budget=4, max_rows=6, kv_cache=200)
    long = [i % 5 for i in range(40)]
    prompts = [[*long[: 8 * (i % 6)], *PROMPTS[i % len(PROMPTS)]] for i in range(40)]
    plain = Engine(target, budget=1)
    how = {"max_tokens": 6, "ignore_eos": True}
    right = {
        (i, j): plain.generate(prompt, **how, **settings).token_ids
        for i, prompt in enumerate(prompts)
        for j, settings in enumerate(SETTINGS)
    }

    def ask(number: int) -> bool:
        case = (number % len(prompts), number % len(SETTINGS))
        prompt, settings = prompts[case[0]], SETTINGS[case[1]]
        if number % 2:
            return engine.generate(prompt, **how, **settings).token_ids == right[case]
        made: list[int] = []
        for piece in engine.stream(prompt, **how, **settings):
            made += piece.token_ids
        return made == right[case]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(1000)))
    assert not engine.busy and engine.prefixes.hit_rate > 0.1
    engine.prefixes.clear()
    assert target.num_rows == 0
