"""What goes wrong in the engine: one request pays, the server lives, and says how it is."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from openai import APIError

from redwood.errors import NumericalError
from server_kit import PATIENCE_S, Live, break_release, events, known_answer, wait_for


def poison(value: float, at: int) -> Callable[[int, list[Any]], list[Any]]:
    """Writes a value into all logits of the first row at one forward."""

    def after(call: int, logits: list[Any]) -> list[Any]:
        if call == at:
            logits = [torch.full_like(logits[0], value), *logits[1:]]
        return logits

    return after


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.0}])
def test_logits_that_are_no_numbers_end_one_request(
    live: Callable[..., Live], value: float, sampling: dict[str, Any]
) -> None:
    server = live()
    server.stage.after = poison(value, at=3)
    response = server.chat(**sampling)
    assert server.error(response, 500)["code"] == "engine_numerics"
    assert response.headers["x-should-retry"] == "false"
    assert server.metric('redwood:engine_errors_total{kind="NumericalError"}') == 1
    server.alive_and_right()


def test_a_request_that_fails_alone_leaves_its_company_alone(live: Callable[..., Live]) -> None:
    server = live()
    right = known_answer(server.engine)
    server.stage.pause()
    admission = server.service.admission
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(server.chat)
        wait_for(lambda: admission.num_running == 1, "the first")
        others = [pool.submit(server.chat) for _ in range(3)]
        wait_for(lambda: admission.num_waiting == 3, "its company")
        server.stage.after = poison(float("nan"), at=server.stage.calls + 6)
        server.stage.go_on()
        assert server.error(first.result(), 500)["code"] == "engine_numerics"
        texts = [each.result().json()["choices"][0]["message"]["content"] for each in others]
    assert texts == [right] * 3
    server.alive_and_right()


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (RuntimeError("boom"), 500, "engine_error"),
        (NumericalError("not a number"), 500, "engine_numerics"),
        (MemoryError(), 503, "out_of_memory"),
        (torch.OutOfMemoryError("no memory"), 503, "out_of_memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate"), 503, "out_of_memory"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_a_forward_that_raises_ends_those_in_it_and_no_others(
    live: Callable[..., Live], error: Exception, status: int, code: str
) -> None:
    server = live(rows=1)

    def before(call: int) -> None:
        if call == 3:
            raise error

    server.stage.before = before
    server.stage.pause()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(server.chat)
        wait_for(lambda: server.service.admission.num_running == 1, "the first")
        second = pool.submit(server.chat)
        wait_for(lambda: server.service.admission.num_waiting == 1, "the second")
        server.stage.go_on()
        told = server.error(first.result(), status)
        assert told["code"] == code and "boom" not in told["message"]
        assert second.result().status_code == 200
    server.alive_and_right()


def test_a_token_that_cannot_be_told_ends_one_request(
    live: Callable[..., Live], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = live()

    def broken(*_: Any) -> None:
        raise ValueError("no text")

    monkeypatch.setattr("redwood.server.worker.describe", broken)
    streamed = server.chat(stream=True, redwood={"trace": True})
    assert server.error(streamed, 500)["code"] == "engine_error"
    server.alive_and_right()


def test_a_row_that_cannot_be_released_does_not_stop_the_engine(
    live: Callable[..., Live], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = live()
    break_release(server, monkeypatch)
    assert server.chat().status_code == 500
    monkeypatch.undo()
    server.alive_and_right()


def test_a_stream_that_fails_midway_ends_with_an_error_event(live: Callable[..., Live]) -> None:
    server = live()
    server.stage.after = poison(float("nan"), at=6)
    streamed = events(server.chat(stream=True).text)
    assert streamed[-1]["error"]["code"] == "engine_numerics"
    assert len(streamed) > 2 and "[DONE]" not in streamed
    server.stage.calls = 0
    with pytest.raises(APIError):
        list(
            server.openai.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "Tom"}], stream=True
            )
        )
    server.alive_and_right()


def test_a_stream_that_fails_at_once_still_has_a_status(live: Callable[..., Live]) -> None:
    server = live()
    server.stage.after = poison(float("nan"), at=2)
    assert server.error(server.chat(stream=True), 500)["code"] == "engine_numerics"


def test_an_engine_that_only_fails_is_not_healthy_until_it_works(live: Callable[..., Live]) -> None:
    server = live()

    def before(call: int) -> None:
        raise RuntimeError("broken")

    server.stage.before = before
    for _ in range(3):
        assert server.chat().status_code == 500
    response = server.http.get("/health")
    assert response.status_code == 503 and response.json()["status"] == "engine_failing"
    assert server.metric("redwood:engine_up") == 0
    server.stage.before = lambda call: None
    assert server.chat().status_code == 200
    server.alive_and_right()


def test_an_engine_that_hangs_is_reported_with_its_stack(
    live: Callable[..., Live], caplog: pytest.LogCaptureFixture
) -> None:
    server = live(health_timeout_s=0.7)
    server.stage.pause()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(server.chat)
        wait_for(lambda: server.http.get("/health").status_code == 503, "a report")
        assert server.http.get("/health").json()["status"] == "engine_stalled"
        assert server.http.get("/ready").status_code == 503
        wait_for(lambda: "engine_stalled" in caplog.text, "a line in the log")
        server.stage.go_on()
        assert waiting.result().status_code == 200
    server.alive_and_right()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_when_the_engines_thread_dies_nobody_hangs_and_the_server_ends(
    live: Callable[..., Live],
) -> None:
    server = live(rows=1)

    def before(call: int) -> None:
        if call == 3:
            raise SystemExit("killed")

    server.stage.before = before
    server.stage.pause()
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(server.chat) for _ in range(3)]
        wait_for(lambda: server.service.admission.num_waiting == 2, "two in the queue")
        server.stage.go_on()
        for each in waiting:
            assert server.error(each.result(), 503)["code"] in ("engine_dead", "shutting_down")
    assert server.service.trouble() == "engine_dead"
    server.thread.join(PATIENCE_S)
    assert server.code == 1


def test_a_request_past_its_deadline_gets_504(live: Callable[..., Live]) -> None:
    server = live(request_timeout_s=0.3, queue_timeout_s=60)
    server.stage.pause()
    response = server.chat()
    assert server.error(response, 504)["code"] == "timeout"
    assert response.headers["x-should-retry"] == "false"
    streaming = server.chat(stream=True)
    assert server.error(streaming, 504)["code"] == "timeout"
    server.stage.go_on()
    wait_for(server.idle, "an idle engine")


def test_a_stream_past_its_deadline_ends_with_an_error_event(live: Callable[..., Live]) -> None:
    server = live(request_timeout_s=1.0)
    stuck = threading.Event()
    server.stage.before = lambda call: None if call < 5 else (stuck.wait(PATIENCE_S), None)[1]
    assert events(server.chat(stream=True).text)[-1]["error"]["code"] == "timeout"
    stuck.set()
    wait_for(server.idle, "an idle engine")


def test_who_waits_too_long_for_a_row_gets_429_and_leaves_the_queue(
    live: Callable[..., Live],
) -> None:
    server = live(rows=1, queue_timeout_s=0.3)
    server.stage.pause()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.chat)
        wait_for(lambda: server.service.admission.num_running == 1, "the first")
        response = server.chat()
        assert server.error(response, 429)["code"] == "queue_timeout"
        assert int(response.headers["retry-after"]) >= 1
        assert server.service.admission.num_waiting == 0
        server.stage.go_on()
        assert running.result().status_code == 200
    server.alive_and_right()


def test_one_too_many_gets_429_at_once_and_the_others_their_answers(
    live: Callable[..., Live],
) -> None:
    server = live(rows=1, max_queue=2)
    right = known_answer(server.engine)
    server.stage.pause()
    with ThreadPoolExecutor(3) as pool:
        accepted = [pool.submit(server.chat) for _ in range(3)]
        wait_for(lambda: server.service.admission.num_waiting == 2, "a full queue")
        response = server.chat()
        assert server.error(response, 429)["code"] == "queue_full"
        assert int(response.headers["retry-after"]) >= 1
        server.stage.go_on()
        texts = [each.result().json()["choices"][0]["message"]["content"] for each in accepted]
    assert texts == [right] * 3
    assert server.error(server.chat(n=4), 429)["code"] == "queue_full"
    server.alive_and_right()


def test_keys_take_turns(live: Callable[..., Live], monkeypatch: pytest.MonkeyPatch) -> None:
    server = live(keys=("first-key", "second-key"), rows=1, max_queue=8)
    words, begun = {"first-key": "Tom", "second-key": "Anna"}, list[list[int]]()
    add = server.engine.add

    def noted(prompt: Any, params: Any) -> int:
        begun.append(list(prompt))
        return add(prompt, params)

    monkeypatch.setattr(server.engine, "add", noted)

    def ask(key: str) -> None:
        headers = {"authorization": f"Bearer {key}"}
        body = {"prompt": words[key], "max_tokens": 24, "ignore_eos": True}
        assert server.http.post("/v1/completions", json=body, headers=headers).status_code == 200

    admission = server.service.admission
    server.stage.pause()
    with ThreadPoolExecutor(6) as pool:
        for count, key in enumerate(["first-key"] * 4 + ["second-key"]):
            pool.submit(ask, key)
            wait_for(lambda c=count: admission.num_running + admission.num_waiting == c + 1)
        server.stage.go_on()
    second = server.engine.encode(words["second-key"])
    assert len(begun) == 5 and begun.index(second) <= 2
