"""Replicas without Ray: the router before engines that are lost at will, and a replica."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import httpx
import pytest
from starlette.types import Message

from redwood import Engine
from redwood.server.auth import Keys
from redwood.server.errors import full
from redwood.server.replicas.engines import Call, Replica
from redwood.server.replicas.gathered import Page
from redwood.server.replicas.router import ReplicaLost, Router
from redwood.server.settings import Settings
from server_kit import CHAT, PATIENCE_S, Staged, events, known_answer

KEY = "a-key-for-tests"
DIES = "dies"
STREAM = {b"content-type": b"text/event-stream"}
PING, DONE = b": ping\n\n", b"data: [DONE]\n\n"


def started(status: int = 200, headers: dict[bytes, bytes] | None = None) -> Message:
    listed = list((headers or {b"content-type": b"application/json"}).items())
    return {"type": "http.response.start", "status": status, "headers": listed}


def part(data: bytes, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}


WHOLE = [started(), part(b'{"whole": 1}', more=False)]
STREAMED = [started(headers=STREAM), part(b'data: "a"\n\n'), part(DONE), part(b"", more=False)]


class Fake:
    """Engines that do what the script says.

    Args:
        script: for each request in turn, messages, exceptions, "taken" (it has a replica), "dies"
            or "hangs".
    """

    def __init__(self, *script: Sequence[Any]) -> None:
        self.script = list(script)
        self.calls: list[Call] = []
        self.closed = 0
        self.pages: list[Page] = []

    async def ask(self, call: Call) -> AsyncGenerator[list[Message]]:
        self.calls.append(call)
        steps = self.script.pop(0)
        try:
            for step in steps:
                if step == DIES:
                    raise ReplicaLost("gone")
                if step == "hangs":
                    await asyncio.Event().wait()
                if isinstance(step, Exception):
                    raise step
                yield [] if step == "taken" else [step]
        finally:
            self.closed += 1

    async def read(self, path: str) -> list[Page]:
        return self.pages


def router(fake: Any, keys: Sequence[str] = (), retries: int = 2, **settings: Any) -> Router:
    made = Settings(model_names=("m",), **settings)
    return Router("r1", fake, made, Keys(keys), retries)


def asked(fake: Any, *, path: str = "/v1/chat/completions", **more: Any) -> httpx.Response:
    """What a client gets for one request."""
    return asyncio.run(_asked(router(fake, **more), path))


async def _asked(made: Router, path: str, **headers: str) -> httpx.Response:
    transport = httpx.ASGITransport(made)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        if path.startswith("/v1/"):
            return await client.post(path, json=CHAT, headers=headers)
        return await client.get(path, headers=headers)


def test_an_answer_passes_as_it_is() -> None:
    response = asked(Fake(["taken", *WHOLE]))
    assert (response.status_code, response.json()) == (200, {"whole": 1})
    response = asked(Fake(["taken", *STREAMED]))
    assert response.text == 'data: "a"\n\ndata: [DONE]\n\n'
    assert response.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "lost",
    [[DIES], ["taken", DIES], ["taken", WHOLE[0], DIES], ["taken", WHOLE[0], part(b"{"), DIES]]
    + [["taken", STREAMED[0], DIES], ["taken", STREAMED[0], part(PING), DIES], ["taken"]]
    + [["taken", started(503), part(b'{"error": {"code": "engine_dead"}}', more=False)]],
    ids=str,
)
def test_a_request_that_nothing_was_answered_to_is_asked_again(lost: list[Any]) -> None:
    fake = Fake(lost, ["taken", *STREAMED])
    response = asked(fake)
    assert response.status_code == 200
    assert response.text.removeprefix(PING.decode()) == 'data: "a"\n\ndata: [DONE]\n\n'
    assert len(fake.calls) == 2 and fake.calls[0] == fake.calls[1]


def test_a_stream_that_has_begun_ends_with_one_error() -> None:
    fake = Fake(["taken", *STREAMED[:2], DIES], ["taken", *STREAMED])
    response = asked(fake)
    first, last = events(response.text)
    assert (response.status_code, first) == (200, "a")
    assert set(last["error"]) == {"message", "type", "param", "code"}
    assert (last["error"]["code"], last["error"]["type"]) == ("replica_lost", "server_error")
    assert len(fake.calls) == 1


def test_a_stream_that_lacked_only_its_end_is_complete() -> None:
    assert events(asked(Fake(["taken", *STREAMED[:3], DIES])).text) == ["a", "[DONE]"]
    assert events(asked(Fake(["taken", *STREAMED, DIES])).text) == ["a", "[DONE]"]


def test_retries_end() -> None:
    fake = Fake(*[[DIES]] * 9)
    response = asked(fake, retries=3)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "replica_lost")
    assert int(response.headers["retry-after"]) >= 1
    assert len(fake.calls) == 4
    assert asked(Fake([DIES], ["taken", *WHOLE]), retries=0).status_code == 503


def test_an_error_of_the_second_engine_after_a_sign_of_life_is_an_event() -> None:
    refusal = [started(429), part(b'{"error": {"code": "queue_full"}}', more=False)]
    fake = Fake(["taken", STREAMED[0], part(PING), DIES], ["taken", *refusal])
    assert events(asked(fake).text) == [{"error": {"code": "queue_full"}}]


def test_errors_of_an_engine_pass_and_are_not_asked_again() -> None:
    for code in ("out_of_memory", "preparation_timeout"):
        body = json.dumps({"error": {"code": code}}).encode()
        fake = Fake(["taken", started(503), part(body, more=False)])
        assert asked(fake).json()["error"]["code"] == code
        assert len(fake.calls) == 1
    response = asked(Fake([full("every engine is full")]))
    assert (response.status_code, response.json()["error"]["code"]) == (429, "queue_full")


def test_nobody_waits_for_ever() -> None:
    response = asked(Fake(["hangs"]), queue_timeout_s=0.05)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "no_replica")


def test_an_engine_that_goes_silent_ends_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("redwood.server.replicas.router._SLACK_S", 0.0)
    response = asked(Fake(["taken", "hangs"]), request_timeout_s=0.05)
    assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")
    told = events(asked(Fake(["taken", *STREAMED[:2], "hangs"]), request_timeout_s=0.05).text)
    assert told[-1]["error"]["code"] == "timeout"


def test_keys_are_asked_for_before_an_engine_is() -> None:
    fake = Fake(["taken", *WHOLE])
    made = router(fake, [KEY])
    for path in ("/v1/chat/completions", "/metrics", "/version"):
        assert asyncio.run(_asked(made, path)).status_code == 401
    assert fake.calls == []
    known = {"authorization": f"Bearer {KEY}", "x-request-id": "mine-1"}
    assert asyncio.run(_asked(made, "/v1/chat/completions", **known)).status_code == 200
    assert dict(fake.calls[0].headers)[b"x-request-id"] == b"mine-1"


def test_a_body_that_is_too_large_reaches_no_engine() -> None:
    assert asked(Fake(), max_body_bytes=10).json()["error"]["code"] == "body_too_large"


def test_a_client_that_leaves_is_told_to_the_engine() -> None:
    fake = Fake(["taken", *STREAMED[:2], "hangs"])

    async def leave() -> None:
        made, gone = router(fake), asyncio.Event()

        async def receive() -> Message:
            if not fake.calls:
                return {"type": "http.request", "body": b"{}", "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.body":
                gone.set()

        await made(scope(), receive, send)
        assert made.num_open == 0

    asyncio.run(leave())
    assert fake.closed == 1


def scope() -> dict[str, Any]:
    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
    return {
        "type": "http",
        "method": "POST",
        "path": "/v1/chat/completions",
        "query_string": b"",
        "headers": headers,
    }


def test_draining_refuses_and_cutting_tells() -> None:
    async def stop() -> None:
        made = router(Fake(["taken", *STREAMED[:2], "hangs"]))
        running = asyncio.create_task(_asked(made, "/v1/chat/completions"))
        while not made.num_open:
            await asyncio.sleep(0.001)
        made.draining = True
        for path in ("/v1/completions", "/v1/responses", "/v1/messages"):
            refused = await _asked(made, path)
            assert refused.status_code == 503 and "is stopping" in refused.text
        assert (await _asked(made, "/ready")).json()["status"] == "shutting_down"
        await asyncio.sleep(0.01)
        assert made.cut() == 1
        first, last = events((await running).text)
        assert (first, last["error"]["code"]) == ("a", "shutting_down")
        assert made.num_open == 0

    asyncio.run(stop())


def test_one_page_shows_all_replicas() -> None:
    fake = Fake()
    assert asked(fake, path="/health").status_code == 503
    fake.pages = [("a", 200, b'{"status": "ok"}'), ("b", 503, b'{"status": "engine_dead"}')]
    response = asked(fake, path="/health")
    assert response.status_code == 200
    assert response.json()["replicas"]["b"] == {"status": "engine_dead"}
    text = '# HELP x y\n# TYPE x counter\nx_total 1.0\nx_created{a="{,} 1"} 2.0\n'
    fake.pages = [(name, 200, text.encode()) for name in "ab"]
    lines = asked(fake, path="/metrics").text.splitlines()
    assert lines.count("# HELP x y") == 1
    assert lines[2:6] == [
        'x_total{replica="a"} 1.0',
        'x_created{a="{,} 1",replica="a"} 2.0',
        'x_total{replica="b"} 1.0',
        'x_created{a="{,} 1",replica="b"} 2.0',
    ]


def test_losses_are_counted() -> None:
    async def lose() -> str:
        made = router(Fake([DIES], ["taken", *WHOLE], ["taken", *STREAMED[:2], DIES]))
        for _ in range(2):
            await _asked(made, "/v1/chat/completions")
        return (await _asked(made, "/metrics")).text

    text = asyncio.run(lose())
    assert 'redwood:replica_lost_requests_total{answer="none",replica="r1"} 1.0' in text
    assert 'redwood:replica_lost_requests_total{answer="begun",replica="r1"} 1.0' in text


class One:
    """A single replica, asked without Ray."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica

    def ask(self, call: Call) -> AsyncGenerator[list[Message]]:
        return self.replica.serve(call)

    async def read(self, path: str) -> list[Page]:
        return [await self.replica.read(path)]


