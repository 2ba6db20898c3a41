"""Readers of tool calls: every fixture, every split of it, and what models get wrong."""

from __future__ import annotations

import json
import os
import random
import re
from time import process_time
from typing import Any

import pytest
from tool_cases import FIXTURES, TOOLS, Calls, Case, Form

from redwood.server.tools.formats import FORMATS, format_of
from redwood.server.tools.parts import CallArguments, CallStart, Malformed, Part, Reasoning, Text
from redwood.server.tools.reading import OneCall, PlainReader, ThinkingReader, ThinkTags
from tools_kit import read

SCHEMAS = {name: {"type": "object", **schema} for name, schema in TOOLS.items()}
IDS = [f"{form.write.__name__}-{number % 20}" for number, (form, _) in enumerate(FIXTURES)]


def reader(form: Form | str, *, eager: bool = False) -> Any:
    name = form if isinstance(form, str) else form.name
    return FORMATS[name].reader(SCHEMAS, eager=eager)


def said(parts: list[Part]) -> str:
    return "".join(part.text for part in parts if isinstance(part, Text | Malformed))


def calls(parts: list[Part]) -> Calls:
    """The calls among parts; each must be whole."""
    names = [part.name for part in parts if isinstance(part, CallStart)]
    arguments = [json.loads(part.text) for part in parts if isinstance(part, CallArguments)]
    return list(zip(names, arguments, strict=True))


@pytest.mark.parametrize(("form", "case"), FIXTURES, ids=IDS)
def test_every_call_is_read_however_it_is_cut(form: Form, case: Case) -> None:
    text = form.write(case)
    whole = read(reader(form), [text])
    assert calls(whole) == case.calls
    assert said(whole) == case.before
    assert not [part for part in whole if isinstance(part, Malformed)]
    for eager in (False, True):
        assert read(reader(form, eager=eager), [text]) == whole or eager
        wanted = read(reader(form, eager=eager), [text])
        assert calls(wanted) == case.calls and said(wanted) == case.before
        assert read(reader(form, eager=eager), list(text)) == wanted
        assert read(reader(form, eager=eager), re.findall(r"\s?\w+|\W", text)) == wanted
        for place in range(1, len(text)):
            assert read(reader(form, eager=eager), [text[:place], text[place:]]) == wanted


@pytest.mark.parametrize(("form", "case"), FIXTURES[::7], ids=IDS[::7])
def test_a_call_that_is_cut_is_never_whole(form: Form, case: Case) -> None:
    text = form.write(case)
    for eager in (False, True):
        for end in range(len(text)):
            made = read(reader(form, eager=eager), [text[:end]], complete=False)
            whole = [part for part in made if isinstance(part, CallArguments)]
            for part in whole[: len([p for p in made if type(p).__name__ == "CallEnd"])]:
                assert json.loads(part.text) in [arguments for _, arguments in case.calls]


