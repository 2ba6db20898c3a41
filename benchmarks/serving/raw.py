"""HTTP by hand, as no library does it: slow, cut off anywhere, small windows."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from running import Server


@dataclass
class Reply:
    """What came back on a connection that is closed after one answer.

    Args:
        complete: the body ended where its framing said.
    """

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    complete: bool = False

    @property
    def json(self) -> Any:
        """The body as JSON, None if it is none."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None

    @property
    def error(self) -> dict[str, Any] | None:
        """The error in OpenAI's shape, of the body or of a stream's last event."""
        candidates = [self.json, *self.events[-1:]]
        for each in candidates:
            error = each.get("error") if isinstance(each, dict) else None
            if isinstance(error, dict) and {"message", "type", "param", "code"} <= set(error):
                return dict(error)
        return None

    @property
    def events(self) -> list[Any]:
        """The events of a stream."""
        lines = [line for line in self.body.split(b"\n\n") if line.startswith(b"data: {")]
        return [json.loads(line[6:]) for line in lines]

    @property
    def done(self) -> bool:
        """Whether a stream ended as streams do."""
        return self.body.endswith(b"data: [DONE]\n\n")

    def texts(self) -> list[str]:
        """The texts of the choices, whole or streamed."""
        found: dict[int, str] = {}
        for part in [self.json] if self.json else self.events:
            for choice in part["choices"]:
                said = choice.get("delta") or choice.get("message") or choice
                text = said.get("content" if "text" not in choice else "text") or ""
                found[choice["index"]] = found.get(choice["index"], "") + text
        return [found[index] for index in sorted(found)]


def request(server: Server, path: str, body: Any, *, method: str = "POST", **headers: str) -> bytes:
    """The bytes of a request; a body that is not bytes is sent as JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    given = {
        "Host": f"{server.host}:{server.port}",
        "Authorization": f"Bearer {server.key}",
        "Content-Type": "application/json",
        "Content-Length": str(len(data)),
        "Connection": "close",
        **{name.replace("_", "-"): value for name, value in headers.items()},
    }
    lines = [f"{method} {path} HTTP/1.1", *(f"{k}: {v}" for k, v in given.items() if v), "", ""]
    return "\r\n".join(lines).encode() + data


def parse(data: bytes) -> Reply:
    """A reply from all bytes of a connection."""
    head, found, body = data.partition(b"\r\n\r\n")
    if not found:
        return Reply()
    if head.startswith(b"HTTP/1.1 100 "):  # to "Expect: 100-continue"
        return parse(body)
    lines = head.decode("latin-1").split("\r\n")
    headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:])}
    reply = Reply(int(lines[0].split()[1]), headers, body)
    if headers.get("transfer-encoding") == "chunked":
        reply.body, reply.complete = _dechunked(body)
    elif "content-length" in headers:
        reply.complete = len(body) == int(headers["content-length"])
    else:
        reply.complete = reply.status == 400  # the HTTP parser's own: until the connection ends
    return reply


def _dechunked(data: bytes) -> tuple[bytes, bool]:
    parts = []
    while True:
        size, found, data = data.partition(b"\r\n")
        length = int(size or b"0", 16) if found else 0
        if not found or len(data) < length + 2:
            return b"".join([*parts, data[:length]]), False
        if length == 0:
            return b"".join(parts), True
        parts.append(data[:length])
        data = data[length + 2 :]


class Wire:
    """A connection.

    Args:
        window: bytes that the system takes in unread; None: as it likes.
    """

    def __init__(self, server: Server, window: int | None = None) -> None:
        self._server, self._socket = server, socket.socket()
        self._socket.setblocking(False)
        if window is not None:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)

    async def __aenter__(self) -> Wire:
        loop = asyncio.get_running_loop()
        await loop.sock_connect(self._socket, (self._server.host, self._server.port))
        return self

    async def __aexit__(self, *error: object) -> None:
        self._socket.close()

    async def send(self, data: bytes) -> None:
        """Sends all of it."""
        await asyncio.get_running_loop().sock_sendall(self._socket, data)

    async def read(self, most: int = 65536) -> bytes:
        """What is there, at most so much; nothing at the end."""
        return await asyncio.get_running_loop().sock_recv(self._socket, most)

    async def read_all(self, begun: bytes = b"") -> bytes:
        """Everything until the server closes, in order or by a reset."""
        parts = [begun]
        with suppress(ConnectionError):
            while part := await self.read():
                parts.append(part)
        return b"".join(parts)

    def reset(self) -> None:
        """Has the connection end by a reset instead of in order."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def ask(server: Server, data: bytes, timeout_s: float = 120.0) -> Reply:
    """Sends a request and returns its reply; one that ends early is not `complete`."""
    received = b""
    try:
        async with asyncio.timeout(timeout_s), Wire(server) as wire:
            with suppress(ConnectionError):  # it may have answered before it was told everything
                await wire.send(data)
            while part := await wire.read():
                received += part
    except (ConnectionError, TimeoutError):
        pass
    return parse(received)
