"""The application in front of the engines: it holds the client's connection.

A request is read whole and sent to an engine. If the engine is lost before any part of the answer
was sent to the client, the request is repeated on another engine; after that, a stream ends with an
error event. An answer that is not streamed is sent when it is complete, so its request can be
repeated until then.

Repeating is safe, also for sampled text: the client has seen nothing of the lost answer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any, Protocol

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from redwood.server.auth import Keys
from redwood.server.errors import ApiError, unavailable
from redwood.server.metrics import Metrics
from redwood.server.middleware import OuterMiddleware
from redwood.server.replicas.endings import Ending, code_of
from redwood.server.replicas.engines import Call
from redwood.server.replicas.gathered import Counts, Page, metrics_page, state_page
from redwood.server.responses import error_response
from redwood.server.settings import Settings
from redwood.server.streaming import ClientLeft, until_left

_ANSWERS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
_RETRY_CODES = frozenset({"shutting_down", "engine_dead"})  # error codes: repeat on another engine
_OUTER_HEADERS = frozenset(
    {b"x-request-id", b"x-content-type-options", b"referrer-policy", b"x-frame-options"}
)
"""Headers that `OuterMiddleware` adds, in the router as in the engine."""
_SLACK_S = 10.0  # beyond the request's time limit, which the engine enforces first
log = logging.getLogger("redwood.server")


class ReplicaLost(Exception):
    """An engine that was asked is gone, or cannot be reached."""


class Engines(Protocol):
    """The replicas, however they are reached."""

    def ask(self, call: Call) -> AsyncGenerator[list[Message]]:
        """Sends a request to one of them and yields what `Replica.serve` does; closing cancels it.

        Raises:
            ReplicaLost: the engine is gone; at any time.
            ApiError: no engine accepts the request, or the engine's server failed.
        """
        ...

    async def read(self, path: str) -> list[Page]:
        """Returns one page (see `Replica.read`) of every replica that answers in time."""
        ...


class Router:
    """The ASGI application.

    Args:
        name: of this copy, for metrics.
        engines: the replicas.
        settings: limits, as for `redwood serve`.
        keys: API keys.
        retries: how often a request is repeated on another engine.

    Attributes: `draining`: new requests for answers are refused.
    """

    def __init__(
        self, name: str, engines: Engines, settings: Settings, keys: Keys, retries: int
    ) -> None:
        self.name, self._engines, self._settings = name, engines, settings
        self._retries = retries
        self._counts = Counts()
        self.draining = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._cut: set[asyncio.Task[Any]] = set()
        self._outer: ASGIApp = OuterMiddleware(self._route, settings, keys, Metrics("router", name))

    @property
    def num_open(self) -> int:
        """Requests that are being answered."""
        return len(self._tasks)

    def cut(self) -> int:
        """Ends all requests with an error; returns how many."""
        for task in self._tasks - self._cut:
            self._cut.add(task)
            task.cancel()
        return len(self._tasks)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request. The id is left off the response: Ray's proxy adds it."""
        if scope["type"] == "lifespan":
            for step in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{step}.complete"})
            return

        async def without_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                kept = [pair for pair in message["headers"] if pair[0] != b"x-request-id"]
                message = {**message, "headers": kept}
            await send(message)

        await self._outer(scope, receive, without_id)

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path in ("/health", "/ready"):
            draining = self.draining and path == "/ready"
            made = state_page(await self._engines.read(path), draining=draining)
            await made(scope, receive, send)
        elif path == "/metrics":
            pages = await self._engines.read(path)
            await metrics_page(pages, self.name, self._counts)(scope, receive, send)
        else:
            await self._answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.draining and scope["path"] in _ANSWERS:
            raise unavailable("the server is stopping", "shutting_down")
        try:
            body = await Request(scope, receive).body()
        except ClientDisconnect:
            raise ClientLeft("disconnect") from None
        call = Call(
            scope["method"],
            scope["path"],
            scope["query_string"],
            _with_id(scope),
            body,
            tuple(scope["client"]) if scope.get("client") else None,
        )
        reply = _Reply(send, Ending(scope["path"], scope["record"].request_id))
        try:
            with self._open():
                await until_left(receive, self._ask(call, reply))
        except ApiError as error:
            scope["record"].details["error"] = error.code or error.message
            if reply.begun:
                await reply.end(error)
            else:
                await error_response(error, scope)(scope, receive, send)

    @contextmanager
    def _open(self) -> Iterator[None]:
        """Registers the current task as an open request; turns `cut` into an ApiError."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if task in self._cut and task.uncancel() == 0:
                raise unavailable("the server is stopping", "shutting_down") from None
            raise
        finally:
            self._tasks.discard(task)
            self._cut.discard(task)

    async def _ask(self, call: Call, reply: _Reply) -> None:
        now = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout_at(now + self._settings.request_timeout_s + _SLACK_S):
                for tries in range(1, self._retries + 2):
                    try:
                        await self._ask_one(call, reply)
                        return
                    except ReplicaLost as lost:
                        if await reply.finish():
                            return
                        self._note(call, reply, lost, tries)
        except TimeoutError:
            raise ApiError(504, "no engine answered in time", code="timeout") from None
        raise unavailable("the engine was lost before the answer began", "replica_lost")

    async def _ask_one(self, call: Call, reply: _Reply) -> None:
        async with aclosing(self._engines.ask(call)) as batches:
            try:
                async with asyncio.timeout(self._settings.queue_timeout_s):
                    await anext(batches)
            except TimeoutError:
                raise unavailable("no engine takes requests at the moment", "no_replica") from None
            async for batch in batches:
                for message in batch:
                    await reply.take(message)
            if not reply.complete:
                raise ReplicaLost("the answer has no end")

    def _note(self, call: Call, reply: _Reply, lost: ReplicaLost, tries: int) -> None:
        """Counts and logs a lost engine.

        Raises:
            ApiError: a part of the answer has been sent, so the request cannot be repeated.
        """
        self._counts.note(answered=reply.answered)
        name = dict(call.headers)[b"x-request-id"].decode("latin-1")
        log.warning("an engine was lost (%s) with request %s, try %d", lost, name, tries)
        if reply.answered:
            message = "the engine was lost in the middle of the answer: ask again"
            raise unavailable(message, "replica_lost")
        reply.forget()


class _Reply:
    """The response to the client, whichever engine it comes from.

    Attributes: `begun`: the status was sent; `answered`: a part of the answer was sent, not only
    keep-alive comments; `complete`: everything was sent.
    """

    def __init__(self, send: Send, ending: Ending) -> None:
        self._send, self._ending = send, ending
        self._start: Message | None = None
        self._held: list[bytes] = []
        self.begun = self.answered = self.complete = False

    def forget(self) -> None:
        """Drops what a lost engine sent and the client has not got."""
        self._start, self._held = None, []

    async def take(self, message: Message) -> None:
        """Takes one message of the engine; sends what can be sent.

        Raises:
            ReplicaLost: the engine refuses the request because it is stopping or dead.
        """
        if message["type"] == "http.response.start":
            kept = [pair for pair in message["headers"] if pair[0] not in _OUTER_HEADERS]
            self._start = {**message, "headers": kept}
            return
        assert self._start is not None
        body, more = message.get("body", b""), message.get("more_body", False)
        if _is_stream(self._start):
            await self._pass_on(body, more)
            return
        self._held.append(body)
        if not more:
            await self._give(b"".join(self._held))

    async def finish(self) -> bool:
        """Completes a stream of which only the end is missing; returns whether all was sent."""
        if self._ending.seen and not self.complete:
            self.complete = True
            await self._put(b"", more=False)
        return self.complete

    async def end(self, error: ApiError) -> None:
        """Ends a stream, which has begun, with an error event."""
        if not self._ending.seen:
            await self._put(self._ending.failed(error), more=True)
        await self._put(b"", more=False)

    async def _pass_on(self, body: bytes, more: bool) -> None:
        await self._begin()
        self.answered = self.answered or not body.startswith(b":")
        self.complete = not more
        self._ending.follow(body)
        await self._put(body, more=more)

    async def _give(self, body: bytes) -> None:
        assert self._start is not None
        status, code = self._start["status"], code_of(self._start, body)
        if status == 503 and code in _RETRY_CODES:
            raise ReplicaLost(code)
        self.complete = True
        if self.begun:  # as a stream: a lost engine had sent a keep-alive comment
            await self._put(self._ending.refused(status, body), more=True)
            await self._put(b"", more=False)
            return
        await self._begin()
        await self._put(body, more=False)

    async def _begin(self) -> None:
        if not self.begun:
            self.begun = True
            assert self._start is not None
            await self._send(self._start)

    async def _put(self, body: bytes, *, more: bool) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": more})


def _is_stream(start: Message) -> bool:
    return any(
        name == b"content-type" and value.startswith(b"text/event-stream")
        for name, value in start["headers"]
    )


def _with_id(scope: Scope) -> tuple[tuple[bytes, bytes], ...]:
    """The request's headers, with the id that `OuterMiddleware` gave it."""
    kept = [(name, value) for name, value in scope["headers"] if name != b"x-request-id"]
    return (*kept, (b"x-request-id", scope["record"].request_id.encode()))
