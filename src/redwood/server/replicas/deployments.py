"""The plan as deployments of Ray Serve: their options, and how the router calls the engines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RequestCancelledError,
)
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp, Message

from redwood.server import logs
from redwood.server.auth import Keys
from redwood.server.errors import ApiError, full, unavailable
from redwood.server.replicas.engines import Call, Replica, open_engine
from redwood.server.replicas.gathered import Page
from redwood.server.replicas.plan import DeployPlan
from redwood.server.replicas.router import ReplicaLost, Router

ENGINE, ROUTER = "engine", "router"
_READ_S = 5.0  # for a replica to return one of its pages
_MARGIN_S = 10.0  # added to our own time limits, so that they come before Ray's
_EXTRA_REQUESTS = 8  # requests that need no row: /v1/models and the like
_ROUTER_ONGOING = 10_000
_LOGGING = {"log_level": "WARNING", "enable_access_log": False}  # we log requests ourselves


def build(plan: DeployPlan) -> Any:
    """Returns the application.

    Raises:
        ArgumentError: API keys that cannot be read, or are missing.
    """
    keys = plan.keys()
    settings = plan.settings
    engine = serve.deployment(_Engine).options(
        name=ENGINE,
        ray_actor_options={"num_cpus": plan.replica_cpus, "num_gpus": plan.replica_gpus},
        max_ongoing_requests=plan.rows + settings.max_queue + _EXTRA_REQUESTS,
        max_queued_requests=plan.rows + settings.max_queue,
        graceful_shutdown_timeout_s=settings.drain_timeout_s + _MARGIN_S,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=5.0,
        health_check_timeout_s=15.0,
        logging_config=_LOGGING,
        **_scale(plan),
    )
    router = serve.deployment(_Router).options(
        name=ROUTER,
        num_replicas=plan.routers,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=_ROUTER_ONGOING,
        graceful_shutdown_timeout_s=settings.request_timeout_s + 2 * _MARGIN_S,
        graceful_shutdown_wait_loop_s=0.5,
        logging_config=_LOGGING,
        max_surge_percent=100,  # at an update, the new one starts before the old one stops
    )
    return router.bind(plan, keys, engine.bind(plan, keys))


def _scale(plan: DeployPlan) -> dict[str, Any]:
    if plan.max_replicas is None:
        return {"num_replicas": plan.replicas}
    scaling = {
        "min_replicas": plan.replicas,
        "initial_replicas": plan.replicas,
        "max_replicas": plan.max_replicas,
        "target_ongoing_requests": plan.target_ongoing or plan.rows,
    }
    return {"autoscaling_config": scaling}


class _Engine:
    """A replica of the engine, in a process of its own."""

    async def __init__(self, plan: DeployPlan, keys: Keys) -> None:  # type: ignore[misc]  # Ray awaits it
        logs.set_up(plan.log_format)
        engine = await asyncio.to_thread(open_engine, plan)
        name = serve.get_replica_context().replica_id.unique_id
        self._replica = Replica(name, engine, plan.settings, keys, share=plan.share)
        await self._replica.start()

    async def serve(self, call: Call) -> AsyncGenerator[list[Message]]:
        """Answers a request."""
        async for batch in self._replica.serve(call):
            yield batch

    async def read(self, path: str) -> Page:
        """See `Replica.read`."""
        return await self._replica.read(path)

    def check_health(self) -> None:
        """Called by Ray, which replaces the replica if it raises."""
        self._replica.check_health()


@serve.ingress()
class _Router:
    """A copy of the router, in a process of its own."""

    def __init__(self, plan: DeployPlan, keys: Keys, engines: DeploymentHandle) -> None:
        logs.set_up(plan.log_format)
        name = serve.get_replica_context().replica_id.unique_id
        self._router = Router(name, _Handles(engines), plan.settings, keys, plan.retries)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Ray Serve; returns the ASGI application."""
        return self._router

    async def drain(self) -> int:
        """Refuses new requests; returns how many are still being answered."""
        self._router.draining = True
        return self._router.num_open

    async def cut(self) -> int:
        """Ends all open requests with an error; returns how many."""
        self._router.draining = True
        return self._router.cut()


class _Handles:
    """`Engines` through handles of Ray Serve."""

    def __init__(self, engines: DeploymentHandle) -> None:
        self._engines = engines
        self._streams = engines.options(stream=True)

    async def ask(self, call: Call) -> AsyncGenerator[list[Message]]:
        """See `Engines.ask`."""
        response = self._streams.serve.remote(call)
        ended = False
        try:
            async for batch in response:
                yield batch
            ended = True
        except BackPressureError:
            ended = True
            raise full("every engine is full") from None
        except DeploymentUnavailableError:
            ended = True
            raise unavailable("there is no engine", "no_replica") from None
        except RayTaskError as error:
            ended = True
            raise ApiError(500, "the engine's server failed", code="internal_error") from error
        except (RayError, RequestCancelledError) as error:
            raise ReplicaLost(type(error).__name__) from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise ReplicaLost("cancelled by the replica") from None
        finally:
            if not ended:
                response.cancel()

    async def read(self, path: str) -> list[Page]:
        """See `Engines.read`; if one of them is stuck, returns the page of a single other one."""
        try:
            pages = await self._engines.broadcast("read", path).results_async(
                timeout_s=_READ_S, return_exceptions=True
            )
            return [page for page in pages if isinstance(page, tuple)]
        except DeploymentUnavailableError:
            return []
        except TimeoutError:
            pass
        try:
            async with asyncio.timeout(_READ_S):
                return [await self._engines.read.remote(path)]
        except (RayError, TimeoutError):
            return []
