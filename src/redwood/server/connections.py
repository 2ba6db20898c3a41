"""A bound on open connections, and which one is closed when there are more.

Every connection is an open file, and a process has a limit of those (`ulimit -n`). A server without
a free one can neither accept a connection nor read its own files. So the number of connections is
bounded below the limit: one more replaces the oldest idle one, or gets a 503 if none is idle.
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
_LEAST = 4  # connections; a server with fewer is refused
_MIN_IDLE_S = 1.0  # a younger connection is not closed as idle
_SPARE_PARTS = 4  # of the spare files: one to accept at once, one to close late, two in reserve
log = logging.getLogger("redwood.server")


def open_files() -> tuple[int, int]:
    """Returns the limit of open files of this process, and how many are open.

    The soft limit is first raised as far as the system allows.
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
    """Returns how many of the files that may still be opened are kept free of connections."""
    return max(8, min(256, (limit - held) // 4))


def most_connections(limit: int, held: int, wanted: int | None = None) -> int:
    """Returns how many connections may be open.

    Args:
        limit, held: from `open_files`.
        wanted: the operator's setting; None: as many as the limit of open files allows.

    Raises:
        ArgumentError: the limit of open files is too low for that.
    """
    possible = limit - held - spare_files(limit, held)
    if possible < (_LEAST if wanted is None else wanted):
        raise ArgumentError(
            f"this process may have {limit} open files, which leaves room for {max(0, possible)} "
            f"connections instead of {wanted or _LEAST}: raise it with ulimit -n"
        )
    return possible if wanted is None else wanted


class Guard:
    """Bounds the number of open connections; for one event loop.

    Args:
        most: connections that may be open.
        spare: files that may be open in addition; see `spare_files`.
        clock: seconds.

    Attributes: `at_once`: connections that may be accepted in one iteration of the event loop.
    """

    def __init__(
        self, most: int, spare: int, metrics: Metrics, clock: Callable[[], float] = monotonic
    ) -> None:
        self.most, self.at_once = most, max(1, spare // _SPARE_PARTS)
        self._metrics, self._clock = metrics, clock
        self._since: dict[Any, float] = {}  # connection -> when it was opened, the oldest first
        self._logged_s = -1.0
        self._dropped = {"idle": 0, "full": 0, "files": 0}

    def __len__(self) -> int:
        return len(self._since)

    def came(self, connection: Any) -> ApiError | None:
        """Counts a new connection, closing an idle one where there are too many.

        Returns: the error to refuse it with, if none is idle; else None.
        """
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
        """Forgets a connection that has ended."""
        self._since.pop(connection, None)

    def _idle(self, now: float) -> Any:
        """The oldest idle connection of at least `_MIN_IDLE_S`, None if there is none."""
        for connection, since in self._since.items():
            idle = is_idle(connection) and not connection.transport.get_write_buffer_size()
            if idle and now - since >= _MIN_IDLE_S:
                return connection
        return None

    def failed(self, loop: Any, context: Mapping[str, Any]) -> None:
        """The event loop's exception handler: "no more files" is logged once a second at most."""
        if "out of system resource" in context.get("message", ""):
            self._note("files")
        else:
            loop.default_exception_handler(context)

    def _note(self, why: str) -> None:
        self._metrics.dropped.labels(why).inc()
        self._dropped[why] += 1
        now = self._clock()
        if self._logged_s >= 0.0 and now - self._logged_s < 1.0:
            return
        self._logged_s = now
        messages = {
            "idle": "%d idle ones were closed",
            "full": "%d were refused",
            "files": "%d could not be accepted for want of open files (ulimit -n)",
        }
        words = [messages[name] % count for name, count in self._dropped.items() if count]
        self._dropped = dict.fromkeys(self._dropped, 0)
        log.warning("%d connections are open: %s", len(self), ", ".join(words))


def is_idle(connection: Any) -> bool:
    """Whether a connection (uvicorn's protocol) has no request in progress."""
    return connection.cycle is None or connection.cycle.response_complete
