"""Whether a value fits a JSON schema: the keywords that the tests use, written anew; and random
walks through a grammar."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

import torch

_TYPES: dict[str, Any] = {
    "string": lambda v: isinstance(v, str),
    "boolean": lambda v: isinstance(v, bool),
    "null": lambda v: v is None,
    "integer": lambda v: type(v) is int or (isinstance(v, float) and v.is_integer()),
    "number": lambda v: type(v) in (int, float),
    "array": lambda v: isinstance(v, list),
    "object": lambda v: isinstance(v, dict),
}
_FORMATS = {
    "date": r"\d{4}-\d\d-\d\d",
    "email": r"[^@\s]+@[^@\s]+\.[^@\s]+",
    "uuid": r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}",
}


def fits(value: Any, schema: Any, root: Any = None) -> bool:
    """Whether it does; an unknown keyword is an error."""
    root = schema if root is None else root
    if isinstance(schema, bool):
        return schema
    return all(_keeps(value, name, each, schema, root) for name, each in schema.items())


def _keeps(value: Any, name: str, want: Any, schema: Any, root: Any) -> bool:
    size = len(value) if isinstance(value, str | list | dict) else 0
    number = type(value) in (int, float)
    match name:
        case "type":
            return any(_TYPES[kind](value) for kind in (want if isinstance(want, list) else [want]))
        case "enum":
            return any(value == each and type(value) is type(each) for each in want)
        case "const":
            return bool(value == want)
        case "anyOf":
            return any(fits(value, each, root) for each in want)
        case "oneOf":
            return sum(fits(value, each, root) for each in want) == 1
        case "$ref":
            at = root
            for step in want[2:].split("/"):
                at = at[step]
            return fits(value, at, root)
        case "minLength":
            return not isinstance(value, str) or size >= want
        case "maxLength":
            return not isinstance(value, str) or size <= want
        case "pattern":
            return not isinstance(value, str) or re.search(want, value) is not None
        case "format":
            return not isinstance(value, str) or re.fullmatch(_FORMATS[want], value) is not None
        case "minimum":
            return not number or value >= want
        case "maximum":
            return not number or value <= want
        case "minItems":
            return not isinstance(value, list) or size >= want
        case "maxItems":
            return not isinstance(value, list) or size <= want
        case "items":
            return not isinstance(value, list) or all(fits(each, want, root) for each in value)
        case "prefixItems":
            return all(fits(a, b, root) for a, b in zip(value, want, strict=False))
        case "properties":
            named = [(value[key], each) for key, each in want.items() if key in value]
            return all(fits(member, each, root) for member, each in named)
        case "required":
            return all(key in value for key in want)
        case "additionalProperties":
            rest = [each for key, each in value.items() if key not in schema.get("properties", {})]
            return all(fits(each, want, root) for each in rest)
        case "minProperties":
            return size >= want
        case "maxProperties":
            return size <= want
        case "$defs" | "description":
            return True
    raise AssertionError(f"unknown keyword {name}")


def walked(
    rng: random.Random,
    processor: Any,
    tokenizer: Any,
    closers: Sequence[str],
    eos: int,
    most: int,
    start: Sequence[int] = (),
) -> list[int] | None:
    """A random text of a grammar, None if it did not end within `most` tokens.

    Args:
        closers: texts that end values, tried more often than chance would.
        start: tokens of the text that are there already.
    """
    text = list(start)
    width = len(tokenizer)
    while len(text) < most:
        if rng.random() < 0.3 + len(text) / most:
            path = tokenizer(rng.choice(closers), add_special_tokens=False)["input_ids"]
            if processor.accepts(text, path) == len(path):
                text += path
                continue
        row = processor(torch.tensor([text], dtype=torch.long), torch.zeros(1, width))[0]
        allowed = torch.nonzero(row > -torch.inf)[:, 0].tolist()
        if eos in allowed and (len(allowed) == 1 or rng.random() < 0.5):
            return text
        text.append(rng.choice([token for token in allowed if token != eos]))
    return None
