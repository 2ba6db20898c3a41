"""Hermes and Qwen: a JSON object with name and arguments between <tool_call> tags.

Qwen2.5, Qwen3 (not Qwen3-Coder), Hermes 2 and 3, and many fine-tunes write

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Oslo"}}
    </tool_call>

Qwen2.5-Coder often leaves the tags out, or writes a block of code instead. So a JSON object with
the name of a tool that begins an answer, alone or in such a block, is a call, too.
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


_BARE = re.compile(r'(?:```(?:json)?\s*)?\{\s*"name"\s*:\s*"', re.ASCII)
_BARE_BEGINNING = re.compile(
    r'(?:`{0,3}|```(?:j|js|jso|json)?\s*)(?:(?<![`jso])\{\s*(?:"|"n|"na|"nam|"name|"name"\s*:?\s*)?)?'
)
_FENCE = re.compile(r"\s*```\s*")


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
        if self._leading is not None:
            self._end_leading()
        return super().finish(complete=complete)

    def _step_bare(self) -> bool:
        """Reads a call without tags; returns whether there may be another."""
        assert self._leading is not None
        text = self._leading.lstrip()
        if not text or _BARE_BEGINNING.fullmatch(text):
            return False
        if not _BARE.match(text):
            self._end_leading()
            return False
        start = text.index("{")
        scan = ObjectScan()
        end = start + scan.feed(text[start:])
        if not scan.done:
            return False
        if (
            start
            and len(text) < end + 8
            and "```" not in text[end:]
            and not text[end:].strip(" \n`")
        ):
            return False  # the end of the block is to come
        try:
            (call,) = self._read(text[start:end])
        except NoCall:
            self._end_leading()
            return False
        self._called(call)
        fence = _FENCE.match(text, end) if start else None
        self._leading = text[end if fence is None else fence.end() :]
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
    arguments = value.get("arguments", value.get("parameters", {}))
    return value.get("name"), loads(arguments) if isinstance(arguments, str) else arguments
