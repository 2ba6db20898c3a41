"""Several models in one server: what goes wrong with one of them stays with it."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import httpx
import pytest

from pool_kit import MIB, Asked, LivePool
from redwood.errors import ModelError
from redwood.server.served import Lease
from server_kit import PATIENCE_S, Raw, wait_for

Start = Callable[..., LivePool]


def test_a_model_that_cannot_be_loaded_fails_its_requests_alone(pool: Start) -> None:
    server = pool()
    stock = server.stocks["b"]
    stock.fault = ModelError("there is no folder /secret/place")
    for stream in (False, True):
        response = server.chat("b", stream=stream)
        assert response.status_code == 503, response.text
        error = response.json()["error"]
        assert error["code"] == "model_load_failed" and "'b'" in error["message"]
        assert "secret" not in response.text  # clients see no path of this machine
        assert response.headers["x-should-retry"] == "false"
    assert stock.loads == 1  # the second request got the first one's error
    assert server.states() == {"a": "loaded", "b": "failed"}
    assert server.metric('redwood:model_loads_total{model="b",result="failed"}') == 1
    assert server.chat("a").status_code == 200
    server.all_right()


def test_an_unexpected_error_while_loading_is_the_same(pool: Start) -> None:
    server = pool()
    for fault in (RuntimeError("odd"), MemoryError(), SystemExit(3)):
        server.model("b").fault = None
        server.stocks["b"].fault = fault
        assert server.chat("b").json()["error"]["code"] == "model_load_failed"
        assert server.chat("a").status_code == 200
    server.all_right()


def test_requests_for_one_model_load_it_once(pool: Start) -> None:
    server = pool()
    stock = server.stocks["b"]
    stock.pause()
    asked = [server.in_background("b") for _ in range(3)]
    asked += [server.in_background("b", stream=True) for _ in range(3)]
    wait_for(lambda: len(server.model("b").waiting) == 6, "six requests")
    assert server.chat("a").status_code == 200
    stock.go_on()
    assert [each.response().status_code for each in asked] == [200] * 6
    assert stock.loads == 1
    server.all_right()


@pytest.mark.parametrize("stream", [False, True])
def test_who_waits_for_one_model_takes_no_place_of_others(pool: Start, stream: bool) -> None:
    server = pool("abc", rows=2, max_queue=1)
    for name in "bc":
        server.stocks[name].pause()
    asked = [server.in_background("b", stream=stream) for _ in range(3)]
    wait_for(lambda: len(server.model("b").waiting) == 3, "all places for b")
    full = server.chat("b", stream=stream)
    assert full.status_code == 429 and full.json()["error"]["code"] == "queue_full"
    assert server.pool.num_entering == 3 and not server.pool.admission.num_entering
    assert server.metric("redwood:num_requests_preparing") == 3
    first = server.text("a"), server.text("a")
    asked += [server.in_background("c", stream=stream) for _ in range(3)]
    wait_for(lambda: len(server.model("c").waiting) == 3, "all places for c")
    assert (server.text("a"), server.text("a")) == first
    count = {"model": "b", "messages": [{"role": "user", "content": "Tom"}]}
    assert server.http.post("/v1/messages/count_tokens", json=count).status_code == 429
    for name in "bc":
        server.stocks[name].go_on()
    assert [each.response().status_code for each in asked] == [200] * 6
    wait_for(lambda: not server.pool.num_entering, "no place taken")
    server.all_right()


def test_one_key_that_waits_leaves_places_to_the_others(pool: Start) -> None:
    server = pool(
        keys=("the-first-key", "the-second-key"), rows=1, max_queue=4, max_queue_per_key=1
    )
    server.stocks["b"].pause()
    mine = [server.in_background("b") for _ in range(2)]
    wait_for(lambda: len(server.model("b").waiting) == 2, "the places of a key")
    assert server.chat("b").json()["error"]["code"] == "key_queue_full"
    assert server.chat("a").status_code == 200
    body = {"model": "b", "messages": [{"role": "user", "content": "Tom"}], "max_tokens": 2}
    headers = {"authorization": "Bearer the-second-key"}
    theirs = Asked(
        lambda: httpx.post(
            f"{server.url}/v1/chat/completions", json=body, headers=headers, timeout=PATIENCE_S
        )
    )
    wait_for(lambda: len(server.model("b").waiting) == 3, "the other key")
    server.stocks["b"].go_on()
    assert [each.response().status_code for each in (*mine, theirs)] == [200] * 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_its_model_is_loaded(pool: Start, stream: bool) -> None:
    server = pool()
    stock = server.stocks["b"]
    stock.pause()
    with Raw(server.port) as raw:
        body = {"model": "b", "messages": [{"role": "user", "content": "x"}], "stream": stream}
        raw.post(body)
        server.wait_for_state("b", "loading")
        assert server.model("b").wanted
    wait_for(lambda: not server.model("b").wanted, "its end")
    wait_for(lambda: not server.pool.num_entering, "its end")
    stock.go_on()
    server.wait_for_state("b", "loaded")  # it is there for the next one
    assert server.model("b").leases == 0
    server.all_right()
    assert stock.loads == 1


def test_clients_that_leave_before_their_turn_load_nothing(pool: Start) -> None:
    server = pool("abc")
    server.stocks["b"].pause()
    first = server.in_background("b")
    server.wait_for_state("b", "loading")
    with Raw(server.port) as raw:
        raw.post({"model": "c", "messages": [{"role": "user", "content": "x"}]})
        wait_for(lambda: server.model("c").wanted, "a request")
    wait_for(lambda: not server.model("c").wanted, "its end")
    server.stocks["b"].go_on()
    assert first.response().status_code == 200
    assert server.stocks["c"].loads == 0
    server.all_right()


def test_a_request_that_comes_while_its_model_is_unloaded(pool: Start) -> None:
    server = pool(idle_s=1.5)
    service = server.model("a").service
    assert service is not None
    saving, go_on = threading.Event(), threading.Event()
    real = service.close

    def close() -> None:
        saving.set()
        go_on.wait(PATIENCE_S)
        real()

    service.close = close  # type: ignore[method-assign]
    assert saving.wait(PATIENCE_S)
    assert server.states()["a"] == "unloading"
    asked = server.in_background("a")
    wait_for(lambda: server.model("a").wanted, "a request")
    assert server.stocks["a"].loads == 1
    go_on.set()
    assert asked.response().status_code == 200
    assert server.stocks["a"].loads == 2
    server.all_right()


def test_what_cannot_be_saved_does_not_keep_a_model(pool: Start) -> None:
    server = pool(most=150 * MIB)
    service = server.model("a").service
    assert service is not None

    def close() -> None:
        raise OSError("the disk is full")

    service.close = close  # type: ignore[method-assign]
    server.text("b")
    assert server.states() == {"a": "unloaded", "b": "loaded"}
    server.all_right()


def test_a_request_that_waits_too_long_for_its_model_gets_a_504(pool: Start) -> None:
    server = pool(request_timeout_s=0.3)
    server.stocks["b"].pause()
    response = server.chat("b")
    assert response.status_code == 504 and response.json()["error"]["code"] == "timeout"
    server.stocks["b"].go_on()
    server.wait_for_state("b", "loaded")
    assert not server.pool.num_open


def test_the_time_of_loading_is_not_that_of_the_queue(pool: Start) -> None:
    server = pool(queue_timeout_s=0.5)
    server.stocks["b"].pause()
    asked = server.in_background("b")
    server.wait_for_state("b", "loading")
    time.sleep(0.7)
    server.stocks["b"].go_on()
    assert asked.response().status_code == 200


def let_die(server: LivePool) -> None:
    """Ends the thread of a's engine with the next request."""
    service = server.model("a").service
    assert service is not None
    real = service.worker._admit

    def die() -> None:
        if service.admission.num_waiting:
            raise SystemExit("the thread ends")
        real()

    service.worker._admit = die  # type: ignore[method-assign]
    broken = server.chat("a")
    assert broken.status_code == 503 and broken.json()["error"]["code"] == "engine_dead"


