"""What every API makes of an answer: a whole body, or events."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # a router frames its errors, and loads no engine
    from redwood.server.errors import ApiError
    from redwood.server.generation import Event
    from redwood.server.tools.parts import Part


class Stream(Protocol):
    """Makes server-sent events of one answer."""

    def step(self, event: Event, parts: Sequence[Part]) -> list[bytes]:
        """Returns the events of one step of one choice, encoded; none if nothing is to be said."""
        ...

    def end(self, usage: dict[str, Any]) -> list[bytes]:
        """Returns the last events."""
        ...

    def failed(self, error: ApiError) -> bytes:
        """Returns the event of an error in mid-stream, which is the last."""
        ...


class Frame(Protocol):
    """What stands around one answer."""

    def whole(
        self,
        events: Sequence[Sequence[Event]],
        parts: Sequence[Sequence[Part]],
        usage: dict[str, Any],
    ) -> dict[str, Any]:
        """Returns the body, from the events of each choice and the parts of their texts."""
        ...

    def stream(self) -> Stream:
        """Returns what makes events instead."""
        ...


def named_event(name: str, value: dict[str, Any]) -> bytes:
    """Returns a value as an event with a name."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return f"event: {name}\ndata: {text}\n\n".encode()
