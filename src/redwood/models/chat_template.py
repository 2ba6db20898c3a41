"""Chat messages as one text, by the model's own template, with no message left out.

Some templates take a message's content as a string, some as a list of parts, and a few differ by
role. A template silently drops content in the wrong form. So each is rendered once with markers in
place of the texts, and the form in which all markers appear is used from then on; if there is none,
the messages are refused. The same is done for the arguments of calls, which some templates take as
an object and some as JSON text, and for tools, which some do not know.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, combinations
from types import FrameType
from typing import Any

from redwood.errors import ArgumentError

_LIMIT_S = 5.0  # of processor time; templates take milliseconds
_LONG = 20_000  # characters from which on a real conversation is watched, too
_MOST_ADDED = 1_000_000  # characters that a template may add
_MOST_MIXED = 4  # roles that are tried in all combinations of forms
_MOST_KNOWN = 1024
_QUOTE = r"""\\?(?:["']|&#3[49];|&quot;)"""
_PART_AS_CODE = re.compile(rf"text{_QUOTE}\s*:\s*{_QUOTE}$")

Message = dict[str, Any]
_Render = Callable[[list[Message], Sequence[Mapping[str, Any]]], str]
_MARKED_TOOL = {
    "type": "function",
    "function": {
        "name": "zttz",
        "description": "zddz",
        "parameters": {
            "type": "object",
            "properties": {"zppz": {"type": "string", "description": "zddz"}},
            "required": ["zppz"],
        },
    },
}


class _TooMuch(Exception):
    """A template that does not come to an end, or writes without one."""


@dataclass(frozen=True)
class _Found:
    """How a template wants its messages.

    Attributes: `parts` are the roles whose content it takes as a list; `as_text`: it takes the
    arguments of calls as JSON text; `left_out` the numbers of the messages that are not in its
    text all the same; `no_tools`: nor are the tools.
    """

    parts: frozenset[str]
    as_text: bool = False
    left_out: tuple[int, ...] = ()
    no_tools: bool = False

    @property
    def faults(self) -> int:
        """How much is not in the text."""
        return len(self.left_out) + self.no_tools


_known: dict[str, _Found | _TooMuch | None] = {}


def chat_text(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] = (),
    options: Mapping[str, Any] | None = None,
) -> str:
    """Returns messages as one text, by the model's own chat template, which there must be.

    Args:
        tokenizer: of Transformers.
        messages: each with a role and a content, both strings; other keys are handed on. Calls of
            an assistant's message (`tool_calls`) are as OpenAI has them, with arguments that are
            objects.
        add_generation_prompt: the text is a prompt: it ends where an answer begins.
        tools: what may be called, as OpenAI has it.
        options: further variables of the template.

    Raises:
        ArgumentError: messages or tools that the template refuses or, in a prompt, leaves out; a
            template that fails or does not end; several templates of which none is the default.
    """
    template = _template_of(tokenizer)
    given = [dict(message) for message in messages]
    more = dict(options or {})

    def render(filled: list[Message], named: Sequence[Mapping[str, Any]]) -> str:
        made = tokenizer.apply_chat_template(
            filled,
            tools=list(named) or None,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **more,
        )
        if not isinstance(made, str):
            raise TypeError(f"it makes {type(made).__name__} instead of text")
        return made

    try:
        kind = (template, add_generation_prompt, sorted(more.items()))
        found = _form_of(kind, given, bool(tools), render)
        form = _Found(frozenset()) if found is None else found
        size = chat_size(given, tools)
        with _watched(size) if size > _LONG else _unwatched():
            text = render(_in_form(given, form), tools)
        if len(text) > _most(size):
            raise _TooMuch("it writes without measure")
    except Exception as error:  # a template is a program: it can fail in any way
        raise _refusal(error) from error
    if found is None:
        form = _Found(frozenset(), left_out=_missing(given, text))
        form = replace(form, no_tools=_lacks(tools, "".join(text.lower().split())))
    if form.no_tools and add_generation_prompt:
        raise ArgumentError("the model's chat template knows no tools")
    if form.left_out and add_generation_prompt:
        raise _left_out(given, form.left_out[0])
    return text


def chat_size(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> int:
    """Returns roughly how many characters messages and tools hold."""
    size = sum(len(message["content"]) for message in messages)
    for message in messages:
        if calls := message.get("tool_calls"):
            size += len(json.dumps(calls))
        size += len(message.get("reasoning_content", ""))
    return size + (len(json.dumps(list(tools))) if tools else 0)


def _template_of(tokenizer: Any) -> str:
    templates = tokenizer.chat_template
    if not isinstance(templates, Mapping):
        return str(templates)
    if "default" not in templates:
        raise ArgumentError(
            f"this model has the chat templates {', '.join(sorted(templates))} and none called "
            "default: give the prompt as text (--raw)"
        )
    return str(templates["default"])


def _form_of(kind: object, messages: list[Message], tools: bool, render: _Render) -> _Found | None:
    """Returns the form for messages of this kind, remembered; None if no form can be rendered.

    Raises: _TooMuch, remembered as well, for a template without end.
    """
    shape = [
        (m["role"], bool(m["content"].strip()), sorted(m), len(m.get("tool_calls", ())))
        for m in messages
    ]
    key = hashlib.sha256(repr((kind, shape, tools)).encode()).hexdigest()
    if key not in _known:
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        try:
            _known[key] = _find_form(messages, tools, render)
        except _TooMuch as error:
            _known[key] = _TooMuch(str(error))
    known = _known[key]
    if isinstance(known, _TooMuch):
        raise _TooMuch(str(known))
    return known


def _find_form(messages: list[Message], tools: bool, render: _Render) -> _Found | None:
    """Tries strings first, then lists for ever more roles, until every mark comes out.

    What an assistant says beside its calls may be left out: there are templates that take one or
    the other.
    """
    marks = {
        number: f"zq{_letters(number)}qz"
        for number, message in enumerate(messages)
        if message["content"].strip()
    }
    calls: dict[int, str] = {
        n: f"zc{_letters(n)}cz" for n, m in enumerate(messages) if m.get("tool_calls")
    }
    marked = [
        _marked(m, marks.get(i) or m["content"], calls.get(i)) for i, m in enumerate(messages)
    ]
    named = [_MARKED_TOOL] if tools else []
    needed = {number: mark for number, mark in marks.items() if number not in calls}
    best: _Found | None = None
    for parts in _choices(sorted({messages[number]["role"] for number in marks})):
        for as_text in (False, True) if calls else (False,):
            form = _Found(parts, as_text)
            try:
                with _watched(0):
                    text = "".join(render(_in_form(marked, form), named).lower().split())
            except _TooMuch:
                raise
            except Exception:  # whatever it is, another form may do
                continue
            left_out = {number for number, mark in needed.items() if not _shows(text, mark)}
            left_out |= {number for number, mark in calls.items() if not _calls(text, mark)}
            found = _Found(parts, as_text, tuple(sorted(left_out)), _lacks(named, text))
            if best is None or found.faults < best.faults:
                best = found
            if not found.faults:
                return best
    return best


def _marked(message: Message, content: str, mark: str | None) -> Message:
    """A message with marks in the place of its content and of its calls' arguments."""
    if mark is None:
        return {**message, "content": content}
    calls = [
        {**call, "function": {**call["function"], "arguments": {f"k{mark}": f"v{mark}"}}}
        for call in message["tool_calls"]
    ]
    return {**message, "content": content, "tool_calls": calls}


def _calls(text: str, mark: str) -> bool:
    """Whether a call's arguments are in a text: not left out, nor as Python prints an object, nor
    as JSON in JSON."""
    if f"k{mark}" not in text or f"v{mark}" not in text:
        return False
    return f"'k{mark}':" not in text and f'\\"k{mark}\\"' not in text


def _lacks(tools: Sequence[Mapping[str, Any]], text: str) -> bool:
    """Whether a text without spaces names none of the tools."""
    return bool(tools) and not any(tool["function"]["name"].lower() in text for tool in tools)


def _choices(roles: list[str]) -> Iterator[frozenset[str]]:
    """Sets of roles that get lists, the smallest first."""
    sizes = range(len(roles) + 1) if len(roles) <= _MOST_MIXED else (0, len(roles))
    return map(frozenset, chain.from_iterable(combinations(roles, size) for size in sizes))


def _in_form(messages: list[Message], form: _Found) -> list[Message]:
    return [_message_in_form(message, form) for message in messages]


def _message_in_form(message: Message, form: _Found) -> Message:
    if message["role"] in form.parts:
        message = {**message, "content": [{"type": "text", "text": message["content"]}]}
    if form.as_text and message.get("tool_calls"):
        calls = [
            {**call, "function": {**call["function"], "arguments": _json(call)}}
            for call in message["tool_calls"]
        ]
        message = {**message, "tool_calls": calls}
    return message


def _json(call: Mapping[str, Any]) -> str:
    return json.dumps(call["function"]["arguments"], ensure_ascii=False)


def _letters(number: int) -> str:
    """A number in ten letters: marks survive whatever a template does to words."""
    return str(number).translate(str.maketrans("0123456789", "abcdefghij"))


def _shows(text: str, mark: str) -> bool:
    """Whether a mark is in a text without spaces, and not only in a list printed as code."""
    return any(
        not _PART_AS_CODE.search(text[max(0, found.start() - 40) : found.start()])
        for found in re.finditer(mark, text)
    )


def _missing(messages: list[Message], text: str) -> tuple[int, ...]:
    """Messages that are not in a text, letter by letter: for templates that refuse marks."""
    said = "".join(text.lower().split())
    return tuple(
        number
        for number, message in enumerate(messages)
        if "".join(message["content"].lower().split()) not in said and not message.get("tool_calls")
    )


def _most(size: int) -> int:
    return _MOST_ADDED + 16 * size


@contextmanager
def _unwatched() -> Iterator[None]:
    yield


@contextmanager
def _watched(size: int) -> Iterator[None]:
    """Ends a template that takes too long or writes too much; not under a debugger.

    Templates are compiled to generators that yield what they write, so a trace sees both.
    """
    before = sys.gettrace()
    if before is not None:
        yield
        return
    deadline, left, events = time.thread_time() + _LIMIT_S, _most(size), 0

    def watch(frame: FrameType, event: str, value: Any) -> Any:
        nonlocal left, events
        if frame.f_code.co_filename != "<template>":
            return None
        events += 1
        if event == "return" and isinstance(value, str):
            left -= len(value)
        if left < 0:
            raise _TooMuch("it writes without measure")
        if events % 256 == 0 and time.thread_time() > deadline:
            raise _TooMuch("it does not come to an end")
        return watch

    sys.settrace(watch)
    try:
        yield
    finally:
        sys.settrace(before)


def _left_out(messages: list[Message], number: int) -> ArgumentError:
    role = messages[number]["role"]
    advice = (
        "put its text into a user message" if role != "user" else "give the prompt as text (--raw)"
    )
    return ArgumentError(
        f"the model's chat template leaves out message {number + 1} (role {role!r}): {advice}"
    )


def _refusal(error: Exception) -> ArgumentError:
    """One line for whatever a template raised."""
    from jinja2 import TemplateError, TemplateSyntaxError, UndefinedError

    said = " ".join(str(error).split())[:300] or "it gives no reason"
    wrong = isinstance(error, TemplateSyntaxError | UndefinedError)
    if isinstance(error, TemplateError) and not wrong:
        return ArgumentError(f"the chat template refuses these messages: {said}")
    kind = "" if isinstance(error, _TooMuch) else f"{type(error).__name__}: "
    return ArgumentError(f"the model's chat template fails on these messages: {kind}{said}")