def with_replica(
    engine: Engine, use: Callable[[Replica, Router], Any], keys: Sequence[str] = ()
) -> None:
    """Has a replica and a router for as long as `use` lasts."""

    async def live() -> None:
        target = Staged(engine.target)
        own = Engine(target, tokenizer=engine.tokenizer, eos_ids=sorted(engine.eos_ids), budget=1)
        left: list[int] = []
        settings = Settings(model_names=("m",))
        replica = Replica("e1", own, settings, Keys(keys), left.append)
        await replica.start()
        try:
            await use(replica, Router("r1", One(replica), settings, Keys(keys), 0))
        finally:
            target.go_on()
            await replica.stop()

    asyncio.run(live())


def test_a_replica_answers_as_the_server_does(tiny_engine: Engine) -> None:
    async def use(replica: Replica, made: Router) -> None:
        known = {"authorization": f"Bearer {KEY}"}
        response = await _asked(made, "/v1/chat/completions", **known)
        said = response.json()["choices"][0]["message"]["content"]
        assert said == known_answer(tiny_engine)
        assert len(response.headers.get_list("x-frame-options")) == 1
        health = (await _asked(made, "/health")).json()
        assert health["replicas"]["e1"]["status"] == "ok"
        metrics = (await _asked(made, "/metrics", **known)).text
        assert 'redwood:generation_tokens_total{replica="e1"} 12.0' in metrics
        assert (await _asked(made, "/nowhere", **known)).json()["error"]["code"] == "not_found"
        replica.check_health()

    with_replica(tiny_engine, use, [KEY])


