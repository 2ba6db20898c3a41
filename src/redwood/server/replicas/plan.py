"""The configuration of a deployment, to and from the values of a configuration file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from redwood.drafters.names import AUTO
from redwood.errors import ArgumentError, check_count
from redwood.server.auth import Keys, read_keys
from redwood.server.listening import check_exposure
from redwood.server.settings import Settings

NAME = "redwood"
_IMPORT_PATH = "redwood.server.replicas:application"
_MAX_ROWS = 64  # of `redwood.load`


@dataclass(frozen=True, kw_only=True)
class DeployPlan:
    """Replicas of one engine, and the router in front of them.

    Args:
        target, drafter: names, as for `redwood.load`.
        settings: of the server in each replica; host and port are those of Ray's proxies.
        engine: further options of `redwood.load`.
        replicas: engines; with `max_replicas`, the minimum of autoscaling.
        max_replicas: maximum of autoscaling; None: no autoscaling.
        target_ongoing: requests per engine that autoscaling aims at; None: its number of rows.
        replica_cpus, replica_gpus: what Ray reserves for each engine. An engine gets a thread for
            each of these processors, unless `engine` sets `threads`.
        routers: copies of the router.
        retries: how often a request is repeated on another engine, as long as no part of its answer
            was sent.
        log_format: of the log on stderr, "text" or "json".
        api_key_file: read where the application is built, as is REDWOOD_API_KEY.
        allow_no_key: as for `redwood serve`.

    Raises:
        ArgumentError: a value out of range; the message names it.
    """

    target: str
    settings: Settings
    drafter: str = AUTO
    engine: Mapping[str, Any] = field(default_factory=dict)
    replicas: int = 2
    max_replicas: int | None = None
    target_ongoing: float | None = None
    replica_cpus: float = 1.0
    replica_gpus: float = 0.0
    routers: int = 1
    retries: int = 2
    log_format: str = "text"
    api_key_file: str | None = None
    allow_no_key: bool = False

    def __post_init__(self) -> None:
        check_count("replicas", self.replicas)
        check_count("routers", self.routers)
        check_count("retries", self.retries, 0)
        if self.max_replicas is not None:
            check_count("max_replicas", self.max_replicas)
            if self.max_replicas < self.replicas:
                raise ArgumentError(
                    f"max_replicas {self.max_replicas} is less than replicas {self.replicas}"
                )
        elif self.target_ongoing is not None:
            raise ArgumentError("target_ongoing is for autoscaling: give max_replicas, too")
        if self.settings.port == 0:
            raise ArgumentError("port 0 must be a number: the proxy of each machine listens on it")
        for name, least in (("replica_cpus", 0.0), ("replica_gpus", 0.0), ("target_ongoing", 1e-3)):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= least):
                raise ArgumentError(f"{name} {value!r} must be a number of at least {least:g}")

    @property
    def share(self) -> float:
        """Fraction of free memory for each engine, as if all of them were on one machine."""
        return 1.0 / (self.max_replicas or self.replicas)

    @property
    def rows(self) -> int:
        """Choices that one engine decodes at once."""
        return int(self.engine.get("max_rows", _MAX_ROWS))

    @property
    def threads(self) -> int:
        """Threads of one engine on a CPU, where `engine` does not set them."""
        return max(1, int(self.replica_cpus))

    def keys(self) -> Keys:
        """Reads the API keys.

        Raises:
            ArgumentError: they cannot be read, or there are none although they are required.
        """
        keys = read_keys([], None if self.api_key_file is None else Path(self.api_key_file))
        check_exposure(self.settings, keys, without_key=self.allow_no_key)
        return keys

    @classmethod
    def from_args(cls, args: Mapping[str, Any]) -> DeployPlan:
        """Returns the plan of a configuration file's `args`.

        Args:
            args: fields of `DeployPlan`, those of `Settings` in `server` instead of `settings`.

        Raises:
            ArgumentError: a name that is unknown, or a value out of range.
        """
        given = dict(args)
        server = given.pop("server", {})
        _check_names("args.server", server, [each.name for each in fields(Settings)])
        _check_names("args", given, [e.name for e in fields(cls) if e.name != "settings"])
        missing = [
            name
            for name, values in (("target", given), ("model_names", server))
            if name not in values
        ]
        if missing:
            raise ArgumentError(f"args must hold {' and '.join(missing)}")
        lists = {name: tuple(value) for name, value in server.items() if isinstance(value, list)}
        return cls(settings=Settings(**{**server, **lists}), **given)

    def args(self) -> dict[str, Any]:
        """Returns the fields that differ from their defaults; `from_args` reads them."""
        made = _changed(self, "settings")
        return {**made, "server": _changed(self.settings)}

    def config(self) -> dict[str, Any]:
        """Returns a configuration for `serve run` and `serve deploy`."""
        entry = {
            "name": NAME,
            "route_prefix": "/",
            "import_path": _IMPORT_PATH,
            "args": self.args(),
        }
        http = {"host": self.settings.host, "port": self.settings.port}
        return {"http_options": http, "applications": [entry]}


def _check_names(where: str, given: Mapping[str, Any], known: list[str]) -> None:
    for name in given:
        if name not in known:
            raise ArgumentError(f"{where} holds {name!r}, which is none of {', '.join(known)}")


def _changed(value: Any, *without: str) -> dict[str, Any]:
    made = {}
    for each in fields(value):
        factory = each.default_factory
        default = each.default if factory is MISSING else factory()
        now = getattr(value, each.name)
        if each.name not in without and now != default:
            made[each.name] = list(now) if isinstance(now, tuple) else now
    return made
