"""Watchdog: logs an engine that is stuck, closes connections that are stalled.

uvicorn closes connections that are idle after an answer, but neither those that never send a
request, or only a part of its head, nor closed ones whose client reads nothing. This does.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import sys
from contextlib import suppress
from time import monotonic
from typing import Any
from weakref import WeakKeyDictionary

import uvicorn

from redwood.server.connections import is_idle
from redwood.server.served import Served

_EVERY_S = 1.0
_EMPTY_CLOSE_S = 5.0  # for a closing connection whose send buffer is empty
Stalled = WeakKeyDictionary[Any, tuple[float, int, Any]]
"""Connection -> since when (s), bytes left to send then, its last request."""
log = logging.getLogger("redwood.server")


async def watch(service: Served, server: uvicorn.Server) -> None:
    """Checks the engine and the connections every second until it is cancelled."""
    stalled: Stalled = WeakKeyDictionary()
    settings = service.settings
    logged: str | None = None
    while True:
        await asyncio.sleep(_EVERY_S)
        logged = _log_trouble(service, logged)
        connections = server.server_state.connections
        close_stalled(connections, stalled, settings.body_timeout_s, settings.send_timeout_s)


def _log_trouble(service: Served, logged: str | None) -> str | None:
    """Logs a change of the engine's state, with the stacks of all threads where it is stuck.

    Args:
        logged: the state that was logged last.

    Returns: the state now, None where all is well.
    """
    trouble = service.trouble()
    if trouble == logged:
        return logged
    if trouble is None:
        log.warning("the engine works again")
        return None
    log.error("the engine is in trouble: %s", trouble)
    if trouble == "engine_stalled":
        with suppress(OSError, ValueError):  # stderr may have no file descriptor
            faulthandler.dump_traceback(sys.stderr)
    return trouble


def close_stalled(connections: set[Any], stalled: Stalled, request_s: float, send_s: float) -> None:
    """Closes connections that send no request in time, and aborts closing ones that are stuck.

    Requests that arrived whole are not looked at: `Settings.request_timeout_s` bounds them. A
    closing connection is not aborted while its client still reads from its send buffer.

    Args:
        connections: uvicorn's protocols.
        stalled: connections seen without progress; kept between calls.
        request_s: for the head of a request to arrive, after the connection was opened or after the
            last answer.
        send_s: for the client of a closing connection to read anything.
    """
    now = monotonic()
    for connection in list(connections):
        transport = connection.transport
        closing = transport.is_closing()
        if not closing and not is_idle(connection):
            stalled.pop(connection, None)
            continue
        left = transport.get_write_buffer_size() if closing else 0
        since, before, answered = stalled.get(connection, (now, left, connection.cycle))
        if left < before or answered is not connection.cycle:  # progress, or another request
            since = now
        stalled[connection] = since, left, connection.cycle
        if closing and now - since > (send_s if left else _EMPTY_CLOSE_S):
            transport.abort()
        elif not closing and now - since > request_s:
            transport.close()