def test_requests_that_hold_a_dead_engine_are_waited_for_a_while(
    pool: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, held = pool(), list[Lease]()

    async def hold() -> None:
        held.append(await server.pool.acquire("a", perf_counter()))

    service = server.model("a").service
    assert service is not None and (loop := service.worker._loop) is not None
    asyncio.run_coroutine_threadsafe(hold(), loop).result(PATIENCE_S)
    let_die(server)
    waits = server.in_background("a")
    wait_for(lambda: server.model("a").died_s is not None, "the keeper to see it")
    assert server.chat("b").status_code == 200  # loaded meanwhile
    assert waits.waits
    monkeypatch.setattr("redwood.server.models.keeper._ENDING_S", 0.0)
    for refused in (server.chat("a"), waits.response()):
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "engine_dead"
        assert "retry-after" in refused.headers
    assert server.stocks["a"].loads == 1
    monkeypatch.undo()
    waits = server.in_background("a")
    wait_for(lambda: server.model("a").wanted, "a request")
    loop.call_soon_threadsafe(held[0].release)
    assert waits.response().status_code == 200
    server.all_right()
    assert server.stocks["a"].loads == 2


def test_an_engine_that_dies_is_loaded_again(pool: Start) -> None:
    server = pool()
    server.text("b")
    let_die(server)
    assert server.http.get("/health").status_code == 200
    server.all_right()
    assert server.stocks["a"].loads == 2 and server.stocks["b"].loads == 1


def test_a_stuck_engine_is_named_and_the_others_go_on(pool: Start) -> None:
    server = pool(health_timeout_s=0.3)
    server.text("b")
    server.stocks["a"].stages[0].pause()
    asked = server.in_background("a")
    wait_for(lambda: server.http.get("/health").status_code == 503, "trouble")
    assert server.http.get("/health").json()["status"] == "engine_stalled"
    assert server.chat("b").status_code == 200
    server.stocks["a"].stages[0].go_on()
    assert asked.response().status_code == 200
    server.all_right()


def test_stopping_while_a_model_is_loaded(pool: Start) -> None:
    server = pool(drain_timeout_s=0.2)
    server.stocks["b"].pause()
    whole = server.in_background("b")
    stream = server.in_background("b", stream=True)
    wait_for(lambda: len(server.model("b").waiting) == 2, "two requests")
    server.wait_for_state("b", "loading")
    server.runner.stop()
    for asked in (whole, stream):
        response = asked.response()
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "shutting_down"
    server.thread.join(PATIENCE_S)
    assert server.code == 0


def test_a_model_loaded_within_the_drain_answers(pool: Start) -> None:
    server = pool()
    server.stocks["b"].pause()
    asked = server.in_background("b")
    server.wait_for_state("b", "loading")
    server.runner.stop()
    wait_for(lambda: server.pool.draining, "the drain")
    server.stocks["b"].go_on()
    assert asked.response().status_code == 200
    server.thread.join(PATIENCE_S)
    assert server.code == 0


def test_an_unloaded_model_leaves_nothing_in_memory(pool: Start) -> None:
    server = pool(most=150 * MIB)
    server.text("a")
    server.chat("a", stream=True, response_format={"type": "json_object"})
    stage = weakref.ref(server.stocks["a"].stages.pop())
    assert stage() is not None
    server.text("b")
    wait_for(lambda: (gc.collect(), stage())[1] is None, "the end of the model's engine")
    server.all_right()


def test_many_requests_for_models_that_do_not_fit_together(pool: Start) -> None:
    server = pool("abc", most=150 * MIB)
    asked = [server.in_background("abc"[index % 3], max_tokens=3) for index in range(24)]
    assert [each.response().status_code for each in asked] == [200] * 24
    assert all(stock.loads <= 9 for stock in server.stocks.values())
    server.all_right()


_SERVER = [sys.executable, "-m", "redwood", "serve", "--port", "0", "--backend", "eager"]


def test_the_command_serves_two_models_and_ends_cleanly(
    tiny_model_folder: Path, tiny_draft_folder: Path, tmp_path: Path
) -> None:
    targets = ["-t", f"one={tiny_model_folder}", "-t", f"two={tiny_draft_folder}"]
    gone = ["-t", f"three={tmp_path / 'gone'}"]
    process = subprocess.Popen(
        [*_SERVER, *targets, *gone], stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    try:
        assert process.stderr is not None
        lines = []
        while not lines or not lines[-1].startswith("serving"):
            lines.append(process.stderr.readline())
            assert lines[-1], lines
        assert any("requests for three will fail" in line for line in lines)
        url = lines[-1].split(" at ")[1].split("/v1")[0]
        body = {"messages": [{"role": "user", "content": "Tom"}], "max_tokens": 4, "temperature": 0}
        made = {}
        for name in ("one", "two", "three", "four"):
            made[name] = httpx.post(
                f"{url}/v1/chat/completions", json={**body, "model": name}, timeout=PATIENCE_S
            )
        assert [made[name].status_code for name in made] == [200, 200, 503, 404]
        health = httpx.get(f"{url}/health").json()
        assert health["models"] == {"one": "loaded", "two": "loaded", "three": "failed"}
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0
    finally:
        process.kill()
        process.stderr.close()
        process.wait()
