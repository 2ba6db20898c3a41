"""Calls, and how each family writes them: 20 cases in ten forms, written by other code than reads
them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

TEXT = {"type": "string"}
TOOLS: dict[str, dict[str, Any]] = {
    "get_weather": {"properties": {"city": TEXT, "days": {"type": "integer"}}},
    "write_file": {"properties": {"path": TEXT, "content": TEXT}},
    "search": {
        "properties": {
            "query": TEXT,
            "limit": {"type": "integer"},
            "exact": {"type": "boolean"},
            "filter": {"type": "object"},
            "tags": {"type": "array"},
            "ratio": {"type": "number"},
            "nothing": {"type": "null"},
        }
    },
    "now": {"properties": {}},
}
Calls = list[tuple[str, dict[str, Any]]]


class Case(NamedTuple):
    """Text before, and calls."""

    before: str
    calls: Calls


CASES = [
    Case("", [("get_weather", {"city": "Oslo"})]),
    Case("", [("get_weather", {"city": "Oslo", "days": 3})]),
    Case("Let me look.", [("get_weather", {"city": "São Paulo", "days": -1})]),
    Case("", [("now", {})]),
    Case("", [("search", {"query": "trees", "limit": 10, "exact": True})]),
    Case("", [("search", {"query": "", "exact": False, "nothing": None})]),
    Case("", [("search", {"query": "x", "ratio": 0.25, "tags": ["a", "b", 3, True]})]),
    Case("", [("search", {"query": "y", "filter": {"a": {"b": [1, {"c": "d"}]}, "e": None}})]),
    Case("", [("search", {"query": 'say "hi"', "tags": []})]),
    Case("", [("search", {"query": "{braces} [brackets] }}} ]]]", "filter": {}})]),
    Case("Writing.", [("write_file", {"path": "a/b.py", "content": "def f():\n    return {}\n"})]),
    Case("", [("write_file", {"path": "C:\\x\\y", "content": "\\n is no line \\\\ end"})]),
    Case("", [("write_file", {"path": "t.json", "content": '{"name": "x", "arguments": {}}'})]),
    Case("", [("write_file", {"path": "i.html", "content": "<p>1 < 2 & 3 > 2</p>\n<br/>"})]),
    Case("", [("write_file", {"path": "z", "content": "雪 🌲 é\u00a0\u2028 end"})]),
    Case("Both:", [("get_weather", {"city": "Oslo"}), ("get_weather", {"city": "Rome"})]),
    Case("", [("now", {}), ("search", {"query": "a, b; c", "limit": 1}), ("now", {})]),
    Case("", [("write_file", {"path": "q", "content": "it's 'quoted' \"twice\""})]),
    Case("A < B, [ok], {fine}.", [("search", {"query": "f(x)=[1], g()", "limit": 0})]),
    Case("", [("write_file", {"path": "long", "content": "line = 'text'  # note\n" * 12})]),
]


def dumped(value: Any) -> str:
    """JSON as models write it."""
    return json.dumps(value, ensure_ascii=False)


def hermes(case: Case) -> str:
    calls = [
        f'<tool_call>\n{{"name": "{name}", "arguments": {dumped(arguments)}}}\n</tool_call>'
        for name, arguments in case.calls
    ]
    return "\n".join([*([case.before] if case.before else []), *calls])


def qwen3_coder(case: Case) -> str:
    made = [case.before] if case.before else []
    for name, arguments in case.calls:
        lines = ["<tool_call>", f"<function={name}>"]
        for key, value in arguments.items():
            shown = value if isinstance(value, str) else dumped(value)
            lines += [f"<parameter={key}>", shown, "</parameter>"]
        made += [*lines, "</function>", "</tool_call>"]
    return "\n".join(made)


def llama(case: Case) -> str:
    return "; ".join(
        f'{{"name": "{name}", "parameters": {dumped(arguments)}}}' for name, arguments in case.calls
    )


def llama_tagged(case: Case) -> str:
    return case.before + "<|python_tag|>" + llama(case)


def pythonic(case: Case) -> str:
    calls = [
        f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"
        for name, arguments in case.calls
    ]
    return f"[{', '.join(calls)}]"


def mistral_list(case: Case) -> str:
    calls = [
        {"name": name, "arguments": arguments, "id": f"abcdefgh{number}"}
        for number, (name, arguments) in enumerate(case.calls)
    ]
    return f"{case.before}[TOOL_CALLS] {dumped(calls)}"


def mistral(case: Case) -> str:
    return case.before + "".join(
        f"[TOOL_CALLS]{name}[ARGS]{dumped(arguments)}" for name, arguments in case.calls
    )


def gemma_value(value: Any, quote: str) -> str:
    if isinstance(value, str):
        return f"{quote}{value}{quote}"
    if isinstance(value, dict):
        inner = ",".join(f"{key}:{gemma_value(each, quote)}" for key, each in value.items())
        return f"{{{inner}}}"
    if isinstance(value, list):
        return f"[{','.join(gemma_value(each, quote) for each in value)}]"
    return dumped(value)


QUOTE = '<|"|>'


def gemma4(case: Case) -> str:
    return case.before + "".join(
        f"<|tool_call>call:{name}{gemma_value(arguments, QUOTE)}<tool_call|>"
        for name, arguments in case.calls
    )


def function_gemma(case: Case) -> str:
    return case.before + "".join(
        f"<start_function_call>call:{name}{gemma_value(arguments, '<escape>')}<end_function_call>"
        for name, arguments in case.calls
    )


def harmony(case: Case) -> str:
    before = f"<|channel|>commentary<|message|>{case.before}<|end|>" if case.before else ""
    made = before + "<|start|>assistant" * bool(before)
    calls = [
        f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{dumped(arguments)}"
        for name, arguments in case.calls
    ]
    return made + "<|call|><|start|>assistant".join(calls)


class Form(NamedTuple):
    """A form: the parser's name, who writes it, whether text may stand before calls."""

    name: str
    write: Callable[[Case], str]
    text_before: bool = True


FORMS = [
    Form("hermes", hermes),
    Form("qwen3-coder", qwen3_coder),
    Form("llama3-json", llama, False),
    Form("llama3-json", llama_tagged),
    Form("pythonic", pythonic, False),
    Form("mistral-list", mistral_list),
    Form("mistral", mistral),
    Form("gemma4", gemma4),
    Form("functiongemma", function_gemma),
    Form("harmony", harmony),
]
FIXTURES = [
    (form, Case(case.before if form.text_before else "", case.calls))
    for form in FORMS
    for case in CASES
]
assert len(FIXTURES) == 200
