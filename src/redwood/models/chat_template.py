"""Chat messages as one text, by the model's own template, with no message left out.

Some templates take a message's content as a string, some as a list of parts, and a few differ by
role. A template silently drops content in the wrong form. So each is rendered once with markers in
place of the texts, and the form in which all markers appear is used from then on; if there is none,
the messages are refused.
"""

from __future__ import annotations

import hashlib
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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


class _TooMuch(Exception):
    """A template that does not come to an end, or writes without one."""


@dataclass(frozen=True)
class _Found:
    """How a template wants its messages.

    Attributes: `parts` are the roles whose content it takes as a list; `left_out` the numbers of
    the messages that are not in its text all the same.
    """

    parts: frozenset[str]
    left_out: tuple[int, ...] = ()


_known: dict[str, _Found | _TooMuch | None] = {}


def chat_text(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False
) -> str:
    """Returns messages as one text, by the model's own chat template, which there must be.

    Args:
        tokenizer: of Transformers.
        messages: each with a role and a content, both strings; other keys are handed on.
        add_generation_prompt: the text is a prompt: it ends where an answer begins.

    Raises:
        ArgumentError: messages that the template refuses or, in a prompt, leaves out; a template
            that fails or does not end; several templates of which none is the default.
    """
    template = _template_of(tokenizer)
    given = [dict(message) for message in messages]

    def render(filled: list[Message]) -> str:
        made = tokenizer.apply_chat_template(
            filled, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        if not isinstance(made, str):
            raise TypeError(f"it makes {type(made).__name__} instead of text")
        return made

    try:
        found = _form_of(template, given, add_generation_prompt, render)
        parts = frozenset[str]() if found is None else found.parts
        size = sum(len(message["content"]) for message in given)
        with _watched(size) if size > _LONG else _unwatched():
            text = render(_in_form(given, parts))
        if len(text) > _most(size):
            raise _TooMuch("it writes without measure")
    except Exception as error:  # a template is a program: it can fail in any way
        raise _refusal(error) from error
    left_out = _missing(given, text) if found is None else found.left_out
    if left_out and add_generation_prompt:
        raise _left_out(given, left_out[0])
    return text


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


def _form_of(
    template: str, messages: list[Message], prompt: bool, render: Callable[[list[Message]], str]
) -> _Found | None:
    """Returns the form for messages of this kind, remembered; None if no form can be rendered.

    Raises: _TooMuch, remembered as well, for a template without end.
    """
    shape = [(m["role"], bool(m["content"].strip()), sorted(m)) for m in messages]
    key = hashlib.sha256(repr((template, prompt, shape)).encode()).hexdigest()
    if key not in _known:
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        try:
            _known[key] = _find_form(messages, render)
        except _TooMuch as error:
            _known[key] = _TooMuch(str(error))
    known = _known[key]
    if isinstance(known, _TooMuch):
        raise _TooMuch(str(known))
    return known


def _find_form(messages: list[Message], render: Callable[[list[Message]], str]) -> _Found | None:
    """Tries strings first, then lists for ever more roles, until every mark comes out."""
    marks = {
        number: f"zq{_letters(number)}qz"
        for number, message in enumerate(messages)
        if message["content"].strip()
    }
    marked = [{**m, "content": marks.get(i, m["content"])} for i, m in enumerate(messages)]
    best: _Found | None = None
    for parts in _choices(sorted({messages[number]["role"] for number in marks})):
        try:
            with _watched(0):
                text = "".join(render(_in_form(marked, parts)).lower().split())
        except _TooMuch:
            raise
        except Exception:  # whatever it is, another form may do
            continue
        left_out = tuple(number for number, mark in marks.items() if not _shows(text, mark))
        if best is None or len(left_out) < len(best.left_out):
            best = _Found(parts, left_out)
        if not left_out:
            break
    return best


def _choices(roles: list[str]) -> Iterator[frozenset[str]]:
    """Sets of roles that get lists, the smallest first."""
    sizes = range(len(roles) + 1) if len(roles) <= _MOST_MIXED else (0, len(roles))
    return map(frozenset, chain.from_iterable(combinations(roles, size) for size in sizes))


def _in_form(messages: list[Message], parts: frozenset[str]) -> list[Message]:
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if message["role"] in parts
        else message
        for message in messages
    ]


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
        if "".join(message["content"].lower().split()) not in said
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
