"""One engine as a replica: the server's application, called without a socket.

Input: a whole request; output: the ASGI messages of its response. Keys, limits, queue, metrics and
errors are those of `redwood serve`: it is the same application.
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

_LEAVING_S = 5.0  # for the application to end a request whose client has left
_GRACE_S = 3.0  # for the last errors to reach clients
_BROKEN = 1  # exit code
log = logging.getLogger("redwood.server")


@dataclass(frozen=True)
class Call:
    """A request with its whole body.

    Args:
        headers: names in lower case.
        client: address and port of the client.
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
        name: label of its metrics.
        engine: used by nothing else from now on.
        leave: called with the exit code when the engine's thread has died.
        share: fraction of free memory for keys and values of this engine.
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
        """Starts the engine's thread, in the running event loop."""
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
        """Yields the ASGI messages of the response in lists; the first is empty and comes at once.

        Closing or cancelling the generator counts as the client's disconnect.
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
                if messages := [message for message in batch if message is not None]:
                    yield messages
                if batch[-1] is None:
                    await answering  # raises its exception, if there is one
                    return
        finally:
            left.set()
            await asyncio.wait({answering}, timeout=_LEAVING_S)
            answering.cancel()

    async def read(self, path: str) -> tuple[str, int, bytes]:
        """Returns the replica's name, and status and body of /health, /ready or /metrics."""
        made: list[Message] = []

        async def receive() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Message) -> None:
            made.append(message)

        scope = {**_scope(Call("GET", path)), "record": Record(self.name, "GET", path)}
        await self._app.app(scope, receive, send)  # not through the outer middleware
        return self.name, made[0]["status"], b"".join(each.get("body", b"") for each in made)

    def check_health(self) -> None:
        """Raises RuntimeError while the engine is dead, stalled, or all its steps fail."""
        if (trouble := self.service.trouble()) is not None:
            raise RuntimeError(f"the engine is in trouble: {trouble}")

    async def _watch(self) -> None:
        """Ends the process when the engine's thread has died: a replica that fails at once looks
        idle, and would be sent all requests."""
        await self.service.worker.died.wait()
        self.service.draining = True
        log.error("the engine's thread has died: the replica ends")
        deadline = asyncio.get_running_loop().time() + _GRACE_S
        while self.service.num_open and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.2)
        self._leave(_BROKEN)


def open_engine(plan: DeployPlan) -> Engine:
    """Returns the engine of one replica, with as many threads as Ray reserved processors for it,
    and its part of the memory for keys and values that stay.

    Raises:
        RedwoodError: see `redwood.load`.
    """
    import torch

    from redwood.engine.load import KV_CACHE_SHARE, load

    torch.set_num_threads(plan.threads)
    options = dict(plan.engine)
    if "kv_cache" not in options:
        options.setdefault("kv_cache_share", KV_CACHE_SHARE * plan.share)
    if "threads" not in plan.engine:
        with suppress(ArgumentError, UnsupportedError):  # a backend without that option
            return load(plan.target, plan.drafter, threads=plan.threads, **options)
    return load(plan.target, plan.drafter, **options)


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