ONE = Case("", [("get_weather", {"city": "Oslo"})])
HERMES = '<tool_call>{{"name": "{}", "arguments": {}}}</tool_call>'


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("hermes", HERMES.format("nothing", "{}"), "no tool 'nothing'"),
        ("hermes", HERMES.format("now", '{"a": }'), "not valid JSON"),
        ("hermes", HERMES.format("now", "[1]"), "not a JSON object"),
        ("hermes", HERMES.format("now", '{"a": NaN}'), "not valid JSON"),
        ("hermes", "<tool_call>[1, 2]</tool_call>", "not a JSON object"),
        ("hermes", '<tool_call>{"arguments": {}}</tool_call>', "no name"),
        ("hermes", '<tool_call>{"name": "now", "arguments": {}}', "end tag is missing"),
        ("hermes", "<tool_call>" + "[" * 100_000 + "</tool_call>", "not valid JSON"),
        ("qwen3-coder", "<function=nothing>\n</function>", "no tool 'nothing'"),
        ("qwen3-coder", "<function=now>\n<parameter=a>\n1\n</function>", ""),
        ("llama3-json", '{"name": "nothing", "parameters": {}}', "no tool 'nothing'"),
        ("llama3-json", '<|python_tag|>{"name": "now", "parameters": {', "not valid JSON"),
        ("pythonic", "[nothing()]", "no tool 'nothing'"),
        ("pythonic", "[now(1)]", "must have names"),
        ("pythonic", "[now(a=open('x'))]", "no literal"),
        ("pythonic", "[now(a=" + "-" * 50_000 + "1)]", ""),
        ("mistral", "[TOOL_CALLS]nothing[ARGS]{}", "no tool 'nothing'"),
        ("mistral", "[TOOL_CALLS]now and then", "no arguments"),
        ("mistral", '[TOOL_CALLS]now[ARGS]{"a": 1', "have no end"),
        ("mistral", "[TOOL_CALLS]now[CALL_ID]one and two[ARGS]{}", "no arguments"),
        ("mistral", "[TOOL_CALLS]now[CALL_ID]{1}[ARGS]{}", "no arguments"),
        ("mistral", "[TOOL_CALLS]now[CALL_ID]a1[CALL_ID]a2[ARGS]{}", "no arguments"),
        ("mistral-list", "[TOOL_CALLS] []", "no call"),
        (
            "mistral-list",
            '[TOOL_CALLS] [{"name": "now", "arguments": {}, "id": {"say": "x"}}]',
            "says something else",
        ),
        ("hermes", '<tool_call>{"name": "now", "type": "x"}</tool_call>', "says something else"),
        ("gemma4", "<|tool_call>call:nothing{}<tool_call|>", "no tool 'nothing'"),
        ("gemma4", '<|tool_call>call:now{a:<|"|>b}<tool_call|>', "no end"),
        ("gemma4", "<|tool_call>call:now{a:" + "[" * 500 + "<tool_call|>", "too deep"),
        ("functiongemma", "<start_function_call>now<end_function_call>", "no name"),
        (
            "harmony",
            "<|channel|>commentary to=functions.nothing<|message|>{}<|call|>",
            "no tool 'nothing'",
        ),
        ("harmony", "<|channel|>commentary to=now json<|message|>{1}<|call|>", "not valid JSON"),
    ],
)
def test_what_is_no_call_is_text_with_a_reason(name: str, text: str, reason: str) -> None:
    made = read(reader(name), [text])
    assert not calls(made)
    (malformed,) = [part for part in made if isinstance(part, Malformed)]
    assert reason in malformed.reason and malformed.text
    for tag in FORMATS[name].tags:
        assert tag not in said(made)


def test_text_around_calls_is_kept_and_parted() -> None:
    text = f"One. {HERMES.format('now', '{}')} Two.{HERMES.format('now', '{}')}\n\nThree.\n"
    made = read(reader("hermes"), [text])
    assert said(made) == "One.\nTwo.\nThree.\n" and len(calls(made)) == 2


@pytest.mark.parametrize("own", ["", "a1b2c3d4e", " a1 ", "\\n"])
def test_an_id_of_the_models_own_is_left_out(own: str) -> None:
    text = f'[TOOL_CALLS]now[CALL_ID]{own}[ARGS]{{"a": 1}}[TOOL_CALLS]now[ARGS]{{}}'
    for eager in (False, True):
        for place in range(len(text)):
            made = read(reader("mistral", eager=eager), [text[:place], text[place:]])
            assert calls(made) == [("now", {"a": 1}), ("now", {})] and said(made) == ""


def test_text_without_calls_stays_as_it_is() -> None:
    for name in FORMATS:
        for text in (" a\n b \n\n", "1 < 2", "", "\n", "A [link](x) {y}."):
            if name == "harmony" and not text.strip():
                continue
            assert said(read(reader(name), list(text))) == text, name


@pytest.mark.parametrize("text", ['{"city": "Oslo"}', "{\n}", "[1, 2]", "[x] done", "{x", "["])
def test_json_and_lists_that_are_no_calls_are_text(text: str) -> None:
    for name in ("llama3-json", "pythonic"):
        assert said(read(reader(name), list(text))).strip() == text


ODD = {
    "hermes": HERMES.format("now", '{"a": VALUE}'),
    "llama3-json": '{"name": "now", "parameters": {"a": VALUE}}',
    "mistral-list": '[TOOL_CALLS] [{"name": "now", "arguments": {"a": VALUE}}]',
    "qwen3-coder": "<function=now>\n<parameter=a>\nVALUE\n</parameter>\n</function>",
    "pythonic": "[now(a=VALUE)]",
}


@pytest.mark.parametrize("name", ODD)
def test_values_that_are_no_text_and_no_number(name: str) -> None:
    half = read(reader(name), [ODD[name].replace("VALUE", '"\\ud800"')])
    (arguments,) = [part.text for part in half if isinstance(part, CallArguments)]
    assert arguments.encode() and json.loads(arguments) == {"a": "\ud800"}
    large = read(reader(name), [ODD[name].replace("VALUE", "1e999")])
    assert calls(large) == [("now", {"a": 1.7976931348623157e308})]


