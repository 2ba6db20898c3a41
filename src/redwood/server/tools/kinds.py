"""The types of JSON schema: their keywords, which a value is of, whether schemas share a value."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from redwood.errors import ArgumentError

_OF_STRINGS = ("minLength", "maxLength", "pattern", "format")
OF_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_OF_LISTS = ("items", "prefixItems", "minItems", "maxItems", "unevaluatedItems")
_OF_OBJECTS = (
    "properties",
    "required",
    "additionalProperties",
    "minProperties",
    "maxProperties",
    "unevaluatedProperties",
)
KEYWORDS: Mapping[str, Sequence[str]] = {
    "string": _OF_STRINGS,
    "number": OF_NUMBERS,
    "integer": OF_NUMBERS,
    "array": _OF_LISTS,
    "object": _OF_OBJECTS,
    "boolean": (),
    "null": (),
}
"""What speaks of values of each type."""
_MOST_OPTIONAL = 450
"""Members that may be left out: the parser follows four ways for each, and has 2000."""


def check_width(schema: Any, field: str) -> None:
    """Raises ArgumentError where an object of a schema has too many members that may be left out.

    Args:
        field: of the request, for the error.
    """
    waiting = [schema]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            properties, needed = value.get("properties"), value.get("required")
            if isinstance(properties, dict):
                names = set(map(str, needed)) if isinstance(needed, list) else set()
                if len(properties.keys() - names) > _MOST_OPTIONAL:
                    raise ArgumentError(
                        f"{field}: an object has more than {_MOST_OPTIONAL} optional properties"
                    )
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def spoken_of(schema: Mapping[str, Any]) -> str | None:
    """Returns the type that a schema's keywords speak of, where it names none."""
    return next((k for k, names in KEYWORDS.items() if any(n in schema for n in names)), None)


def listed_kinds(kinds: Any) -> list[Any]:
    """Returns the types that a schema's `type` names."""
    return kinds if isinstance(kinds, list) else [kinds]


def kinds_of(value: Any) -> list[str]:
    """Returns the types that a value is of."""
    match value:
        case None:
            return ["null"]
        case bool():
            return ["boolean"]
        case int():
            return ["integer", "number"]
        case float():
            return ["number", *(["integer"] if value.is_integer() else [])]
        case str():
            return ["string"]
        case list():
            return ["array"]
    return ["object"]


def apart(parts: Sequence[Any]) -> bool:
    """Returns whether no value fits two of these schemas: types differ, or each has values of its
    own."""
    seen = set[str]()
    fixed = all(isinstance(part, dict) and {"const", "enum"} & part.keys() for part in parts)
    for part in parts:
        if not isinstance(part, dict) or not (fixed or "type" in part):
            return False
        if fixed:
            values = [part["const"]] if "const" in part else part["enum"]
            mine = {json.dumps(_plain(value), sort_keys=True) for value in values}
        else:
            mine = set(map(str, listed_kinds(part["type"])))
            mine |= {"integer"} if "number" in mine else set()
        if not mine or mine & seen:
            return False
        seen |= mine
    return True


def _plain(value: Any) -> Any:
    """A value as JSON schema compares it: 1.0 is 1."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
