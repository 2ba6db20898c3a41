"""Answers of /v1/responses: whole, and as events in OpenAI's order."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from redwood.server.errors import ApiError, responses_event
from redwood.server.framing import named_event
from redwood.server.generation import Event
from redwood.server.responses_request import NamedChoice, ResponsesRequest
from redwood.server.tools.parts import (
    CallArguments,
    CallEnd,
    CallStart,
    Malformed,
    Part,
    Reasoning,
    Text,
)


def _id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(24)}"


def usage_of_response(usage: dict[str, Any]) -> dict[str, Any]:
    """Returns a chat's usage under this API's names."""
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {
            "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
        },
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {
            "reasoning_tokens": usage["completion_tokens_details"]["reasoning_tokens"],
        },
        "total_tokens": usage["total_tokens"],
        "redwood": usage["redwood"],
    }


class ResponsesAnswer:
    """The answer to one request.

    Args:
        asked: the request, whose settings the answer repeats.
        model: the name of the model.
    """

    def __init__(self, asked: ResponsesRequest, model: str) -> None:
        self._head = _head(asked, model)

    def whole(
        self,
        events: Sequence[Sequence[Event]],
        parts: Sequence[Sequence[Part]],
        usage: dict[str, Any],
    ) -> dict[str, Any]:
        """Returns the complete response."""
        items = Items()
        for part in parts[0]:
            items.add(part)
        items.close()
        cut = events[0][-1].finish_reason == "length"
        return finished(self._head, items, usage, cut=cut)

    def stream(self) -> ResponsesStream:
        """Returns what makes events of it."""
        return ResponsesStream(self._head)


def _head(asked: ResponsesRequest, model: str) -> dict[str, Any]:
    choice: Any = asked.tool_choice
    wanted = asked.text.format.model_dump(by_alias=True, exclude_none=True)
    tools = [
        {
            "type": "function",
            "name": tool.name,
            "description": tool.description,
            "parameters": tool.parameters,
            "strict": tool.strict,
        }
        for tool in asked.tools
    ]
    return {
        "id": _id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "instructions": asked.instructions,
        "max_output_tokens": asked.max_output_tokens,
        "metadata": {},
        "model": model,
        "output": [],
        "parallel_tool_calls": asked.parallel_tool_calls,
        "previous_response_id": None,
        "reasoning": {"effort": asked.reasoning.effort, "summary": None},
        "store": False,
        "temperature": asked.temperature,
        "text": {"format": wanted},
        "tool_choice": choice.model_dump() if isinstance(choice, NamedChoice) else choice,
        "tools": tools,
        "top_p": asked.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": None,
    }


def finished(
    head: dict[str, Any], items: Items, usage: dict[str, Any], *, cut: bool
) -> dict[str, Any]:
    """Returns the response at its end."""
    made = {
        **head,
        "status": "incomplete" if cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "output": items.made,
        "usage": usage_of_response(usage),
    }
    if items.malformed:
        made["redwood"] = {"malformed_calls": items.malformed}
    return made


class Items:
    """The items of an answer as they grow; each part gives the events that tell of it.

    Attributes: `made` so far; `malformed`: text and reason of what is no call.
    """

    def __init__(self) -> None:
        self.made: list[dict[str, Any]] = []
        self.malformed: list[dict[str, str]] = []
        self._kind: str | None = None  # of the item that is open

    def add(self, part: Part) -> list[dict[str, Any]]:
        """Takes a part; returns events without numbers."""
        match part:
            case Text(text):
                return self._text("message", text)
            case Reasoning(text):
                return self._text("reasoning", text)
            case Malformed(text, reason):
                self.malformed.append({"text": text.strip(), "reason": reason})
                return self._text("message", text)
            case CallStart(_, name):
                return self._call(name)
            case CallArguments(_, text):
                self._item["arguments"] += text
                return [self._event("function_call_arguments.delta", delta=text)]
            case CallEnd():
                return self._close("completed")

    def close(self) -> list[dict[str, Any]]:
        """Ends the item that is open; a call that is open here was cut."""
        return self._close("incomplete" if self._kind == "function_call" else "completed")

    def _close(self, status: str) -> list[dict[str, Any]]:
        if self._kind is None:
            return []
        kind, item, self._kind = self._kind, self._item, None
        events = []
        if kind == "function_call":
            arguments = {"arguments": item["arguments"], "name": item["name"]}
            if status == "completed":
                events.append(self._event("function_call_arguments.done", **arguments))
        else:
            part = item["content"][0]
            name = "output_text" if kind == "message" else "reasoning_text"
            done = self._event(f"{name}.done", content_index=0, text=part["text"])
            if kind == "message":
                done["logprobs"] = []
            events = [done, self._event("content_part.done", content_index=0, part=dict(part))]
        item["status"] = status
        return [*events, self._item_event("output_item.done")]

    @property
    def _item(self) -> dict[str, Any]:
        return self.made[-1]

    def _text(self, kind: str, text: str) -> list[dict[str, Any]]:
        events = []
        if self._kind != kind:
            events = [*self.close(), *self._begin(kind)]
            text = text.lstrip("\n")
        self._item["content"][0]["text"] += text
        name = "output_text" if kind == "message" else "reasoning_text"
        delta = self._event(f"{name}.delta", content_index=0, delta=text)
        if kind == "message":
            delta["logprobs"] = []
        return [*events, delta]

    def _begin(self, kind: str) -> list[dict[str, Any]]:
        part: dict[str, Any] = {"type": "reasoning_text", "text": ""}
        item: dict[str, Any] = {"id": _id("rs"), "type": "reasoning", "summary": []}
        if kind == "message":
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            item = {"id": _id("msg"), "type": "message", "role": "assistant"}
        self._kind = kind
        self.made.append({**item, "content": [], "status": "in_progress"})
        added = self._item_event("output_item.added")
        self._item["content"] = [part]
        return [added, self._event("content_part.added", content_index=0, part=dict(part))]

    def _call(self, name: str) -> list[dict[str, Any]]:
        events = self.close()
        self._kind = "function_call"
        self.made.append(
            {
                "id": _id("fc"),
                "type": "function_call",
                "call_id": f"call_{secrets.token_hex(12)}",
                "name": name,
                "arguments": "",
                "status": "in_progress",
            }
        )
        return [*events, self._item_event("output_item.added")]

    def _event(self, kind: str, **more: Any) -> dict[str, Any]:
        place = {"item_id": self._item["id"], "output_index": len(self.made) - 1}
        return {"type": f"response.{kind}", **place, **more}

    def _item_event(self, kind: str) -> dict[str, Any]:
        index = len(self.made) - 1
        return {"type": f"response.{kind}", "output_index": index, "item": dict(self._item)}


class ResponsesStream:
    """Makes events of an answer as it comes."""

    def __init__(self, head: dict[str, Any]) -> None:
        self._head, self._items = head, Items()
        self._number = 0
        self._cut = False

    def step(self, event: Event, parts: Sequence[Part]) -> list[bytes]:
        """Returns the events of one step."""
        made = []
        if not self._number:
            made = [self._of_response("created"), self._of_response("in_progress")]
        for part in parts:
            made += map(self._numbered, self._items.add(part))
        if event.finish_reason is not None:
            self._cut = event.finish_reason == "length"
            made += map(self._numbered, self._items.close())
        return made

    def end(self, usage: dict[str, Any]) -> list[bytes]:
        """Returns the last event, with the whole response."""
        response = finished(self._head, self._items, usage, cut=self._cut)
        return [self._of_response(response["status"], response)]

    def failed(self, error: ApiError) -> bytes:
        """Returns the event of an error in mid-stream."""
        return self._numbered(responses_event(error, self._number))

    def _of_response(self, kind: str, response: dict[str, Any] | None = None) -> bytes:
        return self._numbered({"type": f"response.{kind}", "response": response or self._head})

    def _numbered(self, event: dict[str, Any]) -> bytes:
        event = {**event, "sequence_number": self._number}
        self._number += 1
        return named_event(event["type"], event)
