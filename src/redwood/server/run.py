"""Runs a server: start, drain, stop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from functools import partial
from threading import Event as Flag
from types import FrameType
from typing import cast

import uvicorn

from redwood.server.app import create_app
from redwood.server.connections import Guard, most_connections, open_files, spare_files
from redwood.server.errors import unavailable
from redwood.server.parser import Parser
from redwood.server.served import Served
from redwood.server.watching import watch

_GRACE_S = 3  # for the last bytes to be sent
_BACKLOG = 2048  # connections that wait in the kernel to be accepted
log = logging.getLogger("redwood.server")


class Runner:
    """Runs a service on a socket until it is stopped.

    The first SIGTERM or Ctrl-C, or `stop`, drains: /ready and new requests get 503, open requests
    have `Settings.drain_timeout_s` to end, the rest is cut. The second one cuts at once.

    Args:
        service: an engine and everything around it, or several.
        listener: a bound socket.
        ready: called once the server listens.

    Attributes: `started`: set once the server listens.
    """

    def __init__(
        self, service: Served, listener: socket.socket, ready: Callable[[], None] | None = None
    ) -> None:
        self.service, self._listener, self._ready = service, listener, ready
        self.started = Flag()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop, self._cut = asyncio.Event(), asyncio.Event()

    def run(self) -> int:
        """Runs until stopped; returns the exit code: 0, or 1 if the engine's thread has died."""
        return asyncio.run(self._main())

    def stop(self) -> None:
        """Drains; a second call cuts. May be called from any thread or signal handler."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._note_stop)

    def _note_stop(self) -> None:
        (self._cut if self._stop.is_set() else self._stop).set()

    async def _main(self) -> int:
        self._loop = asyncio.get_running_loop()
        limit, held = open_files()
        most = most_connections(limit, held, self.service.settings.max_connections)
        guard = Guard(most, spare_files(limit, held), self.service.metrics)
        self.service.metrics.watch("num_connections", "Open connections.", lambda: len(guard))
        self._loop.set_exception_handler(guard.failed)
        server = _Uvicorn(_config(self.service, guard), self.stop)
        serving = asyncio.ensure_future(server.serve(sockets=[self._listener]))
        watching = asyncio.ensure_future(watch(self.service, server))
        try:
            while not server.started and not serving.done():
                await asyncio.sleep(0.01)
            if server.started:
                self._listener.listen(_BACKLOG)  # uvicorn accepts as many at once as its backlog
                self.started.set()
                if self._ready is not None:
                    self._ready()
                await self._until_stopped(serving)
            server.should_exit = True
            await serving
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
        return 1 if self.service.died.is_set() and not self._stop.is_set() else 0

    async def _until_stopped(self, serving: asyncio.Future[None]) -> None:
        died = self.service.died
        await _first(self._stop.wait(), died.wait(), serving)
        self.service.draining = True
        if self._stop.is_set():
            log.info("stopping: %d requests may end", self.service.num_open)
            drain_s = self.service.settings.drain_timeout_s
            await _first(self._drained(), self._cut.wait(), died.wait(), timeout_s=drain_s)
        cut = self.service.cut(unavailable("the server is stopping", "shutting_down"))
        if cut:
            log.warning("stopping: %d requests were cut", cut)
            await _first(self._drained(), timeout_s=_GRACE_S)

    async def _drained(self) -> None:
        while self.service.num_open or self.service.num_entering:
            await asyncio.sleep(0.02)


def leave(code: int, patience_s: float = 1.0) -> int:
    """Returns the exit code, or ends the process with it if one of our threads is stuck: at a
    normal exit Python would wait for it for ever.

    Args:
        code: exit code.
        patience_s: for each thread to end.
    """
    threads = [t for t in threading.enumerate() if t.name.startswith("redwood-")]
    for thread in threads:
        thread.join(patience_s)
    stuck = [thread.name for thread in threads if thread.is_alive()]
    if stuck:
        log.error("leaving while %s is stuck", ", ".join(stuck))
        logging.shutdown()
        os._exit(code)
    return code


class _Uvicorn(uvicorn.Server):
    """uvicorn's server, whose signals drain; the exit code is ours, not the signal's."""

    def __init__(self, config: uvicorn.Config, on_signal: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_signal = on_signal

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by Python on SIGTERM and SIGINT."""
        log.info("got %s", signal.Signals(sig).name)
        self._on_signal()


def _config(service: Served, guard: Guard) -> uvicorn.Config:
    return uvicorn.Config(
        create_app(service),
        http=cast("type[asyncio.Protocol]", partial(Parser, guard)),
        loop="asyncio",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=guard.at_once,
        timeout_graceful_shutdown=_GRACE_S,
    )


async def _first(*waits: object, timeout_s: float | None = None) -> None:
    """Returns when the first of the awaitables is done; cancels the coroutines among the others."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]  # type: ignore[call-overload]
    try:
        await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task, wait in zip(tasks, waits, strict=True):
            if task is not wait:
                task.cancel()
        await asyncio.gather(
            *(t for t, w in zip(tasks, waits, strict=True) if t is not w), return_exceptions=True
        )
