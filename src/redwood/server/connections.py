"""How many connections may be open, and who has to go when there are more.

Every connection is an open file, and a process has a limit of those (`ulimit -n`). A server that
spends the last one can neither accept, nor read its own files. So the number is bounded below that:
a connection too many takes the place of the oldest one that asks nothing, or gets a 503.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Any

from redwood.errors import ArgumentError
from redwood.server.errors import ApiError, unavailable
from redwood.server.metrics import Metrics

_WANTED = 65536  # open files, where the system's hard limit allows it
_LEAST = 4  # connections, below which a server makes no sense
_PATIENCE_S = 1.0  # age below which a connection is not closed as idle
_PIECE = 4  # parts of the spare files: accepted at once, closed a little later, and two to spare
log = logging.getLogger("redwood.server")


def open_files() -> tuple[int, int]:
    """Returns how many files this process may have open, and how many it has.

    The limit is first raised as far as the system lets it.
    """
    try:
        import resource
    except ImportError:  # Windows, where sockets have no such limit
        return _WANTED, 0
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _WANTED if hard == resource.RLIM_INFINITY else min(hard, _WANTED)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = most
    if soft == resource.RLIM_INFINITY:
        soft = _WANTED
    for folder in ("/proc/self/fd", "/dev/fd"):
        if os.path.isdir(folder):
            return soft, len(os.listdir(folder))
    return soft, 64


def spare_files(limit: int, held: int) -> int:
    """Returns how many of the files that are left stay for other things than connections."""
    return max(8, min(256, (limit - held) // 4))


def most_connections(limit: int, held: int, wanted: int | None = None) -> int:
    """Returns how many connections may be open.

    Args:
        limit, held: open files, from `open_files`.
        wanted: what the operator says; None: all that the files allow.

    Raises:
        ArgumentError: too few files for that.
    """
    possible = limit - held - spare_files(limit, held)
    if possible < (_LEAST if wanted is None else wanted):
        raise ArgumentError(
            f"this process may have {limit} open files, which leaves room for {max(0, possible)} "
            f"connections instead of {wanted or _LEAST}: raise it with ulimit -n"
        )
    return possible if wanted is None else wanted


class Guard:
    """Keeps the number of open connections within a bound; for one event loop.

    Args:
        most: connections.
        spare: open files that are left besides.
        clock: seconds.

    Attributes: `at_once`: connections that may be accepted in one turn of the loop.
    """

    def __init__(
        self, most: int, spare: int, metrics: Metrics, clock: Callable[[], float] = monotonic
    ) -> None:
        self.most, self.at_once = most, max(1, spare // _PIECE)
        self._metrics, self._clock = metrics, clock
        self._since: dict[Any, float] = {}  # connection -> when it came, the oldest first
        self._told_s = -1.0
        self._dropped = {"idle": 0, "full": 0, "files": 0}

    def __len__(self) -> int:
        return len(self._since)

    def came(self, connection: Any) -> ApiError | None:
        """Notes a new connection, and makes room for it; returns why it has to go, if it has."""
        now = self._clock()
        if len(self._since) >= self.most:
            idle = self._idle(now)
            if idle is None:
                self._note("full")
                return unavailable(
                    f"{self.most} connections are open, and all of them are in use",
                    "too_many_connections",
                )
            self.went(idle)
            idle.transport.abort()
            self._note("idle")
        self._since[connection] = now
        return None

    def went(self, connection: Any) -> None:
        """Notes that a connection has ended."""
        self._since.pop(connection, None)

    def _idle(self, now: float) -> Any:
        """The oldest connection without a request, but for those that have only just come."""
        for connection, since in self._since.items():
            idle = is_idle(connection) and not connection.transport.get_write_buffer_size()
            if idle and now - since >= _PATIENCE_S:
                return connection
        return None

    def failed(self, loop: Any, context: Mapping[str, Any]) -> None:
        """The loop's handler of exceptions: no more files are a line at most every second."""
        if "out of system resource" in context.get("message", ""):
            self._note("files")
        else:
            loop.default_exception_handler(context)

    def _note(self, why: str) -> None:
        self._metrics.dropped.labels(why).inc()
        self._dropped[why] += 1
        now = self._clock()
        if self._told_s >= 0.0 and now - self._told_s < 1.0:
            return
        self._told_s = now
        told = {
            "idle": "%d idle ones were closed",
            "full": "%d were refused",
            "files": "%d could not be accepted for want of open files (ulimit -n)",
        }
        words = [told[name] % count for name, count in self._dropped.items() if count]
        self._dropped = dict.fromkeys(self._dropped, 0)
        log.warning("%d connections are open: %s", len(self), ", ".join(words))


def is_idle(connection: Any) -> bool:
    """Whether a connection of uvicorn's has no request, or none since its last answer."""
    return connection.cycle is None or connection.cycle.response_complete
