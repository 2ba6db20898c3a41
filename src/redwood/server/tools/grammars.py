"""A grammar for calls: Lark text for llguidance, in which every argument follows its schema."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from redwood.server.tools.bodies import guided, object_schema
from redwood.server.tools.formats import ToolFormat
from redwood.server.tools.rules import Fits, Rules, Spelled, quoted


def calls_grammar(
    form: ToolFormat,
    tools: Mapping[str, Mapping[str, Any]],
    spelled: Spelled,
    fits: Fits,
    *,
    opened: bool,
    several: bool,
    answer: Mapping[str, Any] | None = None,
) -> str:
    """Returns a grammar for one or more calls and nothing else.

    Args:
        form: of the calls.
        tools: name -> schema of the parameters.
        spelled: how tags are written in the grammar.
        fits: see `Rules`.
        opened: the opening tag of the first call has been read already.
        several: whether there may be more than one call.
        answer: a schema: instead of calls there may be JSON that follows it.

    Raises:
        ArgumentError: a part of a schema that the form has no way to keep; too large a grammar;
            an argument without which there is no call, and that nothing fits.
    """
    rules = Rules(form.name, spelled, fits)
    names = []
    for number, (name, schema) in enumerate(tools.items()):
        made = f"%json {json.dumps(object_schema(schema))}"
        if form.body is not None:
            made = form.body(rules, name, schema)
        pieces = [*_all(form, form.before(name), spelled), f"a{number}"]
        pieces += _all(form, form.after, spelled)
        rules.put(f"t{number}: {' '.join(pieces)}")
        rules.put(f"a{number}: {made}")
        names.append(f"t{number}")
    rules.put(f"call: {' | '.join(names)}")
    opening = [spelled(form.opening)] if form.opening else []
    first = ([] if opened else opening) + ["call"]
    if several and form.between is not None:
        again = " ".join([*_all(form, form.between, spelled), *opening, "call"])
        first.append(f"({again})*")
    begin, end = (_all(form, [each], spelled) for each in form.around)
    start = " ".join([*begin, *first, *end])
    if answer is not None:
        start += " | " + " ".join([*_all(form, form.before_answer, spelled), "answer"])
        rules.put(f"answer: %json {json.dumps(guided(answer))}")
    if form.reasoning is not None:
        start = f"{form.reasoning(rules)} ({start})"
    return "\n".join([f"start: {start}", *rules.lines])


def _all(form: ToolFormat, pieces: Sequence[str], spelled: Spelled) -> list[str]:
    return [spelled(each) if each in form.tags else quoted(each) for each in pieces if each]
