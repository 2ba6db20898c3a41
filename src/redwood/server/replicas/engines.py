"""One engine as a replica: the server's application, asked without a socket.

What comes in is a whole request, what goes out are the messages of its response, as ASGI has them.
Keys, limits, queue, metrics and errors are those of `redwood serve`: it is the same application.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Message

from redwood.errors import ArgumentError, UnsupportedError
from redwood.server.auth import Keys
from redwood.server.logs import Record
from redwood.server.replicas.plan import DeployPlan
from redwood.server.settings import Settings

if TYPE_CHECKING:
    from redwood.engine.text import Engine

_LEAVING_S = 5.0  # for a request whose client has left
_GRACE_S = 3.0  # for last words to leave
_BROKEN = 1
log = logging.getLogger("redwood.server")


@dataclass(frozen=True)
class Call:
    """A request with its whole body.

    Args:
        headers: names in lower case.
        client: address and port of who asked.
    """

    method: str
    path: str
    query: bytes = b""
    headers: tuple[tuple[bytes, bytes], ...] = ()
    body: bytes = b""
    client: tuple[str, int] | None = None


class Replica:
    """An engine with its server.

    Args:
        name: what the others call it.
        engine: it belongs to the replica from now on.
        leave: called with the exit code when the engine's thread has died.
        share: of the memory that is free, for keys and values of this engine.
    """

    def __init__(
        self,
        name: str,
        engine: Engine,
        settings: Settings,
        keys: Keys,
        leave: Callable[[int], None] = os._exit,
        share: float = 1.0,
    ) -> None:
        from redwood.server.app import create_app
        from redwood.server.service import Service

        self.name, self._leave = name, leave
        self.service = Service(engine, settings, keys, share=share)
        self._app: Any = create_app(self.service)
        self._life: AbstractAsyncContextManager[None] | None = None
        self._watching: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begins to work, on the loop that runs."""
        inner = self._app.app
        self._life = inner.router.lifespan_context(inner)
        await self._life.__aenter__()
        self._watching = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Ends the engine's thread."""
        if self._watching is not None:
            self._watching.cancel()
        if self._life is not None:
            await self._life.__aexit__(None, None, None)

    async def serve(self, call: Call) -> AsyncGenerator[list[Message]]:
        """Answers a request: lists of ASGI messages as they come, the first at once and empty.

        Closing it or cancelling it is the client's leaving.
        """
        app: ASGIApp = self._app
        made: asyncio.Queue[Message | None] = asyncio.Queue()
        left = asyncio.Event()
        begun = False

        async def receive() -> Message:
            nonlocal begun
            if not begun:
                begun = True
                return {"type": "http.request", "body": call.body, "more_body": False}
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            made.put_nowait(message)

        answering = asyncio.ensure_future(app(_scope(call), receive, send))
        answering.add_done_callback(lambda _: made.put_nowait(None))
        try:
            yield []
            while True:
                batch = [await made.get()]
                while not made.empty():
                    batch.append(made.get_nowait())
                if told := [message for message in batch if message is not None]:
                    yield told
                if batch[-1] is None:
                    await answering  # its exception, if there is one
                    return
        finally:
            left.set()
            await asyncio.wait({answering}, timeout=_LEAVING_S)
            answering.cancel()

    async def read(self, path: str) -> tuple[str, int, bytes]:
        """Returns its name, and status and body of /health, /ready or /metrics."""
        made: list[Message] = []

        async def receive() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Message) -> None:
            made.append(message)

        scope = {**_scope(Call("GET", path)), "record": Record(self.name, "GET", path)}
        await self._app.app(scope, receive, send)  # past the door: nobody asks from outside
        return self.name, made[0]["status"], b"".join(each.get("body", b"") for each in made)

    def check_health(self) -> None:
        """Raises RuntimeError while the engine is dead, stuck or only failing."""
        if (trouble := self.service.trouble()) is not None:
            raise RuntimeError(f"the engine is in trouble: {trouble}")

    async def _watch(self) -> None:
        """Ends the process after the engine's thread: an empty replica would draw all requests."""
        await self.service.worker.died.wait()
        self.service.draining = True
        log.error("the engine's thread has died: the replica ends")
        deadline = asyncio.get_running_loop().time() + _GRACE_S
        while self.service.num_open and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.2)
        self._leave(_BROKEN)


def open_engine(plan: DeployPlan) -> Engine:
    """Returns the engine of one replica, with threads for the processors that are its own.

    Raises:
        RedwoodError: see `redwood.load`.
    """
    import torch

    from redwood.engine.load import load

    torch.set_num_threads(plan.threads)
    if "threads" not in plan.engine:
        with suppress(ArgumentError, UnsupportedError):  # a backend that has no such option
            return load(plan.target, plan.drafter, threads=plan.threads, **plan.engine)
    return load(plan.target, plan.drafter, **plan.engine)


def _scope(call: Call) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": call.method,
        "scheme": "http",
        "path": call.path,
        "raw_path": call.path.encode(),
        "query_string": call.query,
        "root_path": "",
        "headers": list(call.headers),
        "client": call.client,
        "server": None,
        "state": {},
    }
