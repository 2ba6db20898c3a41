"""Forced calls, form by form: random texts of the grammar are read, and fit the schema."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from conftest import tiny_tokenizer
from redwood.errors import ArgumentError
from redwood.server.delayed import BareCalls, DelayedGrammar
from redwood.server.grammar import Grammars
from redwood.server.tools.bare import bare_grammars
from redwood.server.tools.formats import FORMATS
from redwood.server.tools.grammars import calls_grammar
from redwood.server.tools.parts import CallArguments, CallEnd, CallStart, Malformed, Text
from schema_kit import fits, walked
from tools_kit import read

TEXT = {"type": "string"}
COLOURS = ["red", "it's", 'a "b"', "x\ny", "", "雪🌲", "\\n"]


def record(*needed: str, **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(needed),
        "additionalProperties": False,
    }


SCHEMAS: dict[str, dict[str, Any]] = {
    "nothing": {"type": "object", "properties": {}},
    "texts": record("a", a=TEXT, b=TEXT),
    "last": record("c", a=TEXT, b={"type": "integer"}, c=TEXT, d={"type": "boolean"}),
    "optional": record(a={"type": "null"}, b={"type": "number"}, c={"type": "boolean"}),
    "bounds": record(
        *"abcd",
        a={"type": "string", "minLength": 2, "maxLength": 4},
        b={"type": "integer", "minimum": 3, "maximum": 12},
        c={"type": "number", "minimum": -1, "maximum": 1},
        d={"type": "integer", "minimum": 5},
    ),
    "chosen": record(
        *"abcd",
        a={"enum": COLOURS},
        b={"enum": ["x", 1, None, True, [1, "a"], {"k": 2}]},
        c={"const": 7},
        d={"type": "string", "enum": ["p", 3]},
    ),
    "shapes": record(
        *"abcd",
        a={"type": "string", "pattern": "^[a-c]{2}-\\d+$"},
        b={"type": "string", "pattern": "/x|y"},
        c={"type": "string", "format": "date"},
        d={"type": "string", "pattern": "b", "maxLength": 6},
    ),
    "lists": record(
        *"abc",
        a={"type": "array", "items": TEXT, "minItems": 1, "maxItems": 3},
        b={"type": "array", "items": {"type": "integer"}},
        c={"type": "array", "prefixItems": [TEXT, {"type": "boolean"}], "minItems": 2},
    ),
    "nested": record(
        *"ab",
        a=record("y", x={"type": "integer"}, y=TEXT, z=record(q={"type": "null"})),
        b={"type": "array", "items": record("k", k={"enum": ["u", "v"]}), "maxItems": 2},
    ),
    "several": record(
        *"abc",
        a={"type": ["string", "null"]},
        b={"anyOf": [{"type": "integer"}, {"type": "array", "items": TEXT}]},
        c={"oneOf": [{"type": "boolean"}, {"type": "string", "maxLength": 3}]},
    ),
    "free": {"type": "object", "properties": {"a": {}, "m": {"type": "object"}}, "required": ["a"]},
    "map": record("a", a={"type": "object", "additionalProperties": {"type": "integer"}}),
    "refers": {
        **record("a", a={"$ref": "#/$defs/pair"}, b={"$ref": "#/$defs/pair"}),
        "$defs": {
            "pair": {"type": "array", "items": {"$ref": "#/$defs/n"}, "maxItems": 2},
            "n": {"type": "integer"},
        },
    },
}
CLOSERS = ['"', "'", "\n</parameter>\n", '<|"|>', "<escape>", "]", "}", ")", "</function>"]
CLOSERS += ["<|end|>", "\n</tool_call>", "<tool_call|>", "1", "a", "a-", "b", "2", "/x"]
ARE_TOKENS = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|tool_call>"]
ARE_TOKENS += ["<tool_call|>", '<|"|>', "<start_function_call>", "<end_function_call>", "<escape>"]
ARE_TOKENS += ["<|python_tag|>", "<|python_start|>", "<|python_end|>"]
ARE_TOKENS += [f"<|{name}|>" for name in "start channel constrain message end call return".split()]


class Vocabulary:
    """A tokenizer, with tags as tokens or without, and its grammars."""

    def __init__(self, *, tags: bool) -> None:
        self.tokenizer = tiny_tokenizer(320)
        if tags:
            self.tokenizer.add_tokens(ARE_TOKENS)
        self.grammars = Grammars(self.tokenizer, len(self.tokenizer), [1])
        self._added = self.tokenizer.get_added_vocab()

    def spelled(self, tag: str) -> str:
        return f"<[{self._added[tag]}]>" if tag in self._added else json.dumps(tag)

    def grammar(self, form: str, tools: dict[str, Any], **more: Any) -> str:
        options = {"opened": False, "several": False, **more}
        text = calls_grammar(FORMATS[form], tools, self.spelled, self.grammars.fits, **options)
        return self.grammars.compile_lark(text, "tools")

    def text(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens))


@pytest.fixture(scope="module", params=[True, False], ids=["tags", "text"])
def vocabulary(request: pytest.FixtureRequest) -> Iterator[Vocabulary]:
    yield Vocabulary(tags=request.param)


def check(form: str, tools: dict[str, Any], text: str) -> int:
    """Reads an answer of calls; returns how many."""
    for eager in (True, False):
        for pieces in ([text], list(text)):
            parts = read(FORMATS[form].reader(tools, eager=eager), pieces)
            assert not [p for p in parts if isinstance(p, Malformed | Text)], (text, parts)
            names = [part.name for part in parts if isinstance(part, CallStart)]
            values = [json.loads(p.text) for p in parts if isinstance(p, CallArguments)]
            assert len(names) == sum(isinstance(part, CallEnd) for part in parts) > 0
            for name, value in zip(names, values, strict=True):
                assert fits(value, tools[name]), (text, value)
    return len(names)


NEW = ["qwen3-coder", "pythonic", "gemma4", "functiongemma", "harmony"]


@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize("form", NEW)
def test_every_text_of_the_grammar_is_a_call_that_fits(
    vocabulary: Vocabulary, form: str, schema: str
) -> None:
    tools = {"f_1": SCHEMAS[schema]}
    grammar = vocabulary.grammar(form, tools)
    rng, ended = random.Random(f"{form} {schema}"), 0
    for _ in range(12):
        processor = vocabulary.grammars.processor(grammar, 0)
        made = walked(rng, processor, vocabulary.tokenizer, CLOSERS, 1, 400)
        if made is not None:
            ended += 1
            assert check(form, tools, vocabulary.text(made)) == 1
    assert ended >= 4


@pytest.mark.parametrize("form", FORMATS)
def test_several_calls_of_several_tools(vocabulary: Vocabulary, form: str) -> None:
    tools = {"one": SCHEMAS["bounds"], "two": SCHEMAS["optional"], "three": SCHEMAS["nothing"]}
    grammar, counts, rng = vocabulary.grammar(form, tools, several=True), set(), random.Random(form)
    for _ in range(30):
        processor = vocabulary.grammars.processor(grammar, 0)
        made = walked(rng, processor, vocabulary.tokenizer, CLOSERS, 1, 600)
        if made is not None:
            counts.add(check(form, tools, vocabulary.text(made)))
    assert 1 in counts and (FORMATS[form].between is None or max(counts) > 1)


BEGUN = {
    "hermes": ['{"name": "f_1", "arguments":', ' {\n "name" : "f_1",\n "arguments": '],
    "llama3-json": ['{"name": "f_1", "parameters": ', '<|python_tag|>{"name":"f_1","parameters":'],
    "pythonic": ["[f_1(", "[ f_1(", "<|python_start|>[f_1("],
    "harmony": [
        "<|channel|>commentary to=functions.f_1 <|constrain|>json<|message|>",
        "<|channel|>analysis<|message|>Well.<|end|><|start|>assistant to=functions.f_1"
        "<|channel|>commentary json<|message|>",
    ],
}
FREE = {
    "hermes": [
        '{"name": "f_1"',
        '{"name": "f_2", "arguments":',
        'So: {"name": "f_1", "arguments":',
    ],
    "llama3-json": ['{"name": "f_1", "age": ', "[f_1("],
    "pythonic": ["[f_1", "[f_2(", "See [f_1(", '["f_1("'],
    "harmony": ["<|channel|>commentary to=f_1", "<|channel|>final<|message|>to=functions.f_1 {"],
}


def delayed(vocabulary: Vocabulary, form: str, schema: Any, *, several: bool = False) -> Any:
    """As for a request whose calls may be made, for one tool, f_1."""
    made = FORMATS[form]
    assert made.bare is not None
    grammars = bare_grammars(
        form,
        made.bare,
        made.body,
        {"f_1": schema},
        vocabulary.spelled,
        vocabulary.grammars.fits,
        several=several,
    )
    text = vocabulary.grammars.compile_lark(grammars["f_1"], "tools")

    def make(name: str, length: int) -> Any:
        assert name == "f_1"
        return vocabulary.grammars.processor(text, length)

    calls = BareCalls(made.bare.pattern(["f_1"]), made.bare.leads, make)
    return DelayedGrammar(make, vocabulary.grammars.bytes_of, [""], 0, None, calls)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", BEGUN)
@pytest.mark.parametrize("schema", ["bounds", "chosen", "nested", "free"])
def test_a_call_without_a_tag_is_kept_once_it_has_begun(
    vocabulary: Vocabulary, form: str, schema: str
) -> None:
    tools, rng, ended = {"f_1": SCHEMAS[schema]}, random.Random(f"{form} {schema}"), 0
    for text in BEGUN[form]:
        if "python_" in text and "<|python_tag|>" not in vocabulary.tokenizer.get_added_vocab():
            continue
        start = vocabulary.tokenizer(text, add_special_tokens=False)["input_ids"]
        for _ in range(6):
            processor = delayed(vocabulary, form, SCHEMAS[schema], several=True)
            assert not bound(processor, vocabulary, start[:1])
            assert bound(processor, vocabulary, start)
            assert processor.accepts([], start) == len(start)
            made = walked(rng, processor, vocabulary.tokenizer, CLOSERS, 1, 500, start)
            if made is not None:
                ended += 1
                parts = read(FORMATS[form].reader(tools, eager=False), [vocabulary.text(made)])
                values = [json.loads(p.text) for p in parts if isinstance(p, CallArguments)]
                assert values and all(fits(value, tools["f_1"]) for value in values), parts
                assert not [p for p in parts if isinstance(p, Malformed | Text)], parts
    assert ended >= 3


def bound(processor: Any, vocabulary: Vocabulary, answer: list[int]) -> bool:
    width = len(vocabulary.tokenizer)
    row = processor(torch.tensor([answer], dtype=torch.long), torch.zeros(1, width))
    return not bool(torch.isfinite(row).all())


@pytest.mark.parametrize("form", FREE)
def test_what_may_be_any_answer_stays_free(vocabulary: Vocabulary, form: str) -> None:
    for text in FREE[form]:
        answer = vocabulary.tokenizer(text, add_special_tokens=False)["input_ids"]
        processor = delayed(vocabulary, form, SCHEMAS["bounds"])
        for end in range(len(answer) + 1):
            assert not bound(processor, vocabulary, answer[:end])
        assert processor.accepts([], answer) == len(answer) and not processor.ahead(answer, [], 9)


@pytest.mark.parametrize(
    ("schema", "written", "allowed"),
    [
        (TEXT, "abc\n</parameter>", True),
        (TEXT, "abc</parameter>", True),
        (TEXT, "</parameter>", True),
        (TEXT, "\n\n</parameter>", True),
        (TEXT, "x</parameter\n</parameter>", True),
        (TEXT, "a</parameter> b\n</parameter>", False),
        ({**TEXT, "minLength": 4}, "abc\n</parameter>", False),
        ({**TEXT, "minLength": 4}, "abcd</parameter>", True),
        ({**TEXT, "maxLength": 3}, "abcd</parameter>", False),
    ],
)
def test_where_a_parameters_text_ends(
    vocabulary: Vocabulary, schema: dict[str, Any], written: str, allowed: bool
) -> None:
    tools = {"f_1": record("a", a=schema)}
    processor = vocabulary.grammars.processor(vocabulary.grammar("qwen3-coder", tools), 0)
    text = f"<tool_call>\n<function=f_1>\n<parameter=a>\n{written}\n</function>\n</tool_call>"
    ids = vocabulary.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert (processor.accepts([], ids) == len(ids)) == allowed
    if allowed:
        assert check("qwen3-coder", tools, text) == 1


WRONG = [
    {"type": "array", "minItems": "a"},
    {"type": "array", "maxItems": {}},
    {"type": "array", "minItems": True},
    {"type": "array", "prefixItems": [TEXT], "maxItems": 0},
    {"type": "array", "contains": False},
    {"type": "object", "minProperties": [1]},
    {"type": "object", "maxProperties": "1"},
    {"type": "object", "additionalProperties": False, "minProperties": 1},
    {"type": "object", "propertyNames": False},
    {"type": "string", "minLength": 1.5},
    {"enum": 5},
]


@pytest.mark.parametrize("schema", WRONG, ids=json.dumps)
@pytest.mark.parametrize("form", ["pythonic", "gemma4", "functiongemma"])
def test_what_is_no_schema_or_cannot_be_kept_is_refused(
    vocabulary: Vocabulary, form: str, schema: dict[str, Any]
) -> None:
    with pytest.raises(ArgumentError):
        vocabulary.grammar(form, {"f_1": record("a", a=schema)})


@pytest.mark.parametrize("bound", ["minProperties", "maxProperties"])
@pytest.mark.parametrize("value", ["1", [], {}, -1, True])
def test_bounds_of_parameters_that_are_no_numbers(
    vocabulary: Vocabulary, bound: str, value: Any
) -> None:
    for form in ("qwen3-coder", "pythonic", "gemma4", "functiongemma"):
        with pytest.raises(ArgumentError):
            vocabulary.grammar(form, {"f_1": {**record("a", a=TEXT), bound: value}})


def test_an_enum_that_is_no_list(vocabulary: Vocabulary) -> None:
    for schema in ({"enum": 5}, {"enum": {"a": 1}}, {"enum": None}):
        tools = {"f_1": record("a", a=schema)}
        with pytest.raises(ArgumentError):
            vocabulary.grammar("qwen3-coder", tools)
        answer = "<function=f_1>\n<parameter=a>\n5\n</parameter>\n</function>"
        assert check("qwen3-coder", {"f_1": record("a", a={})}, answer) == 1
        parts = read(FORMATS["qwen3-coder"].reader(tools, eager=False), [answer])
        assert [part.text for part in parts if isinstance(part, CallArguments)] == ['{"a": 5}']


def is_allowed(vocabulary: Vocabulary, schema: dict[str, Any], value: str) -> bool:
    processor = vocabulary.grammars.processor(
        vocabulary.grammar("pythonic", {"f_1": record("a", a=schema)}), 0
    )
    ids = vocabulary.tokenizer(f"[f_1(a={value})]", add_special_tokens=False)["input_ids"]
    return bool(processor.accepts([], ids) == len(ids))


@pytest.mark.parametrize(
    ("schema", "kept", "refused"),
    [
        ({"type": "object", "unevaluatedProperties": False}, "{}", '{"x": 1}'),
        ({"unevaluatedProperties": False}, "{}", '{"x": 1}'),
        ({"type": "array", "unevaluatedItems": False}, "[]", "[1]"),
        ({"type": "array", "items": False}, "[]", "[1]"),
        ({"type": "array", "minItems": None, "maxItems": None}, "[]", "1"),
        (
            {"type": "array", "items": {"type": "null"}, "maxItems": 1500},
            f"[{', '.join(['None'] * 1000)}]",
            f"[{', '.join(['None'] * 1501)}]",
        ),
    ],
    ids=["others", "object", "items", "no items", "null", "many"],
)
def test_bounds_that_are_easily_lost(
    vocabulary: Vocabulary, schema: dict[str, Any], kept: str, refused: str
) -> None:
    assert is_allowed(vocabulary, schema, kept) and not is_allowed(vocabulary, schema, refused)
