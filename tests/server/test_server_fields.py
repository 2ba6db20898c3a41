"""Bodies: what is read, what is refused, and how it is said."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redwood.server import fields, schema
from redwood.server.errors import ApiError

MESSAGES = [{"role": "user", "content": "Tom"}]


def read(**body: Any) -> schema.ChatRequest:
    return fields.read(json.dumps({"messages": MESSAGES, **body}).encode(), schema.ChatRequest)


def refused(body: bytes | dict[str, Any], kind: Any = schema.ChatRequest) -> ApiError:
    data = body if isinstance(body, bytes) else json.dumps({"messages": MESSAGES, **body}).encode()
    with pytest.raises(ApiError) as error:
        fields.read(data, kind)
    assert error.value.status == 400 and error.value.message
    return error.value


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b'"x"',
        b"{",
        b"{'a': 1}",
        b'{"messages": "\xff"}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b"[" * 100_000,
        b'{"seed": ' + b"9" * 5000 + b"}",
    ],
)
def test_a_body_that_is_no_json_object_is_refused(body: bytes) -> None:
    refused(body)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1),
        ("temperature", 2.1),
        ("temperature", "1"),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", -1),
        ("top_p", 1.5),
        ("top_k", -5),
        ("top_k", 1.5),
        ("min_p", 1.1),
        ("n", 0),
        ("n", True),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", True),
        ("max_tokens", "7"),
        ("max_tokens", 2.5),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0),
        ("seed", 1.5),
        ("seed", 2**64),
        ("stop", ["a", "b", "c", "d", "e"]),
        ("stop", [""]),
        ("stop", ""),
        ("stop", "x" * 1025),
        ("stop", [1]),
        ("logit_bias", {"1": 101}),
        ("logit_bias", [1]),
        ("logit_bias", {str(i): 1 for i in range(1025)}),
        ("top_logprobs", 21),
        ("stream", "yes"),
        ("stream_options", {"include_usage": 1}),
        ("response_format", {"type": "xml"}),
        ("response_format", {"type": "json_schema"}),
        ("response_format", {"type": "text", "json_schema": {"name": "x", "schema": {}}}),
        ("prediction", {"type": "guess", "content": "x"}),
        ("prediction", "x"),
        ("redwood", {"speculat": False}),
        ("messages", []),
        ("messages", "Tom"),
        ("messages", [{"role": "wizard", "content": "x"}]),
        ("messages", [{"role": "user"}]),
        ("messages", [{"role": "user", "content": None}]),
        ("messages", [{"role": "user", "content": "x", "mood": "good"}]),
        ("messages", [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]),
    ],
)
def test_a_wrong_value_is_refused_and_named(name: str, value: Any) -> None:
    error = refused({name: value})
    assert error.param == name and name in error.message


def test_a_whole_number_may_be_written_as_one_with_a_point() -> None:
    given = {"max_tokens": 2.0, "seed": -3.0, "top_k": 4.0, "n": 1.0, "top_logprobs": 0.0}
    body = {"messages": [{"role": "user", "content": "x"}], **given}
    request = fields.read(json.dumps(body).encode(), schema.ChatRequest)
    read = {name: getattr(request, name) for name in given}
    assert read == given and {type(value) for value in read.values()} == {int}


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none_are_refused(number: str) -> None:
    refused(b'{"messages": [], "temperature": %s}' % number.encode())


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file"])
def test_parts_other_than_text_are_refused_and_nothing_is_fetched(kind: str) -> None:
    part = {"type": kind, kind: {"url": "http://127.0.0.1:9/x"}}
    assert "only text" in refused({"messages": [{"role": "user", "content": [part]}]}).message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("functions", [{"name": "f"}]),
        ("best_of", 2),
        ("echo", True),
        ("suffix", "x"),
        ("min_tokens", 3),
        ("stop_token_ids", [3]),
        ("chat_template", "{{ 1 }}"),
        ("verbosity", "low"),
        ("modalities", ["audio"]),
        ("guided_json", {}),
        ("structured_outputs", {"regex": "(a+)+b"}),
        ("prompt_logprobs", 1),
        ("skip_special_tokens", False),
        ("use_beam_search", True),
        ("web_search_options", {}),
    ],
)
def test_what_would_change_the_answer_and_is_not_supported_is_refused(
    name: str, value: Any
) -> None:
    error = refused({name: value})
    assert error.code == "unsupported_parameter" and error.param == name


def test_neutral_values_of_unsupported_fields_pass() -> None:
    neutral = {name: values[0] for name, (values, _) in fields.REFUSED.items() if values}
    read(**neutral, **dict.fromkeys(fields.IGNORED, "x"))
    read(**dict.fromkeys(fields.REFUSED), temperature=None, stop=None)


def test_an_unknown_field_is_refused_with_the_nearest_name() -> None:
    error = refused({"temprature": 1})
    assert "temperature" in error.message and error.code == "unknown_parameter"
    assert len(refused({"x" * 10_000: 1}).message) < 200


def test_the_value_itself_is_not_repeated() -> None:
    assert "secret" not in refused({"messages": [{"role": "secret", "content": "secret"}]}).message


def test_text_parts_are_joined_and_answers_can_be_sent_back() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    echoed = {"role": "assistant", "content": "c", "refusal": None, "tool_calls": []}
    asked = read(messages=[{"role": "user", "content": parts}, echoed])
    assert [m.content for m in asked.messages] == ["a\nb", "c"]


def test_both_names_of_the_limit_are_known_and_the_newer_wins() -> None:
    assert read(max_tokens=5).limit == 5
    assert read(max_tokens=5, max_completion_tokens=7).limit == 7
    assert read().limit is None
    assert read(max_tokens=10**30).limit == 10**30


def test_options_that_exclude_each_other_are_refused() -> None:
    assert "stream" in refused({"redwood": {"trace": True}}).message
    assert "logprobs" in refused({"top_logprobs": 2}).message
    json_wanted = {"ignore_eos": True, "response_format": {"type": "json_object"}}
    assert "ignore_eos" in refused(json_wanted).message


@pytest.mark.parametrize(
    ("prompt", "count"), [("a", 1), (["a", "b"], 2), ([1, 2], 1), ([[1], [2, 3]], 2)]
)
def test_prompts_come_in_four_shapes(prompt: Any, count: int) -> None:
    asked = fields.read(json.dumps({"prompt": prompt}).encode(), schema.CompletionRequest)
    assert len(asked.prompts) == count and asked.limit == 16


@pytest.mark.parametrize("prompt", [None, 3, [1, "a"], [[1], "a"], {"a": 1}, [True], [1.5]])
def test_other_shapes_of_prompts_are_refused(prompt: Any) -> None:
    refused(json.dumps({"prompt": prompt}).encode(), schema.CompletionRequest)


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@settings(max_examples=120, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([*schema.ChatRequest.model_fields, *fields.REFUSED, "x"]), _VALUES
    )
)
def test_any_body_is_read_or_refused_with_400(body: dict[str, Any]) -> None:
    data = json.dumps({"messages": MESSAGES, **body}).encode()
    try:
        fields.read(data, schema.ChatRequest)
    except ApiError as error:
        assert error.status == 400
        json.dumps(error.body, allow_nan=False).encode()
