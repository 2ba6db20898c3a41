"""The server's listening socket, and whether it may be reachable from other machines."""

from __future__ import annotations

import socket

from redwood.errors import ArgumentError
from redwood.server.auth import Keys
from redwood.server.settings import Settings


def check_exposure(settings: Settings, keys: Keys, *, without_key: bool = False) -> None:
    """Raises ArgumentError for a server without API keys that other machines can reach.

    Args:
        without_key: the operator allows that.
    """
    if not settings.on_loopback and not len(keys) and not without_key:
        raise ArgumentError(
            f"host {settings.host} can be reached from other machines and there is no API key: "
            "give --api-key-file, or --allow-no-key if that is meant"
        )


def listen(settings: Settings) -> socket.socket:
    """Returns a bound socket, so that a port in use is found before a model is loaded.

    Raises:
        ArgumentError: the address or port cannot be bound.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        made = socket.socket(family, kind)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
        except BaseException:
            made.close()
            raise
    except OSError as error:
        raise ArgumentError(
            f"cannot listen on {settings.host} port {settings.port}: {error.strerror or error}"
        ) from error
    made.setblocking(False)
    return made


def address_of(made: socket.socket) -> str:
    """Returns the base URL of a bound socket."""
    host, port = made.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
