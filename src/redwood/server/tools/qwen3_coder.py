"""Qwen3-Coder (and Qwen3.5): a function and its parameters, each between tags of its own.

    <tool_call>
    <function=get_weather>
    <parameter=city>
    Oslo
    </parameter>
    </function>
    </tool_call>

Values stand as they are: text where the schema says string, else JSON. The outer tags are often
left out, so that the function's are what counts.
"""

from __future__ import annotations

import json
import re
from typing import Any

from redwood.server.tools.parser import Call, NoCall, Schemas, TaggedParser

_NAME = re.compile(r"\s*([^>\s]*)\s*>")
_PARAMETER = re.compile(r"\s*<parameter=([^>]*)>")
_CLOSE = "</parameter>"


class Qwen3CoderParser(TaggedParser):
    """See the module."""

    opening, closing = "<function=", "</function>"
    others = ("<tool_call>", "</tool_call>")

    def _read(self, body: str) -> list[Call]:
        found = _NAME.match(body)
        if found is None:
            raise NoCall("the call has no name")
        name, place = found.group(1), found.end()
        properties = properties_of(self._tools, name)
        arguments: dict[str, Any] = {}
        while (opened := _PARAMETER.match(body, place)) is not None:
            end = body.find(_CLOSE, opened.end())
            if end < 0:
                raise NoCall("a parameter has no end")
            key = opened.group(1).strip()
            arguments[key] = _value(body[opened.end() : end], properties.get(key))
            place = end + len(_CLOSE)
        if body[place:].strip():
            raise NoCall("there is text between the parameters")
        return [self._checked(name, arguments)]

    def _open_string(self, body: str) -> bool:
        return body.rfind("<parameter=") > body.rfind(_CLOSE)


def properties_of(tools: Schemas, name: str) -> dict[str, Any]:
    """Returns the schemas of a tool's parameters; of none for a tool there is not."""
    properties = tools.get(name, {}).get("properties", {})
    return properties if isinstance(properties, dict) else {}


def takes_text(schema: Any) -> bool:
    """Whether a value of this schema is a string as it stands."""
    if not isinstance(schema, dict):
        return False
    if "type" in schema:
        return bool(schema["type"] == "string")
    choices = schema.get("enum", [schema["const"]] if "const" in schema else [])
    return bool(choices) and all(isinstance(each, str) for each in choices)


def _value(text: str, schema: Any) -> Any:
    text = text.removeprefix("\n").removesuffix("\n")
    if takes_text(schema):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
