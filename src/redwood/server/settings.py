"""The operator's settings: names, limits, times."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from ipaddress import ip_address

from redwood.errors import ArgumentError, check_count
from redwood.server.tools.names import FORMATS


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of the server. Times in seconds.

    Args:
        model_names: names under which the model is served; answers without a name use the first.
        host, port: where to listen; port 0: any free one.
        max_queue: choices that may wait for a row; more get a 429. A request has (number of
            prompts) x n choices.
        max_queue_tokens: prompt tokens that may wait.
        max_queue_per_key: choices of one API key that may wait; None: all of `max_queue` without
            keys or with one, else half.
        kv_tokens: tokens of prompts and answers that all rows together may hold; 0: no limit. None:
            what fits into free memory.
        max_connections: open at once; None: as many as the limit of open files allows.
        max_body_bytes: of a request.
        max_choices: choices of one request.
        max_output_tokens: of one answer; None: the rest of the context. A request that asks for
            more gets this many.
        body_timeout_s: for a request's body to arrive.
        queue_timeout_s: for a request to get its first row.
        request_timeout_s: from a request's arrival to the end of its answer.
        send_timeout_s: for a client to receive a part of its answer.
        ping_s: between keep-alive comments on a stream without events.
        drain_timeout_s: for open requests to end after SIGTERM.
        health_timeout_s: longest time between heartbeats of an engine that counts as alive.
        trace: whether requests may ask for the trees of their steps.
        metrics_without_key: whether /metrics needs no key.
        allowed_hosts: further values of the Host header that are accepted on a loopback address
            without keys. Others are refused, so that no web page can reach a private server through
            a domain of its own (DNS rebinding).
        tool_parser: the form of tool calls; None: as the model's chat template says.
        log_prompts: put prompts and answers into the log.

    Raises:
        ArgumentError: a value out of range; the message names it.
    """

    model_names: tuple[str, ...]
    host: str = "127.0.0.1"
    port: int = 8000
    max_queue: int = 256
    max_queue_tokens: int = 1_000_000
    max_queue_per_key: int | None = None
    kv_tokens: int | None = None
    max_connections: int | None = None
    max_body_bytes: int = 2 * 2**20
    max_choices: int = 16
    max_output_tokens: int | None = None
    body_timeout_s: float = 30.0
    queue_timeout_s: float = 120.0
    request_timeout_s: float = 600.0
    send_timeout_s: float = 30.0
    ping_s: float = 15.0
    drain_timeout_s: float = 30.0
    health_timeout_s: float = 60.0
    trace: bool = True
    metrics_without_key: bool = False
    allowed_hosts: tuple[str, ...] = ()
    tool_parser: str | None = None
    log_prompts: bool = False

    def __post_init__(self) -> None:
        if not self.model_names or not all(self.model_names):
            raise ArgumentError("model_names must hold a name")
        for name, least in (
            ("max_queue", 0),
            ("max_queue_tokens", 0),
            ("max_body_bytes", 1),
            ("max_choices", 1),
            ("port", 0),
        ):
            check_count(name, getattr(self, name), least)
        for name in ("max_queue_per_key", "max_connections", "max_output_tokens"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        if self.tool_parser is not None and self.tool_parser not in FORMATS:
            raise ArgumentError(
                f"tool_parser {self.tool_parser!r} must be one of {', '.join(FORMATS)}"
            )
        if self.kv_tokens is not None:
            check_count("kv_tokens", self.kv_tokens, 0)
        if self.port > 65535:
            raise ArgumentError(f"port {self.port} must be at most 65535")
        for field in fields(self):
            if field.name.endswith("_s"):
                value = getattr(self, field.name)
                shortest = 0.0 if field.name == "drain_timeout_s" else 1e-3
                if not (math.isfinite(value) and value >= shortest):
                    raise ArgumentError(f"{field.name} {value!r} must be a number of seconds")

    @property
    def on_loopback(self) -> bool:
        """Whether `host` can be reached from this machine only."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Returns whether an address or name is a loopback one."""
    if host.lower().rstrip(".") in ("localhost", "localhost.localdomain"):
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
