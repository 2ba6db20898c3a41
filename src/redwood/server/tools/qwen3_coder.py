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

_NAME = re.compile(r"\s*(?:([^>\s]+)\s*)?>")  # of long runs of spaces, too, in one go
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
        name, place = found.group(1) or "", found.end()
        properties = properties_of(self._tools, name)
        arguments: dict[str, Any] = {}
        while (opened := _PARAMETER.match(body, place)) is not None:
            key, start = opened.group(1).strip(), opened.end()
            end = self._end_of_value(body, start, properties.get(key))
            if end < 0:
                raise NoCall("a parameter has no end")
            arguments[key] = _value(body[start:end], properties.get(key))
            place = end + len(_CLOSE)
        if body[place:].strip():
            raise NoCall("there is text between the parameters")
        return [self._checked(name, arguments)]

    def _open_string(self, body: str) -> bool:
        if body.rfind("<parameter=") > body.rfind(_CLOSE):
            return True
        found = _NAME.match(body)
        if found is None or not self._eager:
            return False
        properties, place = properties_of(self._tools, found.group(1) or ""), found.end()
        while (opened := _PARAMETER.match(body, place)) is not None:
            schema = properties.get(opened.group(1).strip())
            end = self._end_of_value(body, opened.end(), schema)
            if end < 0:
                return True
            place = end + len(_CLOSE)
        return False

    def _end_of_value(self, body: str, start: int, schema: Any) -> int:
        """Where the closing tag of a value begins, which a string in JSON may hold; -1: there
        is none, or none yet."""
        if not takes_text(schema):
            place = start + len(body[start:]) - len(body[start:].lstrip())
            try:
                _, end = _JSON.raw_decode(body, place)
            except (ValueError, RecursionError):
                end = -1
            if end >= 0 and (closed := _CLOSED.match(body, end)) is not None:
                return closed.end() - len(_CLOSE)
            if self._eager:  # a grammar has made it: it is JSON, and goes on
                return -1
        return body.find(_CLOSE, start)


_JSON = json.JSONDecoder()
_CLOSED = re.compile(r"\s*" + _CLOSE)


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
    return (
        isinstance(choices, list)
        and bool(choices)
        and all(isinstance(each, str) for each in choices)
    )


def _value(text: str, schema: Any) -> Any:
    text = text.removeprefix("\n").removesuffix("\n")
    if takes_text(schema):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
