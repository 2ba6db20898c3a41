"""What stands behind the routes: one model, or several of which a request names one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from redwood.server.admission import Admission
from redwood.server.auth import Keys
from redwood.server.errors import ApiError
from redwood.server.generation import Choice
from redwood.server.metrics import Metrics
from redwood.server.settings import Settings

if TYPE_CHECKING:
    from redwood.server.service import Service


class Lease:
    """The use of a model by one request; while it is held, the model stays loaded.

    Args:
        service: of the model.
        end: called once, when it is not used any more.
    """

    def __init__(self, service: Service, end: Callable[[], None] = lambda: None) -> None:
        self.service = service
        self._end: Callable[[], None] | None = end

    def release(self) -> None:
        """Ends it; may be called again."""
        end, self._end = self._end, None
        if end is not None:
            end()


class Served(Protocol):
    """All that the routes and `Runner` need: a `Service`, or a `Pool` of several.

    Attributes:
        settings: `model_names` holds the names of all models, the default one first.
        admission: counts requests that are not queued yet, but for those in `waiting_for`.
        draining: new requests for answers are refused.
    """

    settings: Settings
    keys: Keys
    draining: bool

    @property
    def metrics(self) -> Metrics: ...
    @property
    def admission(self) -> Admission[Choice]: ...

    @property
    def died(self) -> asyncio.Event:
        """Set when nothing can be answered any more: the server ends."""
        ...

    @property
    def num_open(self) -> int:
        """Requests that are being answered."""
        ...

    @property
    def num_entering(self) -> int:
        """Requests that are not queued yet: they arrive, are being tokenised, or wait for a
        model."""
        ...

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begins to work, for this event loop."""
        ...

    async def stop(self) -> None:
        """Ends the threads."""
        ...

    def close(self) -> None:
        """Saves what is kept on disk; to be called once nothing runs."""
        ...

    def has(self, name: str) -> bool:
        """Whether a request for this model need not wait for it to be loaded."""
        ...

    def waiting_for(self, name: str) -> Admission[Choice]:
        """Returns what counts the requests that wait until a model is loaded: those for one take no
        places of others."""
        ...

    async def acquire(self, name: str, arrived_s: float) -> Lease:
        """Returns the model of this name, one of `Settings.model_names`, once it is loaded.

        Args:
            arrived_s: when the request did, on the clock of `perf_counter`.

        Raises:
            ApiError: it cannot be loaded, or not in time.
        """
        ...

    def cut(self, error: ApiError) -> int:
        """Ends all requests with an error; returns how many."""
        ...

    def trouble(self) -> str | None:
        """Returns what /health complains of; None: all is well."""
        ...

    def state(self) -> dict[str, Any]:
        """Returns what /health says besides."""
        ...

    def described(self, name: str) -> dict[str, Any]:
        """Returns what /v1/models says of a model."""
        ...

    def greeting(self) -> list[str]:
        """Returns lines for the operator: how much can be answered at once."""
        ...
