"""Server-sent events, with keep-alive comments; cancelled when the client disconnects."""

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
    """The client has closed the connection, or reads nothing from it.

    Args:
        reason: "disconnect" or "slow_client".
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def event(value: dict[str, Any], *, padded: bool = False) -> bytes:
    """Returns a value as a server-sent event.

    Args:
        padded: adds a field `obfuscation` that rounds the length up, so that an observer of
            encrypted traffic learns little about the tokens from their lengths.
    """
    if padded:
        length = len(json.dumps({**value, "obfuscation": ""}))
        value = {**value, "obfuscation": secrets.token_hex(_PADDED_TO)[: -length % _PADDED_TO]}
    text = json.dumps(value, ensure_ascii=padded, separators=None if padded else (",", ":"))
    return b"data: " + text.encode() + b"\n\n"


class EventStream(Response):
    """A response that sends events as they come.

    Args:
        events: encoded. An exception before the first one is raised, so that the response can have
            an error status; a later one becomes a last event with the error.
        lifetime: entered before the first event is awaited, left at the end of the response.
        ping_s: time without events after which a comment is sent, and with it the status.
        send_timeout_s: for a client to receive an event.
        failed: called with an error that came after the first event; returns the event for it.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes],
        *,
        lifetime: AbstractContextManager[None],
        ping_s: float,
        send_timeout_s: float,
        failed: Callable[[ApiError], bytes],
    ) -> None:
        super().__init__()
        self._events, self._lifetime, self._failed = events, lifetime, failed
        self._ping_s, self._send_timeout_s = ping_s, send_timeout_s
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-cache"
        self.headers["x-accel-buffering"] = "no"  # else nginx buffers events

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
            sent = as_api_error(error)
            last = self._failed(sent)
            await put(last)
        await put(b"", more=False)

    async def _put(self, send: Send, message: Message) -> None:
        try:
            async with asyncio.timeout(self._send_timeout_s):
                await send(message)
        except TimeoutError:
            raise ClientLeft("slow_client") from None


async def _with_pings(events: AsyncGenerator[bytes], ping_s: float) -> AsyncGenerator[bytes]:
    """The events, with a comment after every `ping_s` without one; closes `events` at the end."""
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
    """Returns what `work` returns.

    Raises:
        ClientLeft: the client closed the connection before; `work` is cancelled.
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
