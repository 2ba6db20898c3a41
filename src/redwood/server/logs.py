"""Logging: one line per request, as text or JSON. Prompts and answers are not logged unless the
operator asks for it."""

from __future__ import annotations

import json
import logging
import sys
import time
from dataclasses import dataclass, field
from typing import Any

FORMATS = ("text", "json")
requests_log = logging.getLogger("redwood.requests")


@dataclass
class Record:
    """The log record of one request, completed while it is served.

    Args:
        request_id: our own, or the client's X-Request-Id if it is valid.
        method, path: of the HTTP request.
        route: the route's template, "other" if none matched.
        owner: name of the API key.
        status: HTTP status; 499: the client closed the connection.
        started_s: when it arrived, on the clock of `perf_counter`.
        details: further fields, in order.
    """

    request_id: str
    method: str
    path: str
    route: str = "other"
    owner: str | None = None
    status: int = 0
    started_s: float = field(default_factory=time.perf_counter)
    details: dict[str, Any] = field(default_factory=dict)

    def write(self) -> None:
        """Logs the line: at level ERROR from status 500 on, else INFO."""
        values = {
            "request_id": self.request_id,
            "method": self.method,
            "path": self.path[:200],
            "status": self.status,
            "seconds": round(time.perf_counter() - self.started_s, 4),
            "key": self.owner,
            **self.details,
        }
        level = logging.ERROR if self.status >= 500 else logging.INFO
        given = {name: value for name, value in values.items() if value is not None}
        requests_log.log(level, "request", extra={"fields": given})


class _Formatter(logging.Formatter):
    """A line of `key=value` pairs or of JSON. Line breaks in values are escaped, so that no client
    can forge a line."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self._json = form == "json"

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line; a traceback follows in text, and is a field in JSON."""
        fields: dict[str, Any] = getattr(record, "fields", {})
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))
        trace = self.formatException(record.exc_info) if record.exc_info else None
        message = record.getMessage()
        if self._json:
            line = {"time": when, "level": record.levelname.lower(), "message": message, **fields}
            return json.dumps(line | ({"traceback": trace} if trace else {}), default=str)
        words = [when, record.levelname.lower(), _plain(message)]
        words += [f"{name}={_value(value)}" for name, value in fields.items()]
        return " ".join(words) + (f"\n{trace}" if trace else "")


def _value(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return json.dumps(text) if not text.isprintable() or set(text) & set(' "=') else text


def _plain(text: str) -> str:
    return text if text.isprintable() else json.dumps(text)[1:-1]


def set_up(form: str = "text") -> None:
    """Sends the server's log to stderr, and uvicorn's warnings with it.

    For a process that is only the server; a program that embeds it configures its own logging.

    Args:
        form: one of `FORMATS`.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(form))
    for name, level in (
        ("redwood.server", logging.INFO),
        ("redwood.requests", logging.INFO),
        ("uvicorn.error", logging.WARNING),
    ):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
