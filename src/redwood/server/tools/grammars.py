"""A grammar for calls: Lark text for llguidance, in which every argument follows its schema."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from redwood.server.tools.formats import ToolFormat

Spelled = Callable[[str], str]
"""From a tag to the expression for it: its token, or else its text."""

_WHITESPACE = r"( |\n[ \t]{0,24})?"


def calls_grammar(
    form: ToolFormat,
    tools: Mapping[str, Mapping[str, Any]],
    spelled: Spelled,
    *,
    opened: bool,
    several: bool,
    answer: Mapping[str, Any] | None = None,
) -> str:
    """Returns a grammar for one or more calls and nothing else.

    Args:
        form: of the calls; it has a `before`.
        tools: name -> schema of the parameters.
        spelled: how tags are written in the grammar.
        opened: the opening tag of the first call has been read already.
        several: whether there may be more than one call.
        answer: a schema: instead of calls there may be JSON that follows it.
    """
    assert form.before is not None
    rules = []
    names = []
    for number, (name, schema) in enumerate(tools.items()):
        pieces = [*_all(form, form.before(name), spelled), f"a{number}"]
        pieces += _all(form, form.after, spelled)
        rules.append(f"t{number}: {' '.join(pieces)}")
        rules.append(f"a{number}: %json {json.dumps(_object(schema))}")
        names.append(f"t{number}")
    rules.append(f"call: {' | '.join(names)}")
    opening = [spelled(form.opening)] if form.opening else []
    first = ([] if opened else opening) + ["call"]
    if several and form.between is not None:
        again = " ".join([*_all(form, form.between, spelled), *opening, "call"])
        first.append(f"({again})*")
    start = " ".join(first)
    if answer is not None:
        start += " | answer"
        rules.append(f"answer: %json {json.dumps(_guided(answer))}")
    return "\n".join([f"start: {start}", *rules])


def _all(form: ToolFormat, pieces: Sequence[str], spelled: Spelled) -> list[str]:
    return [spelled(each) if each in form.tags else json.dumps(each) for each in pieces if each]


def _object(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A schema of parameters; arguments are an object whether it says so or not."""
    return _guided({"type": "object", **schema})


def _guided(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {**schema, "x-guidance": {"whitespace_pattern": _WHITESPACE}}
