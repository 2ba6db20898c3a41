"""Calls that no tag opens: when one has begun, and a grammar for what is left of it.

A call has begun where its tool is named and its arguments come next: what stands there before may
be any answer. Up to there the text is free, so the grammar allows more white space than a call that
must be made has; a text that it does not allow stays free.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from redwood.server.tools.bodies import object_schema
from redwood.server.tools.rules import Fits, Rules, Spelled

_SPACE = r"[ \t\n]{0,8}"
Body = Callable[[Rules, str, Mapping[str, Any]], str]


@dataclass(frozen=True)
class Bare:
    """A form's calls without an opening tag.

    Args:
        begins: a regular expression of an answer's beginning up to the arguments of its first call,
            or, if not `leads`, of its end there; NAMES stands for the names of the tools, as a
            group.
        leads: whether a call begins the answer. The grammar is of the whole answer then, else of
            the arguments of the call, behind which the answer ends.
        before, after: regular expressions of what stands on both sides of the arguments; NAME is
            the name of the tool.
        between: of what stands between two calls.
        around: of what stands before the first and behind the last.
        tags: tokens that may stand before and behind all of it.
    """

    begins: str
    leads: bool = True
    before: str = ""
    after: str = ""
    between: str = _SPACE
    around: tuple[str, str] = (_SPACE, _SPACE)
    tags: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())

    def pattern(self, names: Iterable[str]) -> re.Pattern[bytes]:
        """Returns what a call of one of these tools begins with; group 1 is its name."""
        known = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
        return re.compile(self.begins.replace("NAMES", f"({known})").encode(), re.DOTALL)


def json_object(arguments: str, between: str = _SPACE, tags: tuple[str, ...] = ()) -> Bare:
    """Returns the form of an object with name and arguments, in this order.

    Args:
        arguments: the key of the arguments.
    """
    before = rf'\{{{_SPACE}"name"{_SPACE}:{_SPACE}"NAME"{_SPACE},{_SPACE}"{arguments}"{_SPACE}:'
    before += _SPACE
    opened = "".join(rf"(?:{re.escape(tag)})?" for tag in tags)
    begins = rf"{opened}{_SPACE}{before}".replace("NAME", "NAMES")
    after = rf"{_SPACE}\}}"
    return Bare(begins, before=before, after=after, between=between, tags=(tags, ()))


def python_list(tags: tuple[str, ...], closing: tuple[str, ...]) -> Bare:
    """Returns the form of a list of calls in Python."""
    opened = "".join(rf"(?:{re.escape(tag)})?" for tag in tags)
    return Bare(
        rf"{opened}{_SPACE}\[{_SPACE}NAMES\(",
        before=r"NAME\(",
        after=r"\)",
        between=rf"{_SPACE},{_SPACE}",
        around=(rf"{_SPACE}\[{_SPACE}", rf"{_SPACE}\]{_SPACE}"),
        tags=(tags, closing),
    )


def bare_grammars(
    form: str,
    bare: Bare,
    body: Body | None,
    tools: Mapping[str, Mapping[str, Any]],
    spelled: Spelled,
    fits: Fits,
    *,
    several: bool,
) -> dict[str, str]:
    """Returns the grammar of each tool's call, by name; one for all if calls lead the answer.

    Args:
        body: makes rules for arguments, None: they are JSON.
        spelled, fits: see `Rules`.
        several: whether there may be more than one call.

    Raises:
        ArgumentError: a part of a schema that cannot be kept.
    """
    rules, made = Rules(form, spelled, fits), {}
    calls = []
    for number, (name, schema) in enumerate(tools.items()):
        arguments = f"%json {json.dumps(object_schema(schema))}"
        if body is not None:
            arguments = body(rules, name, schema)
        if not bare.leads:
            made[name] = f"start: a0\na0: {arguments}"
            continue
        rules.put(f"a{number}: {arguments}")
        before = bare.before.replace("NAME", re.escape(name))
        calls.append(f"{_regex(before)} a{number} {_regex(bare.after)}")
    if not bare.leads:
        return made
    rules.put(f"call: {' | '.join(calls)}")
    more = f"({_regex(bare.between)} call)*" if several else ""
    opened, closed = (
        " ".join(f"({spelled(tag)})?" for tag in tags if spelled(tag).startswith("<"))
        for tags in bare.tags
    )
    begin, end = map(_regex, bare.around)
    start = f"start: {opened} {begin} call {more} {end} {closed}"
    return dict.fromkeys(tools, "\n".join([start, *rules.lines]))


def _regex(pattern: str) -> str:
    """A regular expression as it stands in a rule."""
    if pattern == _SPACE:  # no terminal may be empty
        return r"(/[ \t\n]{1,8}/)?"
    return "/" + pattern.replace("/", r"\/") + "/"
