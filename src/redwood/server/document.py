"""What /openapi.json says about routes: their bodies and the errors that each may return."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from redwood.server import schema
from redwood.server.fields import IGNORED, OF_CHATS, REFUSED
from redwood.server.messages_request import CountRequest, MessagesRequest
from redwood.server.responses_request import ResponsesRequest

ANTHROPIC_ERROR = "AnthropicError"
Responses = dict[int | str, dict[str, Any]]
_SCHEMAS = "#/components/schemas/"
_MEANINGS = {
    400: "The request is wrong; `param` names the field.",
    401: "A valid API key is needed.",
    403: "Without keys, only Host headers that mean this machine are served.",
    404: "There is no such model.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body does not say that it is JSON.",
    429: "The queue is full, or the request waited too long in it.",
    500: "The server failed.",
    503: "The server is stopping, or the engine cannot answer now.",
    504: "The request took too long.",
}
_OPEN = (400, 403, 413, 500)  # of every route, also of those that need no key
_LATER = (429, 503)  # with a Retry-After header
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}

_THEIRS = {
    "type": "object",
    "required": ["type", "error", "request_id"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
        "request_id": {"type": "string"},
    },
}


def route_responses(
    *statuses: int, key: bool = True, kinds: tuple[str, ...] = (), error: str = "Error"
) -> Responses:
    """Returns the `responses` of a route: these statuses, and those that every route has.

    Args:
        key: the route needs an API key.
        kinds: media types of the 200, where it is not only JSON.
    """
    found: Responses = {}
    if kinds:
        # A stream of events is neither a string nor a JSON value: its schema is left open.
        contents = {kind: {"schema": _TEXT if kind == "text/plain" else {}} for kind in kinds}
        found[200] = {"description": "Successful Response", "content": contents}
    for status in sorted({*_OPEN, *statuses, *([401] if key else [])}):
        content = {"application/json": {"schema": {"$ref": f"{_SCHEMAS}{error}"}}}
        found[status] = {"description": _MEANINGS[status], "content": content}
        if status in _LATER:
            found[status]["headers"] = {"Retry-After": {"schema": {"type": "integer"}}}
    return found


_TEXT = {"type": "string"}


def body_of(model: type[BaseModel]) -> dict[str, Any]:
    """Returns the `requestBody` of a route, which parses its body itself."""
    content = {"application/json": {"schema": {"$ref": f"{_SCHEMAS}{model.__name__}"}}}
    return {"requestBody": {"required": True, "content": content}}


def _with_accepted_fields(described: dict[str, Any]) -> dict[str, Any]:
    """A body's schema with what `fields` accepts too: nulls, ignored fields, neutral values."""
    given, required = described["properties"], described.get("required", [])
    fields: dict[str, Any] = {
        name: each if name in required else {"anyOf": [each, {"type": "null"}]}
        for name, each in given.items()
    }
    chat = "messages" in given
    for name, (neutral, why) in {**REFUSED, **({} if chat else OF_CHATS)}.items():
        fields[name] = {"enum": [*neutral, None], "description": f"Any other value: {why}."}
    fields |= {name: {"description": "Ignored."} for name in sorted(IGNORED)}
    return {**described, "properties": fields}


def complete(app: FastAPI) -> None:
    """Adds the schemas that routes refer to; to be called when all routes are there."""
    found: dict[str, Any] = {"Error": _ERROR, ANTHROPIC_ERROR: _THEIRS}
    for model in (schema.ChatRequest, schema.CompletionRequest):
        described = model.model_json_schema(ref_template=_SCHEMAS + "{model}")
        found |= described.pop("$defs", {})
        found[model.__name__] = _with_accepted_fields(described)
    for other in (ResponsesRequest, MessagesRequest, CountRequest):
        described = other.model_json_schema(ref_template=_SCHEMAS + "{model}")
        found |= described.pop("$defs", {})
        found[other.__name__] = described
    made = app.openapi()  # FastAPI keeps it
    for operations in made["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)  # FastAPI's own; ours return 400
    made.setdefault("components", {})["schemas"] = found
