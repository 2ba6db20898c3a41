"""HTTP as it comes in: what is none at all gets an error of the same shape as all others."""

from __future__ import annotations

import json

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from redwood.server.errors import wrong


class Parser(H11Protocol):
    """uvicorn's protocol on h11."""

    def send_400_response(self, msg: str) -> None:
        """Answers bytes that are no HTTP, and closes; called by uvicorn, which has logged them.

        Where an answer has begun, a second one would be read as a part of it.
        """
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            data = json.dumps(wrong("this is no HTTP/1.1", code="invalid_http").body).encode()
            headers = {
                "content-type": "application/json",
                "content-length": str(len(data)),
                "connection": "close",
            }
            head = h11.Response(
                status_code=400, headers=list(headers.items()), reason=b"Bad Request"
            )
            for event in (head, h11.Data(data=data), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