@pytest.mark.parametrize("name", ["qwen3-coder", "llama3-json", "harmony"])
def test_a_tag_inside_of_json_is_part_of_it(name: str) -> None:
    inside = "</parameter> </function> <|eom_id|> <|end|><|call|>"
    filled = json.dumps({"x": inside, "y": [inside]})
    text = {
        "qwen3-coder": "<function=search>\n<parameter=filter>\n"
        f"{filled}\n</parameter>\n</function>",
        "llama3-json": f'{{"name": "search", "parameters": {{"filter": {filled}}}}}<|eom_id|>',
        "harmony": '<|channel|>commentary to=search <|constrain|>json<|message|>{"filter": '
        f"{filled}}}<|call|>",
    }[name]
    for place in range(0, len(text), 3):
        made = read(reader(name, eager=True), [text[:place], text[place:]])
        assert calls(made) == [("search", {"filter": json.loads(filled)})] and said(made) == ""


BARE = '{"name": "now", "arguments": {"a": "}```{"}}'


@pytest.mark.parametrize(
    ("text", "count", "rest"),
    [
        (BARE, 1, ""),
        (f"\n{BARE}\n{BARE}\n", 2, ""),
        (f"```json\n{BARE}\n```", 1, ""),
        (f"```\n{BARE}\n```\nDone.", 1, "Done."),
        (f"{BARE} and text", 1, "and text"),
        (f"{{{BARE}}}", 1, ""),
        (f"{{{BARE}}}\n{{{BARE}\n}}\nDone.", 2, "Done."),
        (f"{{{BARE} then", 1, "then"),
        (f"```json\n{{{BARE}}}\n```\n", 1, ""),
        (f"```json\n{BARE}", 1, ""),
        ('{{"city": 1}}', 0, '{{"city": 1}}'),
        (f"{BARE}\n<tool_call>\n{BARE}\n</tool_call>", 2, ""),
        (f"Like this: {BARE}", 0, f"Like this: {BARE}"),
        ('{"name": "Anna", "age": 3}', 0, '{"name": "Anna", "age": 3}'),
        ('{"name": "now", "argum', 0, '{"name": "now", "argum'),
        ("```json\n[1]\n```", 0, "```json\n[1]\n```"),
        ("```js", 0, "```js"),
        ("{}", 0, "{}"),
    ],
)
def test_a_call_without_tags_counts_where_an_answer_begins(
    text: str, count: int, rest: str
) -> None:
    for eager in (False, True):
        whole = read(reader("hermes", eager=eager), [text])
        assert len(calls(whole)) == count and said(whole) == rest
        for place in range(len(text)):
            assert read(reader("hermes", eager=eager), [text[:place], text[place:]]) == whole
        assert read(reader("hermes", eager=eager), list(text)) == whole


def test_one_call_at_most_where_more_are_not_wanted() -> None:
    call = HERMES.format("now", "{}")
    text = f"One. {call}{HERMES.format('now', json.dumps({'a': 1}))} Two."
    for pieces in ([text], list(text)):
        made = read(OneCall(reader("hermes")), pieces)
        assert calls(made) == [("now", {})]
        assert said(made) == 'One.\nnow {"a": 1}\nTwo.'


def test_a_tag_inside_a_string_is_part_of_it() -> None:
    arguments = {"path": "x", "content": "a</tool_call>b<tool_call>c"}
    made = read(reader("hermes"), [HERMES.format("write_file", json.dumps(arguments))])
    assert calls(made) == [("write_file", arguments)]


def test_harmony_tells_reasoning_from_text() -> None:
    text = (
        "<|channel|>analysis<|message|>The user wants.\n It.<|end|><|start|>assistant"
        "<|channel|>final<|message|>Here it is."
    )
    for pieces in ([text], list(text)):
        made = read(reader("harmony"), pieces)
        assert made == [Reasoning("The user wants.\n It."), Text("Here it is.")]


@pytest.mark.parametrize("inside", [True, False])
def test_reasoning_is_taken_off(inside: bool) -> None:
    text = "<think>" * (not inside) + "\nIs 1 < 2?\n\nYes.\n</think>\n\nYes, it is.\n"
    for place in range(len(text)):
        made = ThinkingReader(ThinkTags("<think>", "</think>"), PlainReader(), inside=inside)
        parts = read(made, [text[:place], text[place:]])
        assert parts == [Reasoning("Is 1 < 2?\n\nYes."), Text("Yes, it is.\n")]


def test_reasoning_that_is_cut_or_missing() -> None:
    def parts(text: str, inside: bool) -> list[Part]:
        tags = ThinkTags("<think>", "</think>")
        return read(ThinkingReader(tags, PlainReader(), inside=inside), list(text), complete=False)

    assert parts("so far </thi", True) == [Reasoning("so far </thi")]
    assert parts("No thought.", False) == [Text("No thought.")]
    assert parts("<thi", False) == [Text("<thi")]
    assert parts("<think></think>Yes", False) == [Text("Yes")]


