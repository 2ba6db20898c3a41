"""The router's own words in streams: each API's errors in its own shape, by path."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.types import Message
from test_replicas import DIES, DONE, PING, STREAM, Fake, asked, part, started

from redwood.server.replicas.endings import Ending

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"


def named(name: str, **more: Any) -> bytes:
    value = {"type": name, **more}
    return f"event: {name}\ndata: {json.dumps(value, separators=(',', ':'))}\n\n".encode()


BEGINNINGS = {
    CHAT: b'data: {"choices": []}\n\n',
    "/v1/completions": b'data: {"choices": []}\n\n',
    RESPONSES: named("response.created", sequence_number=0)
    + named("x.delta", delta='"sequence_number":99}', sequence_number=1),
    MESSAGES: named("message_start"),
}
ENDINGS = {
    CHAT: DONE,
    RESPONSES: named("response.completed", sequence_number=2),
    MESSAGES: named("message_stop"),
}


def begun(path: str, *more: Any) -> list[Any]:
    return ["taken", started(headers=STREAM), part(BEGINNINGS[path]), *more]


def last_event(text: str) -> tuple[str, dict[str, Any]]:
    """Name, \"\" without one, and value of the last event of a stream."""
    lines = text.removesuffix("\n\n").rsplit("\n\n", 1)[-1].splitlines()
    names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    (data,) = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return "".join(names), json.loads(data)


def check_shape(path: str, text: str, code: str, number: int) -> None:
    name, value = last_event(text)
    if path == MESSAGES:
        assert name == value["type"] == "error" and set(value["error"]) == {"type", "message"}
        assert value["error"]["type"] == "overloaded_error"
    elif path == RESPONSES:
        assert name == value["type"] == "error" and value["sequence_number"] == number
        assert set(value) == {"type", "code", "message", "param", "sequence_number"}
        assert value["code"] == code
    else:
        assert name == "" and value["error"]["code"] == code
        assert set(value["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("path", BEGINNINGS)
def test_a_stream_that_has_begun_ends_in_the_shape_of_its_api(path: str) -> None:
    response = asked(Fake(begun(path, DIES)), path=path)
    assert response.text.startswith(BEGINNINGS[path].decode())
    check_shape(path, response.text, "replica_lost", 2)


@pytest.mark.parametrize("path", ENDINGS)
def test_a_stream_that_lacked_only_its_end_is_complete(path: str) -> None:
    for lost in ([DIES], [part(b"", more=False), DIES]):
        response = asked(Fake(begun(path, part(ENDINGS[path]), *lost)), path=path)
        assert response.text == (BEGINNINGS[path] + ENDINGS[path]).decode()


@pytest.mark.parametrize("path", [RESPONSES, MESSAGES])
def test_an_error_of_the_engine_is_told_once(path: str) -> None:
    failed = named("error", message="it failed", sequence_number=2)
    response = asked(Fake(begun(path, part(failed), DIES)), path=path)
    assert response.text == (BEGINNINGS[path] + failed).decode()


def refusal(path: str, code: str) -> list[Message]:
    """A 503 as an engine's server says it."""
    headers = {b"content-type": b"application/json"}
    value: dict[str, Any] = {"error": {"message": "no", "type": "x", "param": None, "code": code}}
    if path == MESSAGES:
        headers[b"x-error-code"] = code.encode()
        value = {"type": "error", "error": {"type": "overloaded_error", "message": "no"}}
    return [started(503, headers), part(json.dumps(value).encode(), more=False)]


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
def test_a_refusal_after_a_sign_of_life_is_an_event_of_the_api(path: str) -> None:
    alive = ["taken", started(headers=STREAM), part(PING), DIES]
    response = asked(Fake(alive, ["taken", *refusal(path, "out_of_memory")]), path=path)
    check_shape(path, response.text, "out_of_memory", 0)


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
def test_an_engine_that_is_stopping_is_not_the_last_word(path: str) -> None:
    whole = [started(), part(b'{"whole": 1}', more=False)]
    fake = Fake(["taken", *refusal(path, "shutting_down")], ["taken", *whole])
    assert asked(fake, path=path).json() == {"whole": 1}
    fake = Fake(["taken", *refusal(path, "out_of_memory")])
    assert asked(fake, path=path).status_code == 503 and len(fake.calls) == 1


def test_text_that_looks_like_an_end_is_none() -> None:
    ending = Ending(MESSAGES, "r")
    ending.follow(named("content_block_delta", text="event: message_stop"))
    ending.follow(DONE)
    assert not ending.seen
    ending.follow(named("message_delta") + named("message_stop"))
    assert ending.seen
