"""Several models behind the routes: requests name one and get it, loaded first if need be."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

from redwood import __version__
from redwood.errors import ArgumentError
from redwood.server.admission import Admission
from redwood.server.auth import Keys
from redwood.server.errors import ApiError, too_long
from redwood.server.generation import Choice
from redwood.server.models.entry import Model, ModelSpec
from redwood.server.models.keeper import Keeper
from redwood.server.models.metrics import JoinedMetrics
from redwood.server.models.room import Room
from redwood.server.served import Lease
from redwood.server.service import most_per_key
from redwood.server.settings import Settings

if TYPE_CHECKING:
    from redwood.engine.text import Engine


class Pool:
    """Several models, each with a `Service` of its own while it is loaded; see `Served`.

    A model with requests is never unloaded. Whoever asks for one that is not loaded waits: for
    models that were asked for before, for room, at most `Settings.queue_timeout_s`, and for it.

    Args:
        specs: of the models; the first is the one that requests get that name none.
        settings: of the server; `model_names` is replaced by the names of all models.
        keys: API keys; None: every client is served.
        room: for their weights.
        idle_s: a model that nobody used for so many seconds is unloaded; None: only for another.
        rows: requests that may arrive at once besides those that may wait; as many may wait for
            each model that is not loaded.

    Raises:
        ArgumentError: two models have the same name.
    """

    def __init__(
        self,
        specs: Sequence[ModelSpec],
        settings: Settings,
        keys: Keys | None,
        room: Room,
        idle_s: float | None = None,
        rows: int = 64,
    ) -> None:
        self.settings, self.keys, self.draining = settings, keys or Keys(), False
        self._room = room
        self.metrics = JoinedMetrics(__version__, tuple(spec.name for spec in specs))
        self.models = [Model(spec, self.metrics.models[spec.name]) for spec in specs]
        self._named: dict[str, Model] = {}
        for model in self.models:
            for name in model.spec.settings.model_names:
                if name in self._named:
                    raise ArgumentError(f"two models are called {name!r}")
                self._named[name] = model
        if tuple(self._named) != settings.model_names:
            raise ArgumentError("model_names must be those of all models, in order")
        self.keeper = Keeper(self.models, self.metrics, room, settings.queue_timeout_s, idle_s)
        bounds = settings.max_queue, settings.max_queue_tokens, most_per_key(settings, self.keys)
        self.admission: Admission[Choice] = Admission(rows, *bounds)
        self._waiting: dict[Model, Admission[Choice]] = {
            model: Admission(rows, *bounds) for model in self.models
        }
        self.died = asyncio.Event()  # never set: a model whose engine has died is loaded again
        self.created = int(time.time())
        self._watch()

    def adopt(self, engine: Engine) -> Pool:
        """Takes the default model, which was loaded before the server listens; returns itself.

        Raises:
            ArgumentError: it takes more memory than all models may.
        """
        self.keeper.adopt(self.models[0], engine)
        return self

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Starts the threads of what is loaded, and loading and unloading."""
        self.keeper.start(loop)

    async def stop(self) -> None:
        """Ends the threads; a model that is just being loaded is let go."""
        await self.keeper.stop()
        for model in self.models:
            if model.service is not None:
                await model.service.stop()

    def close(self) -> None:
        """Saves what the loaded models keep on disk; to be called once nothing runs."""
        for model in self.models:
            if model.service is not None:
                model.service.close()

    @property
    def num_open(self) -> int:
        """Requests that are being answered."""
        return sum(model.leases for model in self.models)

    @property
    def num_entering(self) -> int:
        """See `Served.num_entering`."""
        counted = (self.admission, *self._waiting.values())
        return sum(each.num_entering for each in counted)

    def has(self, name: str) -> bool:
        """Whether a model is loaded and takes requests."""
        return self._named[name].takes_requests

    def waiting_for(self, name: str) -> Admission[Choice]:
        """See `Served.waiting_for`."""
        return self._waiting[self._named[name]]

    async def acquire(self, name: str, arrived_s: float) -> Lease:
        """Returns a model once it is loaded.

        Raises:
            ApiError: 400: it is larger than all models may be; 503: it cannot be loaded, or there
                was no room for it in time; 504: the request's time is over.
        """
        model = self._named[name]
        if model.takes_requests:
            model.leases += 1
        else:
            most = self.settings.request_timeout_s
            try:
                async with asyncio.timeout(max(0.0, most - (perf_counter() - arrived_s))):
                    await self.keeper.wait_for(model)
            except TimeoutError:
                raise too_long(most) from None
        assert model.service is not None  # while it is leased
        return Lease(model.service, partial(self._release, model))

    def _release(self, model: Model) -> None:
        model.release()
        self.keeper.wake()

    def cut(self, error: ApiError) -> int:
        """Ends all requests, and all that wait for a model, with an error; returns how many."""
        waiting = sum(not each.done() for model in self.models for each in model.waiting)
        for model in self.models:
            model.refuse(error)
        running = [model.service for model in self.models if model.service is not None]
        return waiting + sum(service.cut(error) for service in running)

    def trouble(self) -> str | None:
        """Returns the trouble of the first loaded model that has some. One whose engine has died is
        none: it is loaded again for the next request."""
        for model in self.models:
            if model.service is not None and not model.dead:
                if (found := model.service.trouble()) is not None:
                    return found
        return None

    def state(self) -> dict[str, Any]:
        """Returns what /health says besides: sums, and the state of each model."""
        loaded = [model.service for model in self.models if model.service is not None]
        return {
            "heartbeat_age_s": round(
                max((each.worker.heartbeat_age_s for each in loaded), default=0.0), 3
            ),
            "running": sum(each.admission.num_running for each in loaded),
            "waiting": sum(each.admission.num_waiting for each in loaded),
            "models": {model.name: _state_of(model) for model in self.models},
        }

    def described(self, name: str) -> dict[str, Any]:
        """Returns what /v1/models says of a model; its context is known while it is loaded."""
        model = self._named[name]
        made: dict[str, Any] = {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": "redwood",
        }
        if model.service is not None:
            made = model.service.described(name) | {"created": self.created}
        return {**made, "status": {"value": _state_of(model)}}

    def greeting(self) -> list[str]:
        """Returns lines for the operator."""
        names = ", ".join(model.name for model in self.models)
        most = self._room.most
        bound = "without a bound" if most is None else f"in {most / 2**30:.1f} GiB"
        return [f"{len(self.models)} models, loaded when asked for {bound}: {names}"]

    def _watch(self) -> None:
        watch = self.metrics.watch
        most = self._room.most
        bound = float("inf") if most is None else float(most)
        watch("models_memory_limit_bytes", "That the weights of all may take.", lambda: bound)
        watch(
            "num_requests_preparing",
            "Requests that arrive, are made into tokens, or wait for their model.",
            lambda: self.num_entering,
        )
        for model in self.models:
            self.metrics.watch_model(
                model.name, partial(_is_loaded, model), partial(_size_of, model)
            )


def _state_of(model: Model) -> str:
    """Its state; "failed" where it could not be loaded last."""
    if model.state == "unloaded" and model.fault is not None:
        return "failed"
    return model.state


def _is_loaded(model: Model) -> float:
    return float(model.service is not None)


def _size_of(model: Model) -> float:
    return float(model.size)
