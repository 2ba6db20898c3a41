"""Hermes and Qwen: a JSON object with name and arguments between <tool_call> tags.

Qwen2.5, Qwen3 (not Qwen3-Coder), Hermes 2 and 3, and many fine-tunes write

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Oslo"}}
    </tool_call>

Qwen2.5-Coder often leaves the tags out, writes a block of code instead, or doubles the outer
braces. So a JSON object with the name of a tool that begins an answer is a call, too, alone, in
such a block, or in such braces.
"""

from __future__ import annotations

import json
import re

from redwood.server.tools.json_text import ObjectScan, is_string_open
from redwood.server.tools.parser import Call, NoCall, Schemas, TaggedParser, loads
from redwood.server.tools.parts import Part

HEAD = re.compile(
    r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)


_BARE = re.compile(r'(```(?:json)?\s*)?(\{\s*)?\{\s*"name"\s*:\s*"', re.ASCII)
_BARE_BEGINNING = re.compile(
    r"(?:`{0,3}|```(?:j|js|jso|json)?\s*)"
    r'(?:(?<![`jso])\{\s*(?:\{\s*)?(?:"|"n|"na|"nam|"name|"name"\s*:?\s*)?)?'
)


class HermesParser(TaggedParser):
    """See the module."""

    opening, closing = "<tool_call>", "</tool_call>"

    def __init__(self, tools: Schemas, *, eager: bool = False) -> None:
        super().__init__(tools, eager=eager)
        self._leading: str | None = ""  # the beginning of an answer that may be a bare call

    def feed(self, text: str) -> list[Part]:
        """As `ToolParser.feed`."""
        if self._leading is None:
            return super().feed(text)
        self._leading += text
        while self._leading is not None and self._step_bare():
            pass
        return self._take()

    def finish(self, *, complete: bool) -> list[Part]:
        """As `ToolParser.finish`."""
        while self._leading is not None and self._step_bare(final=True):
            pass
        if self._leading is not None:
            self._end_leading()
        return super().finish(complete=complete)

    def _step_bare(self, *, final: bool = False) -> bool:
        """Reads a call without tags; returns whether there may be another."""
        assert self._leading is not None
        text = self._leading.lstrip()
        if not text or _BARE_BEGINNING.fullmatch(text):
            return False
        found = _BARE.match(text)
        if found is None:
            self._end_leading()
            return False
        start = text.rindex("{", 0, found.end())
        scan = ObjectScan()
        end = start + scan.feed(text[start:])
        if not scan.done:
            return False
        wanted = "}" * (found.group(2) is not None) + "```" * (found.group(1) is not None)
        left, after = _behind(text, end, wanted)
        if left and after < 0 and not final:
            return False
        try:
            (call,) = self._read(text[start:end])
        except NoCall:
            self._end_leading()
            return False
        self._called(call)
        self._leading = text[after:] if after >= 0 else ""
        return True

    def _end_leading(self) -> None:
        """What is left of the beginning is no bare call."""
        rest, self._leading = self._leading or "", None
        made = super().feed(rest)  # it has taken what was there before, too
        self._parts = made

    def _read(self, body: str) -> list[Call]:
        return [self._checked(*named_arguments(loads(body)))]

    def _head(self, body: str) -> tuple[str, int] | None:
        return head_of(body)

    def _open_string(self, body: str) -> bool:
        return is_string_open(body)


def _behind(text: str, end: int, wanted: str) -> tuple[str, int]:
    """Where what closes a call ends.

    Args:
        end: of the call in `text`.
        wanted: signs that are to follow it, with white space between them.

    Returns: the signs that are still to come, and the end of those that came; -1: more may come.
    """
    place = end
    while wanted:
        while place < len(text) and text[place].isspace():
            place += 1
        if place == len(text):
            return wanted, -1
        if text[place] != wanted[0]:
            return wanted, end
        wanted, place = wanted[1:], place + 1
        end = place
    return "", end


def head_of(body: str) -> tuple[str, int] | None:
    """Returns the name of a call in JSON that has begun, and where its arguments begin."""
    found = HEAD.match(body)
    if found is None:
        return None
    try:
        return str(json.loads(found.group(1))), found.end()
    except ValueError:
        return None


def named_arguments(value: object) -> tuple[object, object]:
    """Returns name and arguments of a call that is a JSON value; arguments in a string are read.

    Raises:
        NoCall: it is no object with these two.
    """
    if not isinstance(value, dict):
        raise NoCall("the call is not a JSON object")
    if not value.keys() <= {"name", "arguments", "parameters", "id", "type", "index", "function"}:
        raise NoCall("the call has other fields than name and arguments")
    if "arguments" in value and "parameters" in value:
        raise NoCall("the call has arguments and parameters")
    if not (
        _is_id(value.get("id"))
        and _is_id(value.get("index"))
        and value.get("type", "function") == "function"
        and value.get("function", value.get("name")) == value.get("name")
    ):
        raise NoCall("the call has a field that says something else")
    arguments = value.get("arguments", value.get("parameters", {}))
    return value.get("name"), loads(arguments) if isinstance(arguments, str) else arguments


def _is_id(value: object) -> bool:
    """Whether a value numbers a call at most, so that nothing is lost where it is left out."""
    return value is None or isinstance(value, int) or (isinstance(value, str) and "\n" not in value)
