"""The parts of a whole answer, put together."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field

from redwood.server.tools.parts import (
    CallArguments,
    CallEnd,
    CallStart,
    Malformed,
    Part,
    Reasoning,
    Text,
)


@dataclass
class GatheredCall:
    """One call.

    Args:
        name: of the tool.
        arguments: the text of a JSON object, once it is whole.
        whole: whether it is.
    """

    name: str
    arguments: str = ""
    whole: bool = False


@dataclass
class Gathered:
    """What an answer says.

    Args:
        text: with what is no call, though it began like one, and what a cut call holds.
        reasoning: that came before.
        calls: whole ones.
        malformed: `text` and `reason` of what is no call.
    """

    text: str = ""
    reasoning: str = ""
    calls: list[GatheredCall] = field(default_factory=list)
    malformed: list[dict[str, str]] = field(default_factory=list)


CUT = "the answer was cut inside the call"


def gathered(parts: Iterable[Part]) -> Gathered:
    """Returns what the parts of an answer say together; a call that was cut is text, not a call."""
    made = Gathered()
    calls: dict[int, GatheredCall] = {}
    for part in parts:
        match part:
            case Text(text):
                made.text += text
            case Reasoning(text):
                made.reasoning += text
            case Malformed(text, reason):
                made.text += text
                made.malformed.append({"text": text.strip(), "reason": reason})
            case CallStart(index, name):
                calls[index] = GatheredCall(name)
            case CallArguments(index, text):
                calls[index].arguments += text
            case CallEnd(index):
                calls[index].whole = True
    for call in calls.values():
        if call.whole:
            made.calls.append(call)
            continue
        text = f"{call.name} {call.arguments}".strip()
        made.text += "\n" * bool(made.text) + text
        made.malformed.append({"text": text, "reason": CUT})
    return made


def finish_reason(reason: str | None, parts: Iterable[Part]) -> str | None:
    """Returns OpenAI's finish reason for the engine's: "tool_calls" where there is a whole call."""
    if reason == "stop" and any(isinstance(part, CallEnd) for part in parts):
        return "tool_calls"
    return reason


class CallIds:
    """Makes ids of calls: nine letters and digits where a template wants no more."""

    def new(self) -> str:
        """Returns an id that was not there before."""
        return f"call_{secrets.token_hex(12)}"
