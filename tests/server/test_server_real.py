"""The whole way with a real model: OpenAI's client, the server, SmolLM2."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from pydantic import BaseModel

import redwood
from redwood import Engine
from server_kit import Live

pytestmark = pytest.mark.slow
ASK = [{"role": "user", "content": "Name three trees, and say one thing about each."}]
KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.8, "seed": 7, "top_p": 0.95},
    {"temperature": 0, "stop": ["2."]},
    {"temperature": 0, "presence_penalty": 1.0},
]


class Person(BaseModel):
    name: str
    age: int


@pytest.fixture(scope="module")
def reference() -> Engine:
    return redwood.load("smollm2-135m-instruct")


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    live = Live(redwood.load("smollm2-135m-instruct", "ngram", budget=4))
    yield live
    live.stop()


def test_texts_are_the_engines_alone_and_in_company(server: Live, reference: Engine) -> None:
    def ask(params: dict[str, Any]) -> str:
        made = server.openai.chat.completions.create(
            model="tiny", messages=ASK, max_tokens=40, **params
        )
        return made.choices[0].message.content or ""

    wanted = [reference.generate(ASK, max_tokens=40, **params).text for params in KINDS]
    assert [ask(params) for params in KINDS] == wanted
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, KINDS * 2)) == wanted * 2


def test_a_stream_says_the_same(server: Live, reference: Engine) -> None:
    stream = server.openai.chat.completions.create(
        model="tiny",
        messages=ASK,
        temperature=0,
        max_tokens=40,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == reference.generate(ASK, temperature=0, max_tokens=40).text
    usage = chunks[-1].usage
    assert usage is not None and usage.completion_tokens == 40
    assert usage.model_extra and usage.model_extra["redwood"]["num_accepted_tokens"] > 0


def test_a_prediction_that_is_right_is_accepted(server: Live) -> None:
    params: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 60}
    text = "Tom went to the market. He bought apples, and Anna bought pears."
    ask = [{"role": "user", "content": f"Repeat this word for word: {text}"}]
    plain = server.openai.chat.completions.create(messages=ask, **params)
    said = plain.choices[0].message.content or ""
    predicted = server.openai.chat.completions.create(
        messages=ask, prediction={"type": "content", "content": said}, **params
    )
    assert predicted.choices[0].message.content == said
    usage = predicted.usage
    assert usage is not None and usage.completion_tokens_details is not None
    accepted = usage.completion_tokens_details.accepted_prediction_tokens or 0
    assert accepted >= usage.completion_tokens - 2
    assert usage.model_extra["redwood"]["target_passes"] <= usage.completion_tokens / 2


def test_pydantic_models_come_back_as_such(server: Live) -> None:
    made = server.openai.chat.completions.parse(
        model="tiny",
        messages=[{"role": "user", "content": "Invent a person."}],
        response_format=Person,
        temperature=0,
        max_tokens=100,
    )
    assert isinstance(made.choices[0].message.parsed, Person)
    assert set(json.loads(made.choices[0].message.content or "")) == {"name", "age"}
