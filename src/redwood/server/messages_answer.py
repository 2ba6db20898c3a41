"""Answers of /v1/messages: whole, and as events in Anthropic's order; its errors."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from typing import Any

from redwood.server.errors import ApiError, anthropic_body
from redwood.server.framing import named_event
from redwood.server.generation import Event
from redwood.server.messages_request import MessagesRequest
from redwood.server.tools.gathering import CUT
from redwood.server.tools.parts import (
    CallArguments,
    CallEnd,
    CallStart,
    Malformed,
    Part,
    Reasoning,
    Text,
)


def usage_of_message(usage: dict[str, Any]) -> dict[str, Any]:
    """Returns a chat's usage under this API's names; cached tokens are counted apart."""
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": usage["prompt_tokens"] - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": usage["completion_tokens"],
        "redwood": usage["redwood"],
    }


class MessagesAnswer:
    """The answer to one request.

    Args:
        asked: the request.
        model: the name of the model.
        prompt_tokens: of the prompt.
        stopped_by: which stop sequence ended an answer, from its last event.
    """

    def __init__(
        self, asked: MessagesRequest, model: str, prompt_tokens: int, stopped_by: Any
    ) -> None:
        self._stopped_by = stopped_by
        self._asked = asked
        self._prompt_tokens = prompt_tokens
        self._head: dict[str, Any] = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
        }

    def whole(
        self,
        events: Sequence[Sequence[Event]],
        parts: Sequence[Sequence[Part]],
        usage: dict[str, Any],
    ) -> dict[str, Any]:
        """Returns the complete message; a call that was cut is text."""
        blocks = Blocks()
        for part in parts[0]:
            blocks.add(part)
        blocks.close()
        made = {
            **self._head,
            "content": blocks.whole(),
            **self.ending(events[0][-1], blocks),
            "usage": usage_of_message(usage),
        }
        if blocks.malformed:
            made["redwood"] = {"malformed_calls": blocks.malformed}
        return made

    def ending(self, last: Event, blocks: Blocks) -> dict[str, Any]:
        """Returns stop_reason and stop_sequence."""
        if last.finish_reason == "length":
            return {"stop_reason": "max_tokens", "stop_sequence": None}
        if blocks.called:
            return {"stop_reason": "tool_use", "stop_sequence": None}
        stop = self._stopped_by(last)
        return {
            "stop_reason": "end_turn" if stop is None else "stop_sequence",
            "stop_sequence": stop,
        }

    def stream(self) -> MessagesStream:
        """Returns what makes events of it."""
        usage = {"input_tokens": self._prompt_tokens, "output_tokens": 0}
        usage |= {"cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}
        return MessagesStream(self, {**self._head, "usage": usage})


class Blocks:
    """The content of an answer as it grows; each part gives the events that tell of it.

    Attributes: `malformed`: text and reason of what is no call; `called`: there is a whole call.
    """

    def __init__(self) -> None:
        self._made: list[dict[str, Any]] = []
        self._arguments: list[str] = []
        self._whole: set[int] = set()
        self._open: str | None = None
        self.malformed: list[dict[str, str]] = []

    @property
    def called(self) -> bool:
        """Whether there is a whole call."""
        return bool(self._whole)

    def add(self, part: Part) -> list[dict[str, Any]]:
        """Takes a part; returns events."""
        match part:
            case Text(text):
                return self._text("text", text)
            case Reasoning(text):
                return self._text("thinking", text)
            case Malformed(text, reason):
                self.malformed.append({"text": text.strip(), "reason": reason})
                return self._text("text", text)
            case CallStart(_, name):
                block = {"type": "tool_use", "id": f"toolu_{secrets.token_hex(12)}", "name": name}
                return [*self.close(), *self._begin({**block, "input": {}})]
            case CallArguments(_, text):
                self._arguments[-1] += text
                return [self._delta({"type": "input_json_delta", "partial_json": text})]
            case CallEnd():
                self._whole.add(len(self._made) - 1)
                return self.close()

    def close(self) -> list[dict[str, Any]]:
        """Ends the block that is open."""
        if self._open is None:
            return []
        events = []
        if self._open == "thinking":
            events.append(self._delta({"type": "signature_delta", "signature": ""}))
        self._open = None
        return [*events, {"type": "content_block_stop", "index": len(self._made) - 1}]

    def whole(self) -> list[dict[str, Any]]:
        """Returns the content; a call that was cut is text."""
        made = []
        for number, block in enumerate(self._made):
            if block["type"] != "tool_use":
                made.append(block)
            elif number in self._whole:
                made.append({**block, "input": json.loads(self._arguments[number])})
            else:
                text = f"{block['name']} {self._arguments[number]}".strip()
                self.malformed.append({"text": text, "reason": CUT})
                made.append({"type": "text", "text": text})
        return made

    def _text(self, kind: str, text: str) -> list[dict[str, Any]]:
        events = []
        if self._open != kind:
            block = {"type": kind, kind: ""}
            if kind == "thinking":
                block["signature"] = ""
            events = [*self.close(), *self._begin(block)]
            text = text.lstrip("\n")
        self._made[-1][kind] += text
        return [*events, self._delta({"type": f"{kind}_delta", kind: text})]

    def _begin(self, block: dict[str, Any]) -> list[dict[str, Any]]:
        self._open = block["type"]
        self._made.append(block)
        self._arguments.append("")
        index = len(self._made) - 1
        return [{"type": "content_block_start", "index": index, "content_block": dict(block)}]

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": len(self._made) - 1, "delta": delta}


class MessagesStream:
    """Makes events of an answer as it comes."""

    def __init__(self, answer: MessagesAnswer, head: dict[str, Any]) -> None:
        self._answer, self._head = answer, head
        self._blocks = Blocks()
        self._begun = False
        self._ending: dict[str, Any] = {}

    def step(self, event: Event, parts: Sequence[Part]) -> list[bytes]:
        """Returns the events of one step."""
        made: list[dict[str, Any]] = []
        if not self._begun:
            self._begun = True
            made = [{"type": "message_start", "message": self._head}, {"type": "ping"}]
        for part in parts:
            made += self._blocks.add(part)
        if event.finish_reason is not None:
            made += self._blocks.close()
            self._ending = self._answer.ending(event, self._blocks)
        return [named_event(each["type"], each) for each in made]

    def end(self, usage: dict[str, Any]) -> list[bytes]:
        """Returns the last events."""
        last: dict[str, Any] = {"type": "message_delta", "delta": self._ending}
        last["usage"] = usage_of_message(usage)
        if self._blocks.malformed:
            last["redwood"] = {"malformed_calls": self._blocks.malformed}
        return [named_event(e["type"], e) for e in (last, {"type": "message_stop"})]

    def failed(self, error: ApiError) -> bytes:
        """Returns the event of an error in mid-stream."""
        return named_event("error", anthropic_body(error))
