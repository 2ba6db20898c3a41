"""Tokenising in the server: short before long, bounded, and only for requests that may be right."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from redwood.server import encoding
from redwood.server.encoding import SHORT, Encoders, ShortestFirst
from redwood.server.errors import ApiError
from server_kit import PATIENCE_S, Live, wait_for

LONG = SHORT + 1


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, PATIENCE_S))


def test_a_short_text_does_not_wait_for_long_ones() -> None:
    async def work() -> None:
        encoders, go = Encoders(10**9), threading.Event()
        long = [asyncio.ensure_future(encoders.run(LONG, go.wait)) for _ in range(4)]
        assert await encoders.run(SHORT, lambda: "short") == "short"
        assert not any(each.done() for each in long)
        go.set()
        assert await asyncio.gather(*long) == [True] * 4
        assert encoders.chars == 0
        encoders.close()

    run(work())


def test_of_long_texts_the_shortest_comes_first_and_of_equal_ones_the_first() -> None:
    async def work() -> None:
        encoders, go, order = Encoders(10**9), threading.Event(), list[str]()
        first = asyncio.ensure_future(encoders.run(LONG, go.wait))
        await asyncio.sleep(0)
        sizes = {"c": 3, "a": 1, "d": 3, "b": 2}
        rest = [
            asyncio.ensure_future(encoders.run(LONG + n, lambda k=k: order.append(k)))
            for k, n in sizes.items()
        ]
        await asyncio.sleep(0)
        go.set()
        await asyncio.gather(first, *rest)
        assert order == ["a", "b", "c", "d"]
        encoders.close()

    run(work())


def test_long_texts_are_bounded_together_and_a_single_one_is_not() -> None:
    async def work() -> None:
        encoders, go = Encoders(2 * LONG), threading.Event()
        held = [asyncio.ensure_future(encoders.run(LONG, go.wait)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(ApiError) as error:
            await encoders.run(LONG, go.wait)
        assert (error.value.status, error.value.code) == (429, "queue_tokens_full")
        assert await encoders.run(SHORT, lambda: 1) == 1  # short ones never
        go.set()
        await asyncio.gather(*held)
        assert await encoders.run(100 * LONG, lambda: 2) == 2
        encoders.close()

    run(work())


def test_who_stops_waiting_leaves_the_lane_to_the_others() -> None:
    async def work() -> None:
        lane, go, ran = ShortestFirst("t"), threading.Event(), list[str]()
        runs = asyncio.ensure_future(lane.run(0, go.wait))
        waits = asyncio.ensure_future(lane.run(0, lambda: ran.append("dropped")))
        stays = asyncio.ensure_future(lane.run(0, lambda: ran.append("stays")))
        await asyncio.sleep(0)
        for task in (runs, waits):
            task.cancel()
        await asyncio.gather(runs, waits, return_exceptions=True)
        assert not stays.done()  # the call that runs cannot be stopped, and has the thread
        go.set()
        await stays
        assert ran == ["stays"]
        lane.close()

    run(work())


def test_a_call_that_fails_is_told_and_the_lane_goes_on() -> None:
    async def work() -> None:
        lane = ShortestFirst("t")
        with pytest.raises(ZeroDivisionError):
            await lane.run(0, lambda: 1 // 0)
        assert await lane.run(0, lambda: 5) == 5
        lane.close()

    run(work())


def test_a_short_request_is_answered_while_long_ones_are_tokenised(
    live: Callable[..., Live], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "SHORT", 20)
    server, go, begun = live(rows=2), threading.Event(), threading.Event()
    encode = server.engine.encode_chat

    def slow(messages: Any, **options: Any) -> list[int]:
        if len(str(messages)) > 100:
            begun.set()
            assert go.wait(PATIENCE_S)
        return encode(messages, **options)

    monkeypatch.setattr(server.engine, "encode_chat", slow)
    long = [{"role": "user", "content": "Tom went. " * 10}]
    with ThreadPoolExecutor(4) as clients:
        waiting = [clients.submit(server.chat, messages=long) for _ in range(4)]
        assert begun.wait(PATIENCE_S)
        assert server.text()
        assert server.metric("redwood:num_requests_preparing") == 4
        assert not any(each.done() for each in waiting)
        go.set()
        assert [each.result().status_code for each in waiting] == [200] * 4
    server.alive_and_right()


def test_requests_that_are_tokenised_fill_the_queue(
    live: Callable[..., Live], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, go = live(rows=1, max_queue=1), threading.Event()
    encode = server.engine.encode_chat
    monkeypatch.setattr(
        server.engine, "encode_chat", lambda m, **o: go.wait(PATIENCE_S) and encode(m, **o)
    )
    with ThreadPoolExecutor(2) as clients:
        waiting = [clients.submit(server.chat) for _ in range(2)]
        wait_for(lambda: server.service.admission.num_entering == 2, "two that enter")
        assert server.error(server.chat(), 429)["code"] == "queue_full"
        go.set()
        assert [each.result().status_code for each in waiting] == [200] * 2
    monkeypatch.undo()
    server.alive_and_right()


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"n": 17}, "n"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"300": 1}}, "logit_bias"),
        ({"messages": [{"role": "user", "content": "7" * 100_000}]}, "messages"),
    ],
)
def test_what_can_be_refused_is_refused_before_anything_is_tokenised(
    live: Callable[..., Live],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    param: str,
) -> None:
    server = live()

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("it was tokenised")

    with monkeypatch.context() as patch:
        patch.setattr(type(server.engine.tokenizer), "__call__", never)
        error = server.error(server.chat(**changes), 400)
    assert error["param"] == param
    server.alive_and_right()


def test_too_many_token_ids_are_refused_as_too_long(live: Callable[..., Live]) -> None:
    server = live()
    response = server.http.post("/v1/completions", json={"prompt": [1] * 5000})
    assert server.error(response, 400)["code"] == "context_length_exceeded"
    server.alive_and_right()
