"""Schemas of arguments that nothing fits, in forms whose values are no JSON."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest

import redwood
from conftest import save_model, tiny_llama, tiny_tokenizer
from redwood.errors import ArgumentError
from redwood.server.grammar import Grammars
from redwood.server.tools.formats import FORMATS
from redwood.server.tools.grammars import calls_grammar
from redwood.server.tools.parts import CallArguments
from redwood.server.tools.rules import NothingFitsError
from schema_kit import fits, walked
from server_kit import Live
from tools_kit import HERMES, read, tool

FORMS = ["qwen3-coder", "pythonic", "gemma4", "functiongemma"]
NONE = {"type": "string", "minLength": 2, "pattern": "^$"}
UNFITTING: dict[str, Any] = {
    "lengths and pattern": NONE,
    "no length, and a letter": {"type": "string", "maxLength": 0, "pattern": "c"},
    "lengths": {"type": "string", "minLength": 3, "maxLength": 2},
    "format and pattern": {"type": "string", "format": "date", "pattern": "^x"},
    "format and length": {"type": "string", "format": "uuid", "maxLength": 5},
    "numbers": {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 4},
    "type and enum": {"type": "string", "enum": [1, 2]},
    "an item that must be": {"type": "array", "items": NONE, "minItems": 1},
    "a first item": {"type": "array", "prefixItems": [NONE], "minItems": 1},
    "a member that must be": {"type": "object", "properties": {"b": NONE}, "required": ["b"]},
    "both branches": {"anyOf": [NONE, {"type": "array", "items": NONE, "minItems": 2}]},
    "by reference": {"$ref": "#/$defs/none"},
    "nothing": False,
}
FITTING: dict[str, tuple[Any, list[Any]]] = {
    "empty text": ({"type": "string", "pattern": "^$"}, [""]),
    "text of no length": ({"type": "string", "maxLength": 0, "pattern": "c*"}, [""]),
    "one branch": ({"anyOf": [NONE, {"type": "null"}]}, [None]),
    "one type": ({"type": ["string", "null"], "minLength": 2, "pattern": "^$"}, [None]),
    "items": ({"type": "array", "items": NONE}, [[]]),
    "first items": ({"type": "array", "prefixItems": [{"const": 1}, NONE]}, [[], [1]]),
    "a branch of items": (
        {"type": "array", "items": {"anyOf": [{"const": 1}, NONE]}, "minItems": 2, "maxItems": 2},
        [[1, 1]],
    ),
    "a member": (
        {"type": "object", "properties": {"b": NONE}, "additionalProperties": False},
        [{}],
    ),
    "any members": ({"type": "object", "additionalProperties": NONE}, [{}]),
    "members": (
        {
            "type": "object",
            "properties": {"b": NONE, "c": {"const": 7}},
            "required": ["c"],
            "additionalProperties": False,
        },
        [{"c": 7}],
    ),
}


class Vocabulary:
    """A tokenizer, with marks as tokens or without, and its grammars."""

    def __init__(self, *, marks: bool) -> None:
        self.tokenizer = tiny_tokenizer(320)
        if marks:
            self.tokenizer.add_tokens(["<|tool_call>", "<tool_call|>", '<|"|>', "<escape>"])
        self.grammars = Grammars(self.tokenizer, len(self.tokenizer), [1])

    def _spelled(self, tag: str) -> str:
        added = self.tokenizer.get_added_vocab()
        return f"<[{added[tag]}]>" if tag in added else json.dumps(tag)

    def grammar(self, form: str, schema: Any) -> str:
        text = calls_grammar(
            FORMATS[form],
            {"f_1": schema},
            self._spelled,
            self.grammars.fits,
            opened=False,
            several=False,
        )
        return self.grammars.compile_lark(text, "tools")

    def arguments(self, form: str, schema: Any) -> list[Any]:
        """Arguments of random calls, those that end."""
        grammar, found = self.grammar(form, schema), []
        closers = ["</parameter>", '<|"|>', "<escape>", "]", "}"]
        for seed in range(6):
            processor = self.grammars.processor(grammar, 0)
            made = walked(random.Random(seed), processor, self.tokenizer, closers, 1, 400)
            if made is not None:
                text = self.tokenizer.decode(made)
                parts = read(FORMATS[form].reader({"f_1": schema}, eager=True), [text])
                found += [json.loads(p.text) for p in parts if isinstance(p, CallArguments)]
        return found


@pytest.fixture(scope="module", params=[True, False], ids=["tokens", "text"])
def vocabulary(request: pytest.FixtureRequest) -> Vocabulary:
    return Vocabulary(marks=request.param)


def record(schema: Any, *needed: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"a": schema, "z": {"type": "boolean"}},
        "required": [*needed, "z"],
        "additionalProperties": False,
        "$defs": {"none": NONE},
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", UNFITTING)
def test_an_argument_that_must_be_and_that_nothing_fits_is_named(
    vocabulary: Vocabulary, form: str, kind: str
) -> None:
    with pytest.raises(NothingFitsError, match=r"tools: f_1\.a.*fits"):
        vocabulary.grammar(form, record(UNFITTING[kind], "a"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", UNFITTING)
def test_an_argument_that_nothing_fits_is_left_out_where_it_may_be(
    vocabulary: Vocabulary, form: str, kind: str
) -> None:
    found = vocabulary.arguments(form, record(UNFITTING[kind]))
    assert found and all(set(each) == {"z"} for each in found)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", FITTING)
def test_what_some_value_fits_is_kept(vocabulary: Vocabulary, form: str, kind: str) -> None:
    schema, values = FITTING[kind]
    found = vocabulary.arguments(form, record(schema, "a"))
    assert found and all(each["a"] in values for each in found)
    assert all(fits(each["a"], schema, {"$defs": {"none": NONE}}) for each in found)


@pytest.mark.parametrize("form", FORMS[1:])  # llguidance refuses it, as JSON
def test_a_reference_to_what_nothing_fits(vocabulary: Vocabulary, form: str) -> None:
    none = {"$ref": "#/$defs/none"}
    found = vocabulary.arguments(form, record({"anyOf": [none, {"const": 5}, none]}, "a"))
    assert found and all(each["a"] == 5 for each in found)


def test_a_text_that_only_json_can_write(vocabulary: Vocabulary) -> None:
    # Python's strings have no quote or line break where a pattern counts signs
    for pattern in ("^\\n$", "^'\"$"):
        for kept in (True, False):
            schema = record({"type": "string", "pattern": pattern}, *(["a"] if kept else []))
            if kept:
                with pytest.raises(ArgumentError, match=r"f_1\.a"):
                    vocabulary.grammar("pythonic", schema)
            else:
                assert all("a" not in each for each in vocabulary.arguments("pythonic", schema))
    one = record({"type": "string", "pattern": '^"$'}, "a")  # stands between the others
    assert all(each["a"] == '"' for each in vocabulary.arguments("pythonic", one))
    closing = record({"type": "string", "pattern": "</parameter>"}, "a")
    with pytest.raises(NothingFitsError):
        vocabulary.grammar("qwen3-coder", closing)


def test_a_schema_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made, asked = Vocabulary(marks=True), list[str]()
    look = Grammars._is_satisfiable

    def counted(self: Grammars, grammar: str) -> bool:
        asked.append(grammar)
        return look(self, grammar)

    monkeypatch.setattr(Grammars, "_is_satisfiable", counted)
    properties = {f"p{i}": {"type": "string", "pattern": "^[a-c]+$"} for i in range(100)}
    for _ in range(2):
        made.grammar("gemma4", {"type": "object", "properties": properties})
    assert 0 < len(asked) == len(set(asked)) < 6


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    tokenizer = tiny_tokenizer(279)
    tokenizer.chat_template = HERMES
    folder = save_model(tmp_path_factory.mktemp("m"), tiny_llama(vocab_size=279), tokenizer)
    engine = redwood.load(str(folder), "none", backend="eager")
    server = Live(engine, tool_parser="pythonic")
    yield server
    server.stop()


def test_the_server_names_tool_and_argument(live: Live) -> None:
    tools = [tool("now"), tool("find", text=NONE)]
    error = live.error(live.chat(tools=tools, tool_choice="required"), 400)
    assert error["param"] == "tools" and error["type"] == "invalid_request_error"
    assert "find.text" in error["message"]
    body = {"input": "hi", "tool_choice": "required"}
    body["tools"] = [{"type": "function", **each["function"]} for each in tools]
    assert "find.text" in live.http.post("/v1/responses", json=body).text


def test_calls_that_may_be_made_are_read_as_they_come(live: Live) -> None:
    asked = {"tools": [tool("find", text=NONE)], "temperature": 0, "max_tokens": 8}
    assert live.chat(**asked).status_code == 200