def test_closing_an_answer_of_a_replica_frees_its_row(tiny_engine: Engine) -> None:
    async def use(replica: Replica, made: Router) -> None:
        replica.service.engine.target.pause()
        body = json.dumps({**CHAT, "stream": True}).encode()
        headers = ((b"host", b"127.0.0.1"), (b"content-type", b"application/json"))
        answer = replica.serve(Call("POST", "/v1/chat/completions", b"", headers, body))
        assert await anext(answer) == []
        waiting = asyncio.ensure_future(anext(answer))
        while not replica.service.num_open:
            await asyncio.sleep(0.001)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        replica.service.engine.target.go_on()
        while replica.service.admission.num_running:
            await asyncio.sleep(0.001)
        text = replica.service.metrics.text().decode()
        assert 'requests_cancelled_total{reason="disconnect"} 1.0' in text

    with_replica(tiny_engine, use)


def test_a_replica_leaves_when_its_engine_has_died(tiny_engine: Engine) -> None:
    async def use(replica: Replica, made: Router) -> None:
        def broken() -> bool:
            raise SystemExit

        replica.service.worker._drop_cancelled = broken  # type: ignore[assignment, method-assign]
        left = replica._leave.__self__  # type: ignore[attr-defined]
        async with asyncio.timeout(PATIENCE_S):
            while not left:
                await asyncio.sleep(0.01)
        assert left == [1]
        with pytest.raises(RuntimeError, match="engine_dead"):
            replica.check_health()

    with_replica(tiny_engine, use)


def test_the_router_needs_no_torch() -> None:
    code = (
        "import sys, redwood.server.replicas.router\n"
        "assert not {'torch', 'transformers', 'ray'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
