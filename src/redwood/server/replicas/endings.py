"""How a stream ends, API by API: its last event, and the event of an error.

The router reads no more of a stream than this: the engines have framed it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from starlette.types import Message

from redwood.server.errors import ApiError, anthropic_body, responses_event
from redwood.server.framing import named_event
from redwood.server.responses import ANTHROPIC, CODE_HEADER
from redwood.server.streaming import DONE

RESPONSES = "/v1/responses"
_LAST = re.compile(
    rb"event: (?:message_stop|response\.(?:completed|incomplete|failed)|error)\ndata: [^\n]*\n\n\Z"
)
_NUMBER = re.compile(rb'"sequence_number": ?(\d+)')


class Ending:
    """Follows one stream.

    Args:
        path: of the request.
        request_id: likewise.

    Attributes: `seen`: the last event, also that of an error, has passed.
    """

    def __init__(self, path: str, request_id: str) -> None:
        self._path, self._request_id = path, request_id
        self._number = 0  # of the next event of /v1/responses
        self.seen = False

    def follow(self, body: bytes) -> None:
        """Takes bytes that pass: one event or several, whole."""
        named = self._path.startswith((ANTHROPIC, RESPONSES))
        if named and self._path.startswith(RESPONSES):
            # an event's own number stands last in it, behind all texts
            tails = [event[-64:] for event in body.split(b"\n\n")]
            found = [int(match[-1]) for tail in tails if (match := _NUMBER.findall(tail))]
            self._number = max([self._number, *(number + 1 for number in found)])
        self.seen = self.seen or (_LAST.search(body) is not None if named else body.endswith(DONE))

    def failed(self, error: ApiError) -> bytes:
        """Returns the event of an error, in the shape of the API that was called."""
        if self._path.startswith(ANTHROPIC):
            return named_event("error", anthropic_body(error, self._request_id))
        if self._path.startswith(RESPONSES):
            return named_event("error", responses_event(error, self._number))
        return error.event

    def refused(self, status: int, body: bytes) -> bytes:
        """Returns an engine's refusal, a whole body, as an event of a stream that has begun."""
        if self._path.startswith(ANTHROPIC):
            return b"event: error\ndata: " + body + b"\n\n"
        if self._path.startswith(RESPONSES):
            said = _said(body)
            message, code = str(said.get("message", "")), str(said.get("code", ""))
            return self.failed(ApiError(status, message, code=code, param=said.get("param")))
        return b"data: " + body + b"\n\n"


def code_of(start: Message, body: bytes) -> str:
    """Returns the code of an engine's error, "" if it has none."""
    for name, value in start["headers"]:
        if name == CODE_HEADER.encode():
            return str(value.decode("latin-1"))
    return str(_said(body).get("code", ""))


def _said(body: bytes) -> Mapping[str, Any]:
    """What an error in OpenAI's shape says."""
    with suppress(ValueError, KeyError, TypeError):
        said = json.loads(body)["error"]
        if isinstance(said, dict):
            return said
    return {}
