"""Runs a deployment on this machine: starts Ray, serves, drains, stops Ray."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from threading import Event as Flag
from typing import Any

import ray
from ray import serve

from redwood.errors import ArgumentError
from redwood.server.replicas.deployments import ROUTER, build
from redwood.server.replicas.plan import NAME, DeployPlan

_EVERY_S = 0.2
_GRACE_S = 3.0  # for requests that were cut to end
_CALL_S = 5.0  # for a router to answer a call
_STORE_BYTES = (
    2**29
)  # of Ray's object store, which holds requests and answers; default: 30 % of RAM


def run(plan: DeployPlan, ready: Callable[[str], None]) -> int:
    """Runs a plan until SIGTERM or Ctrl-C, which drains; a second signal cuts at once.

    Args:
        ready: called with the base URL once every replica listens.

    Raises:
        ArgumentError: the machine has too few processors or GPUs; and see `build`.
    """
    application = build(plan)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry
    ray.init(
        address="local",
        include_dashboard=False,
        object_store_memory=_STORE_BYTES,
        logging_level=logging.WARNING,
    )
    try:
        _check_resources(plan)
        settings = plan.settings
        serve.start(http_options={"host": settings.host, "port": settings.port})
        serve.run(application, name=NAME, route_prefix="/")
        stop, cut = _signals()
        ready(f"http://{settings.host}:{settings.port}")
        while not stop.wait(_EVERY_S):
            continue
        _drain(settings.drain_timeout_s, cut)
    finally:
        serve.shutdown()
        ray.shutdown()
    return 0


def _check_resources(plan: DeployPlan) -> None:
    """Refuses replicas that do not fit into this machine; Ray would wait for ever."""
    have = ray.cluster_resources()
    for kind, each in (("CPU", plan.replica_cpus), ("GPU", plan.replica_gpus)):
        if plan.replicas * each > have.get(kind, 0.0):
            raise ArgumentError(
                f"{plan.replicas} replicas with {each:g} {kind} each do not fit into the "
                f"{have.get(kind, 0.0):g} of this machine: lower --replicas or --replica-"
                f"{kind.lower()}s"
            )


def _signals() -> tuple[Flag, Flag]:
    """Flags that the first and the second signal set."""
    stop, cut = Flag(), Flag()

    def note(number: int, frame: Any) -> None:
        (cut if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    return stop, cut


def _drain(patience_s: float, cut: Flag) -> None:
    router = serve.get_deployment_handle(ROUTER, NAME)

    def call(method: str) -> int:
        with suppress(Exception):  # a router that is gone has nothing open
            return sum(router.broadcast(method).results(timeout_s=_CALL_S))
        return 0

    deadline = time.monotonic() + patience_s
    while call("drain") and not cut.is_set() and time.monotonic() < deadline:
        cut.wait(_EVERY_S)
    deadline = time.monotonic() + _GRACE_S
    while call("cut") and time.monotonic() < deadline:
        time.sleep(_EVERY_S)
