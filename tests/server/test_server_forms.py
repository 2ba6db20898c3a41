"""Each form over HTTP: calls that must be made fit; what a form has no way to keep is a 400."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from test_server_tools import HOSTILE
from test_tool_grammars import ARE_TOKENS, Vocabulary, record

import redwood
from conftest import save_model, tiny_llama, tiny_tokenizer
from redwood.errors import ArgumentError
from schema_kit import fits
from server_kit import Live, events
from tools_kit import tool

SIGNS = {
    "qwen3-coder": "<tool_call>\n<function=x>\n<parameter=y>",
    "pythonic": "<|start_header_id|> [func_name1(params_name1=params_value1)]",
    "gemma4": "<|tool_call>call:x",
    "functiongemma": "<start_function_call>",
    "harmony": "<|channel|>final<|message|>",
}
TOOLS = [
    tool("add", a={"type": "integer", "minimum": 0, "maximum": 99}, b={"type": "boolean"}),
    tool("paint", colour={"enum": ["red", "blue"]}, word={"type": "string", "maxLength": 4}),
]
SCHEMAS = {each["function"]["name"]: each["function"]["parameters"] for each in TOOLS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = tiny_tokenizer(300)
    tokenizer.add_tokens([tag for tag in ARE_TOKENS if tag != "[ARGS]"])
    model = tiny_llama(vocab_size=len(tokenizer))
    return save_model(tmp_path_factory.mktemp("forms"), model, tokenizer)


@pytest.mark.parametrize("form", SIGNS)
def test_a_call_that_must_be_made_fits_in_every_form(folder: Path, form: str) -> None:
    engine = redwood.load(str(folder), "ngram", backend="eager", budget=6)
    shown = "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}"
    shown += "{% for m in messages %}{{ m.role }}:{{ m.content }}{% endfor %}"
    engine.tokenizer.chat_template = f"{{# {SIGNS[form]} #}}{shown}"
    live, whole = Live(engine), 0
    try:
        for seed in range(8):
            asked = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
            params = {"temperature": 1.0, "seed": seed, "max_tokens": 200, **asked}
            answer = live.chat(**params)
            assert answer.status_code == 200, answer.text
            made = answer.json()["choices"][0]
            if made["finish_reason"] == "length":  # its reasoning, or spaces, had no end
                continue
            whole += 1
            assert made["finish_reason"] == "tool_calls"
            (call,) = made["message"]["tool_calls"]
            function = call["function"]
            assert fits(json.loads(function["arguments"]), SCHEMAS[function["name"]])
            deltas = [
                chunk["choices"][0]["delta"]
                for chunk in events(live.chat(stream=True, **params).text)[:-1]
            ]
            pieces = [each for delta in deltas for each in delta.get("tool_calls", ())]
            said = "".join(each["function"]["arguments"] for each in pieces)
            assert json.loads(said) == json.loads(function["arguments"])
        assert whole
        bad = {**TOOLS[0], "function": {"name": "f", "parameters": {"not": {}}}}
        if form != "harmony":
            error = live.error(live.chat(tools=[bad], tool_choice="required"), 400)
            assert f"not cannot be kept in calls of the form {form}" in error["message"]
        assert live.chat(tools=[bad], max_tokens=4).status_code == 200
    finally:
        live.stop()


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(tags=True)


def of(schema: Any) -> dict[str, Any]:
    return record(p=schema)


@pytest.mark.parametrize(
    ("forms", "schema", "part"),
    [
        ("pythonic", record(**{"class": {}}), "'class'"),
        ("pythonic", record(**{"a-b": {}}), "'a-b'"),
        ("pythonic", {"properties": {"\ufb01": {}}}, "'\ufb01'"),
        ("qwen3-coder", record(**{"a>b": {}}), "'a>b'"),
        ("qwen3-coder", record(**{" a": {}}), "' a'"),
        ("qwen3-coder", of({"enum": ["a</parameter>"]}), "the value"),
        ("gemma4", of({"enum": ['a<|"|>']}), "the value"),
        ("functiongemma", of({"enum": ["<escape>"]}), "the value"),
        ("pythonic gemma4", of({"type": "array", "uniqueItems": True}), "uniqueItems"),
        ("pythonic gemma4", of({"allOf": [{"type": "null"}, {}]}), "allOf"),
        ("pythonic gemma4", of({"oneOf": [{"type": "number"}, {"type": "integer"}]}), "oneOf"),
        ("pythonic gemma4", {"$ref": "#/$defs/x", "$defs": {"x": of({"$ref": "#/$defs/x"})}}, "re"),
        ("pythonic gemma4 qwen3-coder", of({"type": "string", "pattern": "(?=a)"}), "pattern"),
        ("pythonic gemma4 qwen3-coder", of({"type": "string", "format": "ipv6"}), "format"),
        ("pythonic gemma4 qwen3-coder", {"patternProperties": {"a": {}}}, "patternProperties"),
        ("pythonic gemma4 qwen3-coder", {"required": ["a"], "additionalProperties": False}, "f.a"),
        ("pythonic gemma4 qwen3-coder", {**of({}), "minProperties": 1}, "minProperties"),
        ("pythonic gemma4 qwen3-coder", {"anyOf": [of({}), of({})]}, "anyOf"),
        ("qwen3-coder", of({"type": "array", "items": {"$ref": "#/properties/p"}}), "$ref"),
    ],
)
def test_what_a_form_has_no_way_to_keep_is_named(
    vocabulary: Vocabulary, forms: str, schema: dict[str, Any], part: str
) -> None:
    for form in forms.split():
        with pytest.raises(ArgumentError, match=form) as caught:
            vocabulary.grammar(form, {"f": schema})
        assert part in str(caught.value) and len(str(caught.value)) < 400


def test_a_name_that_is_none_in_python() -> None:
    for name in ("get-weather", "a:b", "1a", "class", "a..b", "if.x"):
        with pytest.raises(ArgumentError, match="name of the tool"):
            Vocabulary(tags=False).grammar("pythonic", {name: record()})


BLOWN: dict[str, Any] = {f"d{i}": of({"$ref": f"#/$defs/d{i + 1}"}) for i in range(40)}
for _name, _schema in BLOWN.items():
    _schema["properties"]["q"] = _schema["properties"]["p"]
LARGE = {
    **HOSTILE,
    "many": {"properties": {f"p{i}": {"type": "string"} for i in range(2500)}},
    "doubling": {**of({"$ref": "#/$defs/d0"}), "$defs": {**BLOWN, "d40": {"type": "null"}}},
    "long": of({"type": "string", "minLength": 60_000, "maxLength": 10**9}),
    "wide": of({"type": "array", "minItems": 900, "items": {"type": "integer"}}),
    "choices": of({"enum": [f"v{i}" for i in range(8000)]}),
    "definitions": {
        "properties": {
            f"p{i}": {"type": ["object", "null"], "$ref": "#/$defs/x"} for i in range(900)
        },
        "$defs": {"x": {"enum": ["y" * 4000]}},
    },
}


@pytest.mark.parametrize("form", SIGNS)
@pytest.mark.parametrize("kind", LARGE)
def test_a_hostile_schema_ends_soon_in_every_form(
    vocabulary: Vocabulary, form: str, kind: str
) -> None:
    started = time.process_time()
    try:
        grammar = vocabulary.grammar(form, {"f": LARGE[kind]})
        processor = vocabulary.grammars.processor(grammar, 0)
        processor.ahead([], [], 64)
    except ArgumentError as error:
        assert len(str(error)) < 500
    assert time.process_time() - started < 20  # a bound, not a measurement
