"""Outermost middleware: request id, Host, API key and body size; then log and metrics.

Every path that is not listed as public needs a key, so that a route added later needs one too.
"""

from __future__ import annotations

import asyncio
import logging
import re
import uuid
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from redwood.server.auth import Keys
from redwood.server.errors import CLIENT_LEFT, ApiError, internal_error
from redwood.server.logs import Record
from redwood.server.metrics import Metrics
from redwood.server.responses import error_response
from redwood.server.settings import Settings, is_loopback
from redwood.server.streaming import ClientLeft

PUBLIC = frozenset({"/", "/health", "/ready", "/favicon.ico"})
PUBLIC_FOLDERS = ("/static/",)
_VALID_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
)
log = logging.getLogger("redwood.server")


class OuterMiddleware:
    """Wraps an ASGI application.

    Args:
        app: the application with the routes.
    """

    def __init__(self, app: ASGIApp, settings: Settings, keys: Keys, metrics: Metrics) -> None:
        self.app = app
        self._settings, self._keys, self._metrics = settings, keys, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = scope["headers"]
        given = _header(headers, b"x-request-id")
        name = given.decode() if _VALID_ID.fullmatch(given) else f"req-{uuid.uuid4().hex[:24]}"
        record = Record(name, scope["method"], scope["path"])
        scope["record"] = record
        out = _Sender(send, record)
        try:
            self._check(scope, record)
            await self.app(scope, _limited(receive, headers, self._settings), out)
        except ApiError as error:
            await _refuse(error, scope, receive, out)
        except ClientLeft as left:
            record.status = CLIENT_LEFT
            self._metrics.cancelled.labels(left.reason).inc()
        except asyncio.CancelledError:
            record.status = record.status or CLIENT_LEFT
            raise
        except Exception:
            log.exception("a request failed unexpectedly")
            await _refuse(internal_error(), scope, receive, out)  # uvicorn's is plain text
        finally:
            self._count_and_log(scope, record)

    def _check(self, scope: Scope, record: Record) -> None:
        headers, path = scope["headers"], scope["path"]
        if not len(self._keys) and self._settings.on_loopback:
            self._check_host(_header(headers, b"host").decode("latin-1"))
        record.owner = self._keys.owner(headers)
        free = path in PUBLIC or path.startswith(PUBLIC_FOLDERS)
        free = free or (path == "/metrics" and self._settings.metrics_without_key)
        if record.owner is None and not free:
            raise ApiError(
                401,
                "a valid API key is needed: send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )

    def _check_host(self, host: str) -> None:
        """Refuses foreign Host headers (DNS rebinding): a web page may give its own name this
        machine's address, and without a key only the Host header shows it."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            name = ""
        allowed = (self._settings.host, *self._settings.allowed_hosts)
        if not is_loopback(name) and name not in allowed:
            raise ApiError(403, "this Host is not served here: see --allowed-host", code="host")

    def _count_and_log(self, scope: Scope, record: Record) -> None:
        route = scope.get("route")
        record.route = getattr(route, "path", None) or "other"
        code = str(record.status or 500)
        self._metrics.requests.labels(record.route, code).inc()
        if record.route not in ("/health", "/ready", "/metrics", "other") or record.status >= 400:
            record.write()


class _Sender:
    """Sends a response; records its status and adds headers."""

    def __init__(self, send: Send, record: Record) -> None:
        self._send, self._record = send, record
        self.begun = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.begun = True
            self._record.status = message["status"]
            name = self._record.request_id.encode()
            headers = [*message["headers"], (b"x-request-id", name), *_HEADERS]
            message = {**message, "headers": headers}
        await self._send(message)


def _limited(receive: Receive, headers: list[tuple[bytes, bytes]], settings: Settings) -> Receive:
    """A `receive` that bounds the size of the body and the time it may take.

    Raises:
        ApiError: 413: here if Content-Length exceeds the limit, else by `receive` once the body
            does; 408, by `receive`: the body did not arrive in time.
    """
    most = settings.max_body_bytes
    length = _header(headers, b"content-length")
    if length.isdigit() and int(length) > most:
        raise _too_large(most)
    taken, complete = 0, False
    deadline = asyncio.get_running_loop().time() + settings.body_timeout_s

    async def limited() -> Message:
        nonlocal taken, complete
        if complete:
            return await receive()
        try:
            async with asyncio.timeout_at(deadline):
                message = await receive()
        except TimeoutError:
            text = f"the body did not arrive within {settings.body_timeout_s:g} seconds"
            headers = {"connection": "close"}
            raise ApiError(408, text, code="body_timeout", headers=headers) from None
        if message["type"] == "http.disconnect":
            complete = True
            return message
        taken += len(message.get("body", b""))
        complete = not message.get("more_body", False)
        if taken > most:
            raise _too_large(most)
        return message

    return limited


def _too_large(most: int) -> ApiError:
    return ApiError(
        413,
        f"the body is larger than {most} bytes",
        code="body_too_large",
        headers={"connection": "close"},  # the rest of it will not be read
    )


def _header(headers: list[tuple[bytes, bytes]], name: bytes) -> bytes:
    return next((value for key, value in headers if key == name), b"")


async def _refuse(error: ApiError, scope: Scope, receive: Receive, out: _Sender) -> None:
    details: Mapping[str, Any] = {"error": error.code}
    scope["record"].details.update(details)
    if not out.begun:
        await error_response(error, scope)(scope, receive, out)
