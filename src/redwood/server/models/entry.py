"""One of several models: how it is loaded, what it is doing, who uses it and who waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING

from redwood.server.errors import ApiError
from redwood.server.metrics import Metrics
from redwood.server.settings import Settings

if TYPE_CHECKING:
    from redwood.engine.text import Engine
    from redwood.server.service import Service


@dataclass(frozen=True)
class ModelSpec:
    """How one model is loaded and served. All of it is called in threads other than the event loop.

    Args:
        settings: of this model: its names first of all.
        load: returns its engine; raises what `redwood.load` raises.
        serve: (engine, metrics, share of free memory for keys and values) -> its service.
        need: returns the bytes that its weights are predicted to take; None where that is not
            known. Raises RedwoodError if the model is not there.
    """

    settings: Settings
    load: Callable[[], Engine]
    serve: Callable[[Engine, Metrics, float], Service]
    need: Callable[[], int | None]

    @property
    def name(self) -> str:
        """What it is called in the log and in metrics."""
        return self.settings.model_names[0]


@dataclass(eq=False)
class Model:
    """A model that may be loaded. All but `spec` is changed by the event loop alone.

    Args:
        metrics: count its steps; they outlive its unloading.
        service: while it is loaded and not being unloaded.
        state: "unloaded", "loading", "loaded" or "unloading".
        leases: requests that use it now.
        waiting: a future for each request that waits until it is loaded.
        closing: it is to be unloaded for another one, so that new requests wait behind that one.
        size: bytes that it takes, 0 while it is not loaded.
        measured: what it took when it was loaded last.
        used_s: when a request last began or ended, on the clock of `monotonic`.
        died_s: when requests were first seen to hold it although its engine has died, likewise.
        fault: why it could not be loaded last, and when.
    """

    spec: ModelSpec
    metrics: Metrics
    service: Service | None = None
    state: str = "unloaded"
    leases: int = 0
    waiting: list[asyncio.Future[None]] = field(default_factory=list)
    closing: bool = False
    size: int = 0
    measured: int | None = None
    used_s: float = field(default_factory=monotonic)
    died_s: float | None = None
    fault: tuple[ApiError, float] | None = None

    @property
    def name(self) -> str:
        """What it is called in the log and in metrics."""
        return self.spec.name

    @property
    def dead(self) -> bool:
        """Whether it is loaded, and the thread of its engine has ended."""
        return self.service is not None and self.service.died.is_set()

    @property
    def ending(self) -> bool:
        """Whether its engine has died, and requests have not taken their errors yet."""
        return self.dead and self.leases > 0

    @property
    def takes_requests(self) -> bool:
        """Whether a request gets it at once."""
        return self.service is not None and not self.closing and not self.dead

    @property
    def wanted(self) -> bool:
        """Whether a request waits for it."""
        return any(not each.done() for each in self.waiting)

    def grant(self) -> None:
        """Gives it to all that wait; they hold a lease from now on."""
        for each in self.waiting:
            if not each.done():
                self.leases += 1
                each.set_result(None)
        self.waiting.clear()

    def refuse(self, error: ApiError) -> None:
        """Fails all that wait."""
        for each in self.waiting:
            if not each.done():
                each.set_exception(error)
        self.waiting.clear()

    def release(self) -> None:
        """Ends a lease."""
        self.leases -= 1
        self.used_s = monotonic()
