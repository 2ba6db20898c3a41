"""Clients that leave, stall, dawdle, or send what is no request."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import httpx
import pytest

from server_kit import CHAT, PATIENCE_S, Live, Raw, known_answer, wait_for

LONG = {**CHAT, "max_tokens": 200, "ignore_eos": True}
LEFT = 'redwood:requests_cancelled_total{reason="disconnect"}'


def hold_from(server: Live, call: int) -> threading.Event:
    """Stops the model at a forward until the event is set."""
    go = threading.Event()
    server.stage.before = lambda n: None if n < call else (go.wait(PATIENCE_S), None)[1]
    return go


def test_a_client_that_leaves_midstream_stops_its_answer(live: Callable[..., Live]) -> None:
    server = live()
    go = hold_from(server, 6)
    with Raw(server.port) as client:
        client.post({**LONG, "stream": True})
        client.read_until(b'"content":"')
    wait_for(lambda: server.metric(LEFT) == 1, "a cancellation")
    go.set()
    wait_for(server.idle, "an idle engine")
    assert server.metric("redwood:generation_tokens_total") < 50
    server.alive_and_right()


@pytest.mark.parametrize("call", [1, 6], ids=["prefill", "decoding"])
def test_a_client_that_leaves_without_a_stream_stops_its_answer(
    live: Callable[..., Live], call: int
) -> None:
    server = live()
    go = hold_from(server, call)
    with Raw(server.port) as client:
        client.post(LONG)
        wait_for(lambda: server.stage.calls >= call, "the model")
    wait_for(lambda: server.metric(LEFT) == 1, "a cancellation")
    go.set()
    wait_for(server.idle, "an idle engine")
    assert server.metric("redwood:generation_tokens_total") < 50
    server.alive_and_right()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_it_waits_leaves_the_queue(
    live: Callable[..., Live], stream: bool
) -> None:
    server = live(rows=1)
    server.stage.pause()
    with Raw(server.port) as first:
        first.post(CHAT)
        wait_for(lambda: server.service.admission.num_running == 1, "the first")
        with Raw(server.port) as second:
            second.post({**LONG, "stream": stream})
            wait_for(lambda: server.service.admission.num_waiting == 1, "the second")
        wait_for(lambda: server.service.admission.num_waiting == 0, "its leaving")
        server.stage.go_on()
        first.read_until(b'"usage"')
    server.alive_and_right()


def test_a_client_that_leaves_before_its_body_is_complete_costs_nothing(
    live: Callable[..., Live], caplog: pytest.LogCaptureFixture
) -> None:
    server = live()
    with Raw(server.port) as client:
        client.post(b'{"messages":', Content_Length="1000")
    wait_for(lambda: server.metric(LEFT) == 1, "a cancellation")
    assert "Traceback" not in caplog.text and "internal_error" not in str(caplog.records)
    server.alive_and_right()


def test_openais_client_can_break_off(live: Callable[..., Live]) -> None:
    server = live()
    go = hold_from(server, 8)
    asked: dict[str, Any] = {**CHAT, "max_tokens": 200, "extra_body": {"ignore_eos": True}}
    stream = server.openai.chat.completions.create(model="tiny", **asked, stream=True)
    for chunk in stream:
        if chunk.choices[0].delta.content:
            break
    stream.close()
    wait_for(lambda: server.metric(LEFT) == 1, "a cancellation")
    go.set()
    server.alive_and_right()


def test_a_reader_that_stalls_is_dropped_and_holds_nobody_up(live: Callable[..., Live]) -> None:
    server = live(send_timeout_s=0.5, rows=8)
    server.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    clients = [Raw(server.port, receive_buffer=4096) for _ in range(3)]
    for client in clients:
        client.post({**LONG, "n": 4, "stream": True, "redwood": {"trace": True}})
    assert server.text() == known_answer(server.engine)
    slow = 'redwood:requests_cancelled_total{reason="slow_client"}'
    wait_for(lambda: server.metric(slow) == 3, "three dropped")
    server.alive_and_right()
    for client in clients:
        client.socket.close()


def test_a_body_that_dawdles_gets_408(live: Callable[..., Live]) -> None:
    server = live(body_timeout_s=0.3)
    with Raw(server.port) as client:
        client.post(b'{"messages":', Content_Length="1000")
        assert b" 408 " in client.read_all().split(b"\r\n")[0]
    server.alive_and_right()


def test_a_connection_that_says_nothing_is_closed(live: Callable[..., Live]) -> None:
    server = live(body_timeout_s=0.3)
    with Raw(server.port) as silent, Raw(server.port) as half:
        half.send(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x")
        assert silent.read_all() == b"" and half.read_all() == b""


def test_bodies_beyond_the_limit_get_413(live: Callable[..., Live]) -> None:
    server = live(max_body_bytes=1000)
    fits = json.dumps({**CHAT, "user": ""}).encode()
    fits = json.dumps({**CHAT, "user": "x" * (1000 - len(fits))}).encode()
    assert len(fits) == 1000
    headers = {"content-type": "application/json"}
    post = server.http.post
    assert post("/v1/chat/completions", content=fits, headers=headers).status_code == 200
    server.error(post("/v1/chat/completions", content=fits + b" ", headers=headers), 413)
    for chunk in (b" " * 600, b" " * 70_000):  # chunked: the length is not announced
        # Who still sends when the answer comes may see the connection end before the answer.
        with suppress(*(() if len(chunk) < 1000 else (httpx.ReadError, httpx.WriteError))):
            response = post("/v1/chat/completions", content=iter([chunk] * 3), headers=headers)
            server.error(response, 413)
    with Raw(server.port) as client:
        client.post(b"", Content_Length=str(10**12))
        assert b" 413 " in client.read_until(b"\r\n")
    server.alive_and_right()


@pytest.mark.parametrize("length", ["-1", "ten", "1, 2"])
def test_lengths_that_are_none_get_400(live: Callable[..., Live], length: str) -> None:
    server = live()
    with Raw(server.port) as client:
        client.post(b"{}", Content_Length=length)
        assert b" 400 " in client.read_until(b"\r\n")


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",  # a client that expects TLS
        b"hello\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",  # no Host
        b"GET /a b HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: ten\r\n\r\n",
    ],
)
def test_what_is_no_http_gets_a_400_of_the_same_shape(
    live: Callable[..., Live], sent: bytes
) -> None:
    server = live()
    with Raw(server.port) as client:
        client.send(sent)
        head, body = client.read_all().split(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ") and b"content-type: application/json" in head
    assert f"content-length: {len(body)}".encode() in head
    error = json.loads(body)["error"]
    assert error["type"] == "invalid_request_error" and error["code"] == "invalid_http"
    server.alive_and_right()


def test_nonsense_after_a_request_is_answered_after_it(live: Callable[..., Live]) -> None:
    server = live()
    with Raw(server.port) as client:
        client.post(CHAT)
        client.send(b"\x00\x01 nonsense\r\n\r\n")
        first, second = client.read_all().split(b"HTTP/1.1 ")[1:]
    assert first.startswith(b"200 ") and b"completion_tokens" in first
    assert second.startswith(b"400 ") and b"invalid_http" in second


def test_a_request_that_was_answered_early_gets_no_second_answer(
    live: Callable[..., Live], caplog: pytest.LogCaptureFixture
) -> None:
    server = live(keys=["the-right-one"])
    with Raw(server.port) as client:
        client.post(b"", Content_Length="", Transfer_Encoding="chunked")  # and no key
        got = client.read_until(b"invalid_api_key")
        client.send(b"no number\r\n")
        got += client.read_all()
    assert got.count(b"HTTP/1.1 ") == 1 and b" 401 " in got
    wait_for(server.idle, "an idle engine")
    assert "Traceback" not in caplog.text and "Fatal" not in caplog.text


def test_a_connection_can_be_used_again_after_an_error(live: Callable[..., Live]) -> None:
    server = live()
    with Raw(server.port) as client:
        client.post({"messages": 3})
        assert b" 400 " in client.read_until(b'"code"')
        client.post(CHAT)
        assert b" 200 " in client.read_until(b'"usage"')


def test_requests_may_come_before_the_last_one_is_answered(live: Callable[..., Live]) -> None:
    server = live()
    with Raw(server.port) as client:
        client.post(CHAT)
        client.post({"prompt": "Tom", "max_tokens": 2}, path="/v1/completions")
        assert b'"chat.completion"' in client.read_until(b'"text_completion"')


def test_a_silent_stream_is_kept_alive_by_comments(live: Callable[..., Live]) -> None:
    server = live(ping_s=0.1)
    server.stage.pause()
    with Raw(server.port) as client:
        client.post({**CHAT, "stream": True})
        got = client.read_until(b": ping")
        assert b" 200 " in got.split(b"\r\n")[0]
        server.stage.go_on()
        assert b'"finish_reason":"length"' in client.read_until(b"[DONE]")


def test_a_flood_is_answered_or_refused_and_nobody_hangs(live: Callable[..., Live]) -> None:
    server = live(rows=4, max_queue=16)
    right = known_answer(server.engine)

    async def flood() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=150)
        async with httpx.AsyncClient(timeout=PATIENCE_S, limits=limits) as client:
            url = f"{server.url}/v1/chat/completions"
            return await asyncio.gather(*(client.post(url, json=CHAT) for _ in range(150)))

    responses = asyncio.run(flood())
    codes = [response.status_code for response in responses]
    assert set(codes) <= {200, 429} and codes.count(200) >= 20
    assert all(r.headers["retry-after"] for r in responses if r.status_code == 429)
    texts: set[Any] = {
        r.json()["choices"][0]["message"]["content"] for r in responses if r.status_code == 200
    }
    assert texts == {right}
    server.alive_and_right()
