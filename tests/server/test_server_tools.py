"""Tool calls over HTTP: what a grammar keeps, what a client is told, streamed and not."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import redwood
from conftest import save_model, tiny_llama, tiny_tokenizer
from redwood import Engine
from redwood.server.tools.generic import described
from server_kit import Live, events
from tools_kit import HERMES, THINKING, tool

TOOLS = [
    tool("get_weather", city={"type": "string", "maxLength": 6}),
    tool("add", a={"type": "integer", "minimum": 0, "maximum": 99}, b={"type": "boolean"}),
]
NAMED = {"type": "function", "function": {"name": "add"}}
BIASED = {"temperature": 0, "max_tokens": 120, "parallel_tool_calls": False}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = tiny_tokenizer(279)
    tokenizer.add_tokens(["<tool_call>", "</tool_call>", "<think>", "</think>"])
    tokenizer.chat_template = HERMES
    model = tiny_llama(vocab_size=len(tokenizer))
    return save_model(tmp_path_factory.mktemp("tools"), model, tokenizer)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return redwood.load(str(folder), "ngram", backend="eager", budget=6)


@pytest.fixture(scope="module")
def live(engine: Engine) -> Iterator[Live]:
    server = Live(engine)
    yield server
    server.stop()


def tag(live: Live, text: str = "<tool_call>") -> str:
    return str(live.engine.tokenizer.convert_tokens_to_ids(text))


def calls_of(message: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [
        (call["function"]["name"], json.loads(call["function"]["arguments"]))
        for call in message["tool_calls"]
    ]


def fits(name: str, arguments: dict[str, Any]) -> bool:
    if name == "get_weather":
        return set(arguments) == {"city"} and len(arguments["city"]) <= 6
    return set(arguments) == {"a", "b"} and 0 <= arguments["a"] <= 99


@pytest.mark.parametrize("choice", ["required", NAMED])
@pytest.mark.parametrize("seed", range(6))
def test_a_call_that_must_be_made_fits_its_schema(live: Live, choice: Any, seed: int) -> None:
    params = {**BIASED, "temperature": 1.0, "seed": seed, "max_tokens": 200}
    made = live.chat(tools=TOOLS, tool_choice=choice, **params).json()["choices"][0]
    if made["finish_reason"] == "length":  # a random model fills its lines with spaces
        assert "tool_calls" not in made["message"]
        return
    assert made["finish_reason"] == "tool_calls" and made["message"]["content"] is None
    ((name, arguments),) = calls_of(made["message"])
    assert fits(name, arguments)
    assert choice != NAMED or name == "add"


def test_a_call_that_may_be_made_is_kept_from_its_tag_on(live: Live) -> None:
    params = {**BIASED, "logit_bias": {tag(live): 20}}
    made = live.chat(tools=TOOLS, **params).json()["choices"][0]
    ((name, arguments),) = calls_of(made["message"])
    assert fits(name, arguments) and made["finish_reason"] == "tool_calls"


def test_a_stream_says_what_the_whole_answer_says(live: Live) -> None:
    for params in (
        {**BIASED, "tool_choice": "required"},
        {**BIASED, "logit_bias": {tag(live): 20}},
        {**BIASED, "temperature": 1.0, "seed": 3, "logit_bias": {tag(live): 3}},
    ):
        whole = live.chat(tools=TOOLS, **params).json()["choices"][0]
        chunks = events(live.chat(tools=TOOLS, stream=True, **params).text)
        assert chunks.pop() == "[DONE]"
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        text = "".join(delta.get("content") or "" for delta in deltas)
        made: list[dict[str, Any]] = []
        for delta in deltas:
            for call in delta.get("tool_calls", ()):
                if "id" in call:  # the name comes first, whole
                    assert call["index"] == len(made) and call["function"]["arguments"] == ""
                    made.append({"function": dict(call["function"])})
                else:
                    made[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
        assert chunks[-1]["choices"][0]["finish_reason"] == whole["finish_reason"]
        assert text == (whole["message"]["content"] or "")
        assert calls_of({"tool_calls": made}) == calls_of(whole["message"])
        assert "tool_call>" not in text


def test_speculation_changes_no_call(live: Live) -> None:
    for params in ({"temperature": 0}, {"temperature": 1.0, "seed": 5}):
        both = [
            live.chat(
                tools=TOOLS,
                **{**BIASED, **params, "tool_choice": "required"},
                redwood={"speculate": speculate},
            ).json()["choices"][0]["message"]
            for speculate in (True, False)
        ]
        for message in both:
            for call in message.get("tool_calls", ()):
                call.pop("id")
        assert both[0] == both[1]


def test_a_call_that_is_cut_is_not_called_a_call(live: Live) -> None:
    params = {**BIASED, "tool_choice": NAMED, "max_tokens": 30}
    made = live.chat(tools=TOOLS, **params).json()["choices"][0]
    assert made["finish_reason"] == "length" and "tool_calls" not in made["message"]
    assert made["message"]["redwood"]["malformed_calls"][0]["reason"].startswith("the answer was")
    chunks = events(live.chat(tools=TOOLS, stream=True, **params).text)
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"


def test_no_tool_is_called_where_none_may_be(live: Live) -> None:
    plain = live.text(max_tokens=20)
    assert live.text(max_tokens=20, tools=TOOLS, tool_choice="none") == plain


def test_the_history_goes_through_the_template(live: Live) -> None:
    def prompt_tokens(*messages: dict[str, Any]) -> int:
        answer = live.chat(messages=list(messages), max_tokens=1)
        assert answer.status_code == 200, answer.text
        return int(answer.json()["usage"]["prompt_tokens"])

    user = {"role": "user", "content": "Tom"}
    result = {"role": "tool", "content": "2", "tool_call_id": "c1"}
    called = {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None}
    wanted = 'user:Tom\nassistant:<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>\n'
    expected = len(live.engine.tokenizer(wanted + "tool:2\n")["input_ids"])
    assert prompt_tokens(user, called, result) == expected
    parts = {**result, "content": [{"type": "text", "text": "2"}]}
    assert prompt_tokens(user, called, parts) == expected


@pytest.fixture(scope="module")
def thinking(folder: Path) -> Iterator[Live]:
    server = Live(redwood.load(str(folder), "ngram", backend="eager", budget=6))
    server.engine.tokenizer.chat_template = THINKING
    yield server
    server.stop()


def test_reasoning_is_told_apart(thinking: Live) -> None:
    plain = thinking.chat(max_tokens=8).json()["choices"][0]["message"]
    assert plain["content"] == "" and plain["reasoning_content"]
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    for changes in (off, {"reasoning_effort": "none"}):
        message = thinking.chat(max_tokens=8, **changes).json()["choices"][0]["message"]
        assert message["content"] and "reasoning_content" not in message
    chunks = events(thinking.chat(max_tokens=8, stream=True).text)[:-1]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    said = "".join(delta.get("reasoning_content") or "" for delta in deltas)
    assert said == plain["reasoning_content"]


def test_a_grammar_begins_when_the_reasoning_ends(thinking: Live) -> None:
    biased = {**BIASED, "logit_bias": {tag(thinking, "</think>"): 20}}
    for speculate in (True, False):
        more = {"redwood": {"speculate": speculate}}
        made = thinking.chat(tools=TOOLS, tool_choice="required", **biased, **more).json()
        ((name, arguments),) = calls_of(made["choices"][0]["message"])
        assert fits(name, arguments)
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    wanted = {"name": "x", "schema": {**schema, "additionalProperties": False}}
    form = {"type": "json_schema", "json_schema": wanted}
    text = thinking.text(response_format=form, **{**biased, "seed": 1})
    assert isinstance(json.loads(text)["a"], bool)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"enable_thinking": "no"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"thinking_budget": 3}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ],
)
def test_a_template_gets_only_what_it_knows(
    thinking: Live, changes: dict[str, Any], param: str
) -> None:
    assert thinking.error(thinking.chat(**changes), 400)["param"] == param


def test_a_model_says_which_options_its_template_has(live: Live, thinking: Live) -> None:
    for server, options in ((live, []), (thinking, ["enable_thinking"])):
        described = server.http.get("/v1/models/tiny").json()
        assert described["redwood"] == {"template_options": options}
        assert server.http.get("/v1/models").json()["data"] == [described]


def test_effort_is_refused_where_the_template_has_no_such_setting(live: Live) -> None:
    assert live.error(live.chat(reasoning_effort="high"), 400)["param"] == "reasoning_effort"
    assert live.chat(reasoning_effort="none", max_tokens=1).status_code == 200


@pytest.mark.parametrize(
    ("changes", "param", "said"),
    [
        ({"tools": [tool("a b")]}, "tools", "name"),
        ({"tools": [tool('a"b')]}, "tools", "name"),
        ({"tools": [tool("a\nb")]}, "tools", "name"),
        ({"tools": [tool("a" * 129)]}, "tools", "name"),
        ({"tools": [tool("f"), tool("f")]}, None, "several tools"),
        ({"tools": TOOLS * 65}, "tools", "128"),
        ({"tools": [{"type": "web_search"}]}, "tools", "function"),
        ({"tool_choice": "required"}, None, "no tools"),
        ({"tools": TOOLS, "tool_choice": "maybe"}, "tool_choice", ""),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
            None,
            "none of the tools",
        ),
        ({"tools": TOOLS, "ignore_eos": True}, None, "must end"),
        ({"functions": TOOLS}, "functions", "use tools"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "messages", ""),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages", ""),
        ({"messages": [{"role": "tool", "tool_call_id": "x"}]}, "messages", ""),
    ],
)
def test_what_is_wrong_with_tools_is_a_400(
    live: Live, changes: dict[str, Any], param: str | None, said: str
) -> None:
    error = live.error(live.chat(**changes), 400)
    assert said in error["message"] and (param is None or error["param"] == param)


@pytest.mark.parametrize("arguments", ["[1]", "{", "nonsense", "[" * 5000])
def test_a_call_of_the_history_without_an_object_is_a_400(live: Live, arguments: str) -> None:
    call = {**CALL, "function": {"name": "add", "arguments": arguments}}
    message = {"role": "assistant", "content": "", "tool_calls": [call]}
    error = live.error(live.chat(messages=[CHAT_USER, message]), 400)
    assert "JSON object" in error["message"] or "levels" in error["message"]


CHAT_USER = {"role": "user", "content": "Tom"}
DEEP: dict[str, Any] = {"type": "object", "properties": {}}
for _ in range(100):
    DEEP = {"type": "object", "properties": {"x": DEEP}}
HOSTILE = {
    "many": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(10_000)}},
    "deep": DEEP,
    "recursive": {
        "type": "object",
        "properties": {"x": {"$ref": "#/$defs/x"}},
        "$defs": {"x": {"type": "object", "properties": {"x": {"$ref": "#/$defs/x"}}}},
    },
    "pumping": {
        "type": "object",
        "properties": {"x": {"type": "string", "pattern": "^(a+)+(b|a*)*$"}},
    },
    "huge counts": {
        "type": "object",
        "properties": {"x": {"type": "string", "pattern": "(a{1,9999}){1,9999}"}},
    },
    "remote": {"type": "object", "properties": {"x": {"$ref": "https://example.com/x"}}},
    "not an object": {"type": "array"},
    "quotes": {
        "type": "object",
        "properties": {'"\n\\': {"type": "string"}},
        "required": ['"\n\\'],
    },
    "self": {"$ref": "#"},
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_schema_costs_little(live: Live, kind: str) -> None:
    asked = {"type": "function", "function": {"name": "f", "parameters": HOSTILE[kind]}}
    for choice in ("auto", "required"):
        started = time.process_time()
        answer = live.chat(tools=[asked], tool_choice=choice, max_tokens=8)
        assert answer.status_code in (200, 400), answer.text
        assert time.process_time() - started < 20  # a bound, not a measurement
    live.alive_and_right()


def test_an_unknown_template_needs_a_choice_of_the_operator(tiny_engine: Engine) -> None:
    engine = Engine(
        tiny_engine.target,
        tokenizer=tiny_engine.tokenizer,
        eos_ids=sorted(tiny_engine.eos_ids),
        budget=6,
    )
    server = Live(engine)
    try:
        error = server.error(server.chat(tools=TOOLS), 400)
        assert "--tool-parser" in error["message"] and error["param"] == "tools"
    finally:
        server.stop()


def test_the_generic_form_says_everything_in_texts() -> None:
    messages = [
        {"role": "user", "content": "Tom"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
        {"role": "tool", "tool_call_id": "c2", "content": "3"},
    ]
    plain = described([{**m, "content": m["content"] or ""} for m in messages[:1]], [tool("add")])
    assert [m["role"] for m in plain] == ["system", "user"] and '"add"' in plain[0]["content"]
    results = described(messages[2:], [])
    assert len(results) == 1 and results[0]["content"].count("<tool_response>") == 2
    assert results[0]["role"] == "user"
