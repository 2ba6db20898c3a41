"""HTTP parsing: invalid HTTP and too many connections get errors in OpenAI's shape."""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from redwood.server.connections import Guard
from redwood.server.errors import ApiError, wrong


class Parser(H11Protocol):
    """uvicorn's h11 protocol.

    Args:
        guard: bounds the number of connections.
        more: arguments of uvicorn's class.
    """

    def __init__(self, guard: Guard, **more: Any) -> None:
        super().__init__(**more)
        self._guard = guard

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Called by the event loop."""
        super().connection_made(transport)
        error = self._guard.came(self)
        if error is not None:
            self._answer(error)
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the event loop."""
        self._guard.went(self)
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answers invalid HTTP and closes the connection; called by uvicorn, which has logged it.

        Nothing is sent if a response has begun: it would be read as a part of that response.
        """
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._answer(wrong("this is no HTTP/1.1", code="invalid_http"))
        self.transport.close()

    def _answer(self, error: ApiError) -> None:
        data = json.dumps(error.body).encode()
        headers = {
            "content-type": "application/json",
            "content-length": str(len(data)),
            "connection": "close",
            **error.headers,
        }
        reason = HTTPStatus(error.status).phrase.encode()
        head = h11.Response(status_code=error.status, headers=list(headers.items()), reason=reason)
        for event in (head, h11.Data(data=data), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
