"""What an answer is made of, in the order in which it comes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """A piece of the answer that the user reads."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """A piece of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True)
class CallStart:
    """A call begins.

    Args:
        index: of the call in the answer, from 0.
        name: of the tool, whole.
    """

    index: int
    name: str


@dataclass(frozen=True)
class CallArguments:
    """A piece of a call's arguments.

    Args:
        index: of the call.
        text: all pieces of a call together are the text of a JSON object.
    """

    index: int
    text: str


@dataclass(frozen=True)
class CallEnd:
    """A call is whole: its arguments are a JSON object. A call without one was cut.

    Args:
        index: of the call.
    """

    index: int


@dataclass(frozen=True)
class Malformed:
    """What began like a call and is none. It reaches the client as text.

    Args:
        text: what the model wrote, without the tags around it.
        reason: what is wrong with it, in a few words, fit for the client.
    """

    text: str
    reason: str


Part = Text | Reasoning | CallStart | CallArguments | CallEnd | Malformed
