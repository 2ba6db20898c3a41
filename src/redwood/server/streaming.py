"""Server-sent events: keep-alive comments on a silent stream, an end when the client leaves."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import AbstractContextManager, aclosing
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from redwood.server.errors import ApiError, as_api_error

DONE = b"data: [DONE]\n\n"
_PING = b": ping\n\n"
_PADDED_TO = 256
log = logging.getLogger("redwood.server")
T = TypeVar("T")


class ClientLeft(Exception):
    """Nobody waits for the answer any more: the connection is closed, or nothing is read from it.

    Args:
        reason: "disconnect" or "slow_client".
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def event(value: dict[str, Any], *, padded: bool = False) -> bytes:
    """Returns a value as an event.

    Args:
        padded: with a field `obfuscation` that rounds its length up, so that who sees only lengths
            learns little about the tokens in it.
    """
    if padded:
        length = len(json.dumps({**value, "obfuscation": ""}))
        value = {**value, "obfuscation": secrets.token_hex(_PADDED_TO)[: -length % _PADDED_TO]}
    text = json.dumps(value, ensure_ascii=padded, separators=None if padded else (",", ":"))
    return b"data: " + text.encode() + b"\n\n"


class EventStream(Response):
    """Sends events as they come.

    Args:
        events: encoded. An exception before the first one is raised, so that it can have a status
            of its own; a later one becomes a last event with OpenAI's error.
        lifetime: held from the start of sending to its end.
        ping_s: silence after which a comment is sent, and longest wait for a status.
        send_timeout_s: for a client to take an event.
        failed: is told of an error in mid-stream.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes],
        *,
        lifetime: AbstractContextManager[None],
        ping_s: float,
        send_timeout_s: float,
        failed: Callable[[ApiError], None],
    ) -> None:
        super().__init__()
        self._events, self._lifetime, self._failed = events, lifetime, failed
        self._ping_s, self._send_timeout_s = ping_s, send_timeout_s
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-cache"
        self.headers["x-accel-buffering"] = "no"  # or nginx would keep events back

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the response.

        Raises:
            ClientLeft: before the end.
            ApiError: before the first event.
        """
        with self._lifetime:
            async with aclosing(_with_pings(self._events, self._ping_s)) as parts:
                await until_left(receive, self._send_all(send, parts))

    async def _send_all(self, send: Send, parts: AsyncIterator[bytes]) -> None:
        async def put(body: bytes, *, more: bool = True) -> None:
            message = {"type": "http.response.body", "body": body, "more_body": more}
            await self._put(send, message)

        first = await anext(parts)  # an event, or a ping when there is none yet
        await self._put(
            send, {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        )
        await put(first)
        try:
            async for part in parts:
                await put(part)
        except (ClientLeft, asyncio.CancelledError):
            raise
        except Exception as error:
            if not isinstance(error, ApiError):
                log.exception("a stream failed")
            told = as_api_error(error)
            self._failed(told)
            await put(told.event)
        await put(b"", more=False)

    async def _put(self, send: Send, message: Message) -> None:
        try:
            async with asyncio.timeout(self._send_timeout_s):
                await send(message)
        except TimeoutError:
            raise ClientLeft("slow_client") from None


async def _with_pings(events: AsyncGenerator[bytes], ping_s: float) -> AsyncGenerator[bytes]:
    """The events, with a comment after every silence; closed in the end."""
    waiting: asyncio.Task[bytes] | None = None
    try:
        while True:
            if waiting is None:
                waiting = asyncio.ensure_future(_next(events))
            done, _ = await asyncio.wait({waiting}, timeout=ping_s)
            if not done:
                yield _PING
                continue
            part, waiting = waiting.result(), None
            if not part:
                return
            yield part
    finally:
        if waiting is not None:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        await events.aclose()


async def _next(events: AsyncGenerator[bytes]) -> bytes:
    return await anext(events, b"")


async def until_left(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Returns what `work` returns, or cancels it when the client closes the connection.

    Raises:
        ClientLeft: it did.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientLeft("disconnect")
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue
