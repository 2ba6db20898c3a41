"""Watchdog: logs an engine that is stuck, closes connections that send nothing.

uvicorn closes connections that idle after an answer, but neither one that never sends a request, or
only half of its head, nor one whose reader stopped for good; they are looked for here.
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
from redwood.server.service import Service

_EVERY_S = 1.0
_LINGER_S = 5.0  # for a closed connection whose buffer is empty
Quiet = WeakKeyDictionary[Any, tuple[float, int, Any]]
log = logging.getLogger("redwood.server")


async def watch(service: Service, server: uvicorn.Server) -> None:
    """Looks after engine and connections until it is cancelled."""
    quiet: Quiet = WeakKeyDictionary()
    settings = service.settings
    known: str | None = None
    while True:
        await asyncio.sleep(_EVERY_S)
        known = _tell(service, known)
        connections = server.server_state.connections
        close_quiet(connections, quiet, settings.body_timeout_s, settings.send_timeout_s)


def _tell(service: Service, known: str | None) -> str | None:
    """Logs a change of the engine's state; where it is stuck, with the stacks of all threads."""
    trouble = service.trouble()
    if trouble == known:
        return known
    if trouble is None:
        log.warning("the engine works again")
        return None
    log.error("the engine is in trouble: %s", trouble)
    if trouble == "engine_stalled":
        with suppress(OSError, ValueError):  # stderr may be no file
            faulthandler.dump_traceback(sys.stderr)
    return trouble


def close_quiet(connections: set[Any], quiet: Quiet, patience_s: float, send_s: float) -> None:
    """Closes connections that take long to send a request, and aborts those that do not close.

    A request that came whole is no matter of this: `Settings.request_timeout_s` bounds it.

    A closed connection may take what is still in its buffer for as long as it takes some of it.

    Args:
        connections: uvicorn's protocols.
        quiet: since when each has been seen so, the bytes that it had to send then, and its last
            request; kept between calls.
        patience_s: for the head of a request, the first one or one after an answer.
        send_s: for a closed connection to take anything.
    """
    now = monotonic()
    for connection in list(connections):
        transport = connection.transport
        closing = transport.is_closing()
        if not closing and not is_idle(connection):
            quiet.pop(connection, None)
            continue
        left = transport.get_write_buffer_size() if closing else 0
        since, before, answered = quiet.get(connection, (now, left, connection.cycle))
        if left < before or answered is not connection.cycle:  # it asked something meanwhile
            since = now
        quiet[connection] = since, left, connection.cycle
        if closing and now - since > (send_s if left else _LINGER_S):
            transport.abort()
        elif not closing and now - since > patience_s:
            transport.close()
