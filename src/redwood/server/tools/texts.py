"""Strings of a schema as regular expressions, for forms in which they do not stand as JSON.

What is made may allow less than the schema does, and never more.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from redwood.server.tools.rules import Rules

_LONG = "(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
_SHORT = "(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
_LEAP = "[0-9]{2}(?:0[48]|[2468][048]|[13579][26])-02-29"
_DATE = f"(?:[0-9]{{4}}-(?:{_LONG}|{_SHORT}|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP})"
_TIME = (
    "(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:[.][0-9]{1,9})?"
    "(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
)
_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,30}[A-Za-z0-9])?"
_WORD = "[A-Za-z0-9_+-]{1,16}"
_STEP = "[A-Za-z0-9._~-]{0,64}"
_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "email": rf"{_WORD}(?:[.]{_WORD}){{0,2}}@{_LABEL}(?:[.]{_LABEL}){{1,3}}",
    "hostname": f"{_LABEL}(?:[.]{_LABEL}){{0,4}}",
    "ipv4": f"{_BYTE}(?:[.]{_BYTE}){{3}}",
    "uuid": "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "uri": rf"https?://{_LABEL}(?:[.]{_LABEL}){{0,4}}(?::[0-9]{{1,4}})?(?:/{_STEP}){{0,16}}",
}
_CLASSES = {"d": "0-9", "w": "A-Za-z0-9_", "s": r" \t\n\r"}
_PLAIN_ESCAPES = frozenset(r"\.+*?()[]{}|^$/-tnr")
_ANY = "(?s:.*)"
_MOST_LENGTH = 1 << 16


def lengths(schema: Mapping[str, Any], rules: Rules, where: str) -> tuple[int, int | None]:
    """Returns the least and the largest length of a string; None: any.

    Raises:
        ArgumentError: lengths that are none, or too large to be counted.
    """
    return counts(schema, "Length", _MOST_LENGTH, rules, where)


def counts(
    schema: Mapping[str, Any], what: str, limit: int, rules: Rules, where: str
) -> tuple[int, int | None]:
    """Returns the bounds of a count, `minLength` and `maxLength` for "Length"; None: any.

    Args:
        limit: of what can be counted; a larger bound becomes this one.

    Raises:
        ArgumentError: no whole numbers from 0, the first above the limit.
        NothingFitsError: the first is above the second.
    """
    names = f"min{what}", f"max{what}"
    least, most = (schema.get(name) for name in names)
    for name, value in zip(names, (least, most), strict=True):
        if value is not None and (type(value) is not int or value < 0):
            raise rules.refused(where, f"{name} {value!r}")
    least = least or 0
    if most is not None and most < least:
        raise rules.unfitting(where)
    if least > limit:
        raise rules.refused(where, f"{names[0]} {least}")
    return least, None if most is None else min(most, limit)


def counted(least: int, most: int | None) -> str:
    """A count as it stands behind what is repeated."""
    if most is None:
        return f"{{{least},}}" if least else "*"
    return f"{{{least},{most}}}"


def shaped(schema: Mapping[str, Any], rules: Rules, where: str) -> list[str]:
    """Returns regular expressions for a schema's format and pattern, each for the whole string.

    Raises:
        ArgumentError: one that is not known, or not sure to mean the same everywhere.
    """
    made = []
    if (name := schema.get("format")) is not None:
        if not isinstance(name, str) or name not in _FORMATS:
            raise rules.refused(where, f"format {name!r}")
        made.append(_FORMATS[name].replace("/", r"\/"))
    if (pattern := schema.get("pattern")) is not None:
        body = _whole(pattern) if isinstance(pattern, str) else None
        if body is None:
            raise rules.refused(where, f"pattern {pattern!r}")
        made.append(body)
    return made


def _whole(pattern: str) -> str | None:
    """A pattern for whole strings in which this one is found, in signs that mean one thing in all
    dialects; None: it has others."""
    text = pattern.removeprefix("^")
    ends = text.endswith("$") and not text.endswith("\\$")
    text = text[:-1] if ends else text
    made, place, depth, inside, choice = "", 0, 0, False, False
    while place < len(text):
        sign = text[place]
        place += 1
        if sign == "\\":
            if place == len(text):
                return None
            escaped = text[place]
            place += 1
            if escaped in _CLASSES:
                made += _CLASSES[escaped] if inside else f"[{_CLASSES[escaped]}]"
            elif escaped in _PLAIN_ESCAPES:
                made += "\\" + escaped
            else:
                return None
        elif inside:
            if sign in "[&~" or not sign.isprintable() or text.startswith("--", place - 1):
                return None
            inside = sign != "]"
            made += r"\/" if sign == "/" else sign
        elif sign == "(":
            if text.startswith("?", place):
                if not text.startswith("?:", place):
                    return None
                place += 2
            depth += 1
            made += "(?:"
        elif sign in "^$" or not sign.isprintable() or text.startswith("{,", place - 1):
            return None
        else:
            inside = sign == "["
            if inside and text.startswith("^", place):
                made, place = made + "[^", place + 1
                if text.startswith("]", place):
                    return None
                continue
            choice = choice or (sign == "|" and depth == 0)
            depth -= sign == ")"
            made += r"\/" if sign == "/" else sign
    try:
        re.compile(made)
    except (re.error, OverflowError, RecursionError):
        return None
    if depth or inside:
        return None
    before = "" if choice or pattern.startswith("^") else _ANY
    return f"{before}(?:{made}){'' if choice or ends else _ANY}"
