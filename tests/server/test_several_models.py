"""Several models in one server: the field `model` chooses, loading and unloading are not seen."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from pool_kit import MIB, LivePool
from redwood import Engine
from server_kit import known_answer, wait_for

Start = Callable[..., LivePool]
MESSAGES = [{"role": "user", "content": "Tom"}]


def test_the_field_model_chooses(pool: Start, tiny_engine: Engine, other_engine: Engine) -> None:
    server = pool()
    first, second = known_answer(tiny_engine), known_answer(other_engine)
    assert first != second
    assert server.states() == {"a": "loaded", "b": "unloaded"}
    assert server.text("a") == first == server.text(None)
    assert server.text("b") == second
    assert server.states() == {"a": "loaded", "b": "loaded"}
    assert server.chat("b").json()["model"] == "b" and server.chat(None).json()["model"] == "a"
    assert (server.stocks["a"].loads, server.stocks["b"].loads) == (1, 1)
    server.all_right()


def test_every_api_goes_through_the_same_choice(pool: Start) -> None:
    server = pool()
    calls: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 8},
        "/v1/completions": {"prompt": "Tom", "max_tokens": 8},
        "/v1/responses": {"input": "Tom", "max_output_tokens": 16},
        "/v1/messages": {"messages": MESSAGES, "max_tokens": 8},
        "/v1/messages/count_tokens": {"messages": MESSAGES},
    }
    for path, body in calls.items():
        for stream in (False, True):
            if path.endswith("count_tokens") and stream:
                continue
            asked = {**body, **({"stream": True} if stream else {})}
            server.model("b").used_s = 0.0
            made = {}
            for name in ("b", "a"):
                response = server.http.post(path, json={**asked, "model": name})
                assert response.status_code == 200, response.text
                made[name] = response.text
            if not path.endswith("count_tokens"):
                assert made["a"] != made["b"], path
        unknown = server.http.post(path, json={**body, "model": "nobody"})
        assert unknown.status_code == 404, unknown.text
        assert "nobody" in unknown.json()["error"]["message"]
    refused = server.http.post("/v1/embeddings", json={"model": "b", "input": "Tom"})
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "unsupported_endpoint"


def test_models_are_listed_with_their_state(pool: Start) -> None:
    server = pool()
    listed = server.http.get("/v1/models").json()["data"]
    assert [(each["id"], each["status"]) for each in listed] == [
        ("a", {"value": "loaded"}),
        ("b", {"value": "unloaded"}),
    ]
    assert listed[0]["max_model_len"] == 256 and "max_model_len" not in listed[1]
    server.text("b")
    assert server.http.get("/v1/models/b").json()["status"] == {"value": "loaded"}
    assert server.http.get("/v1/models/c").status_code == 404


def test_metrics_are_apart_and_stay_over_a_reload(pool: Start) -> None:
    server = pool(most=150 * MIB)
    server.text("a"), server.text("a"), server.text("b")

    def tokens(name: str) -> float:
        return server.metric(f'redwood:generation_tokens_total{{model="{name}"}}')

    assert tokens("a") == 24 and tokens("b") == 12
    assert server.metric('redwood:model_loaded{model="a"}') == 0
    assert server.metric('redwood:model_loaded{model="b"}') == 1
    assert server.metric('redwood:model_memory_bytes{model="b"}') == 100 * MIB
    assert server.metric("redwood:models_memory_limit_bytes") == 150 * MIB
    assert server.metric('redwood:model_unloads_total{model="a",reason="room"}') == 1
    assert server.metric('redwood:engine_up{model="b"}') == 1
    server.text("a")
    assert tokens("a") == 36 and tokens("b") == 12
    assert server.metric('redwood:engine_up{model="b"}') == 0
    assert server.metric('redwood:model_loads_total{model="a",result="ok"}') == 1
    route = "/v1/chat/completions"
    assert server.metric(f'redwood:requests_total{{code="200",route="{route}"}}') == 4
    text = server.http.get("/metrics").text
    families = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(families) == len(set(families))


def test_the_one_not_used_for_longest_makes_room(pool: Start) -> None:
    server = pool("abc", most=200 * MIB)
    server.text("b"), server.text("a")
    server.text("c")
    assert server.states() == {"a": "loaded", "b": "unloaded", "c": "loaded"}
    server.text("b")
    assert server.states() == {"a": "unloaded", "b": "loaded", "c": "loaded"}
    server.all_right()


def test_an_idle_model_is_unloaded_and_comes_back(pool: Start) -> None:
    server = pool(idle_s=0.2)
    server.text("b")
    wait_for(lambda: set(server.states().values()) == {"unloaded"}, "unloading")
    assert server.http.get("/ready").status_code == 200
    assert server.metric('redwood:model_unloads_total{model="a",reason="idle"}') == 1
    server.all_right()


def test_a_model_with_a_request_is_never_unloaded(pool: Start) -> None:
    server = pool(most=150 * MIB)
    (stage,) = server.stocks["a"].stages
    stage.pause()
    running = server.in_background("a", max_tokens=40)
    wait_for(lambda: server.model("a").leases == 1, "a request")
    behind = server.in_background("b")
    wait_for(lambda: server.model("a").closing, "the wait for room")
    late = server.in_background("a")  # it waits behind b, else b might wait for ever
    wait_for(lambda: server.model("a").wanted, "a wait")
    assert server.states()["a"] == "loaded" and server.stocks["b"].loads == 0
    stage.go_on()
    assert running.response().status_code == 200
    assert behind.response().status_code == 200
    assert late.response().status_code == 200
    assert (server.stocks["a"].loads, server.stocks["b"].loads) == (2, 1)
    server.all_right()


def test_a_model_with_a_request_is_not_idle(pool: Start) -> None:
    server = pool(idle_s=0.3)
    server.text("b")
    stage = server.stocks["b"].stages[-1]
    stage.pause()
    running = server.in_background("b", max_tokens=40)
    wait_for(lambda: server.model("b").leases == 1, "a request")
    time.sleep(0.8)
    assert server.states()["b"] == "loaded"
    stage.go_on()
    assert running.response().status_code == 200


def test_no_room_in_time_is_a_503_and_the_others_go_on(pool: Start) -> None:
    server = pool(most=150 * MIB, queue_timeout_s=1.0)
    (stage,) = server.stocks["a"].stages
    server.text("a")
    stage.pause()
    running = server.in_background("a")
    wait_for(lambda: server.model("a").leases == 1, "a request")
    response = server.chat("b")
    assert response.status_code == 503 and int(response.headers["retry-after"]) > 0
    assert response.json()["error"]["code"] == "no_room_for_model"
    stage.go_on()
    assert running.response().status_code == 200
    server.all_right()


def test_a_model_larger_than_the_bound_is_a_400(pool: Start) -> None:
    server = pool(most=150 * MIB)
    server.stocks["b"].need = 200 * MIB
    error = server.chat("b")
    assert error.status_code == 400
    assert error.json()["error"]["code"] == "model_too_large"
    assert "200 MiB" in error.json()["error"]["message"]
    assert server.states()["a"] == "loaded"  # nothing went in vain
    server.stocks["b"].need = 100 * MIB
    server.all_right()


@pytest.mark.parametrize("path", ["chat/completions", "responses", "messages"])
def test_a_stream_is_kept_alive_while_its_model_is_loaded(pool: Start, path: str) -> None:
    server = pool(ping_s=0.05)
    server.stocks["b"].pause()
    body: dict[str, Any] = {"model": "b", "stream": True, "max_tokens": 16, "messages": MESSAGES}
    if path == "responses":
        body = {"model": "b", "stream": True, "input": "Tom", "max_output_tokens": 16}
    with server.http.stream("POST", f"/v1/{path}", json=body) as response:
        assert response.status_code == 200
        lines = response.iter_lines()
        assert next(lines) == ": ping"
        assert server.states()["b"] == "loading"
        assert server.chat("a").status_code == 200  # the other model goes on
        server.stocks["b"].go_on()
        rest = list(lines)
    assert any(line.startswith("data: ") for line in rest)
    assert not any(line.startswith(('data: {"error"', "event: error")) for line in rest)
    assert path != "chat/completions" or "data: [DONE]" in rest
    server.all_right()


@pytest.mark.parametrize("path", ["chat/completions", "responses", "messages"])
def test_a_load_that_fails_in_a_silent_stream_is_an_error_event(pool: Start, path: str) -> None:
    server = pool(ping_s=0.05)
    stock = server.stocks["b"]
    stock.pause()
    stock.fault = MemoryError()
    body: dict[str, Any] = {"model": "b", "stream": True, "max_tokens": 16, "messages": MESSAGES}
    if path == "responses":
        body = {"model": "b", "stream": True, "input": "Tom", "max_output_tokens": 16}
    with server.http.stream("POST", f"/v1/{path}", json=body) as response:
        lines = response.iter_lines()
        assert next(lines) == ": ping"
        stock.go_on()
        rest = list(lines)
    (last,) = [json.loads(line[6:]) for line in rest if line.startswith("data: ")]
    assert "cannot be loaded" in str(last)
    if path != "chat/completions":
        assert "event: error" in rest and last["type"] == "error"
    server.all_right()


def test_keys_hold_for_every_model(pool: Start) -> None:
    server = pool(keys=("a-long-key", "another-key"))
    assert server.chat("b").status_code == 200
    without = httpx.post(f"{server.url}/v1/chat/completions", json={"model": "b"})
    assert without.status_code == 401