MARKS = [f"zq{number}qz" for number in range(5)]


def mutated(rng: random.Random, form: Form, text: str) -> str:
    """A fixture with damage, marks and tags in it."""
    for _ in range(rng.randint(0, 4)):
        place = rng.randint(0, len(text))
        end = min(len(text), place + rng.choice((1, 2, 5, 20)))
        tag = rng.choice(FORMATS[form.name].tags or ("<x>",))
        change = rng.randrange(6)
        if change == 0:
            text = text[:place] + text[end:]
        elif change == 1:
            text = text[:place] + tag + text[place:]
        elif change == 2:
            text = text[:place] + rng.choice('"{}[]\\<>|:, \n') + text[place:]
        elif change == 3:
            text = text[:place]
        elif change == 4:
            text = text[:place] + f" {rng.choice(MARKS)} " + text[place:]
        else:
            text = text.replace(tag, "", 1)
    return text


def pieces_of(rng: random.Random, text: str) -> list[str]:
    cuts = sorted(rng.randint(0, len(text)) for _ in range(rng.randint(0, 12)))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


OWN_IDS = re.compile(r'"id": "[^"]*"|\[CALL_ID\]\s*[^\s\[\]{}]+(?=\s*\[ARGS\])')
"""The model's own ids, in both of Mistral's forms: they are not used."""


def fuzz(rng: random.Random) -> None:
    form, case = rng.choice(FIXTURES)
    text = mutated(rng, form, form.write(case))
    complete = rng.random() < 0.7
    for eager in (False, True):
        whole = read(reader(form, eager=eager), [text], complete=complete)
        split = read(reader(form, eager=eager), pieces_of(rng, text), complete=complete)
        assert split == whole, (form.name, text)
        shown = said(whole) + "".join(p.text for p in whole if isinstance(p, Reasoning))
        for tag in FORMATS[form.name].tags:
            assert tag not in shown, (form.name, text)
        if eager:
            continue
        arguments = "".join(p.text for p in whole if isinstance(p, CallArguments))
        names = "".join(p.name for p in whole if isinstance(p, CallStart))
        kept = OWN_IDS.sub("", text)
        for mark in MARKS:
            assert mark not in kept or mark in shown + arguments + names, (form.name, text)
        for each in whole:
            assert not isinstance(each, CallArguments) or isinstance(json.loads(each.text), dict)


def test_damaged_calls_lose_nothing_and_leak_no_tag() -> None:
    rng = random.Random(7)
    for _ in range(4000):
        fuzz(rng)


@pytest.mark.slow
def test_many_damaged_calls_lose_nothing_and_leak_no_tag() -> None:
    rng = random.Random(int(os.environ.get("REDWOOD_SEED", "11")))
    for _ in range(100_000):
        fuzz(rng)


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("<tools></tools> <tool_call>{{ x }}</tool_call>", "hermes"),
        ("<tool_call>\n<function=x>\n<parameter=y>", "qwen3-coder"),
        ("<tool_call>{{ x }}<arg_key>", None),
        ("[TOOL_CALLS] [", "mistral-list"),
        ("[TOOL_CALLS]{{ x }}[ARGS]", "mistral"),
        ("<|tool_call>call:{{ x }}", "gemma4"),
        ("<start_function_call>", "functiongemma"),
        ("<|channel|>final<|message|>", "harmony"),
        ('<|start_header_id|> {"name": function name, "parameters": dictionary}', "llama3-json"),
        ("<|start_header_id|> [func_name1(params_name1=params_value1)]", "pythonic"),
        ("{{ messages }}", None),
        (None, None),
        ({"default": "{{ messages }}", "tool_use": "<tool_call></tool_call>"}, "hermes"),
    ],
)
def test_the_template_says_the_form(template: Any, name: str | None) -> None:
    form = format_of(template)
    assert (None if form is None else form.name) == name


@pytest.mark.parametrize(
    ("name", "before", "behind"),
    [
        ("mistral", "[TOOL_CALLS]", "[Z"),
        ("mistral", "[TOOL_CALLS]add[CALL_ID]", "[Z"),
        ("qwen3-coder", "<function=", "x</function>"),
        ("gemma4", "<|tool_call>call:", "x"),
        ("hermes", '<tool_call>{"name":', "x"),
    ],
)
def test_long_runs_of_spaces_take_no_time(name: str, before: str, behind: str) -> None:
    text = before + " " * 20_000 + behind
    began = process_time()
    parts = read(FORMATS[name].reader(TOOLS, eager=False), [text, " "])
    assert process_time() - began < 0.5  # 8 to 29 s where each cut of the spaces is tried
    assert not [part for part in parts if isinstance(part, CallStart)]
