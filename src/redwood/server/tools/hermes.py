"""Hermes and Qwen: a JSON object with name and arguments between <tool_call> tags.

Qwen2.5, Qwen3 (not Qwen3-Coder), Hermes 2 and 3, and many fine-tunes write

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Oslo"}}
    </tool_call>
"""

from __future__ import annotations

import json
import re

from redwood.server.tools.json_text import is_string_open
from redwood.server.tools.parser import Call, NoCall, TaggedParser, loads

HEAD = re.compile(
    r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)


class HermesParser(TaggedParser):
    """See the module."""

    opening, closing = "<tool_call>", "</tool_call>"

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
