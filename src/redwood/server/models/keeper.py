"""Loads models that requests wait for, one after the other, and unloads what nobody uses.

All decisions are made in one task of the event loop, so that none of them needs a lock; loading and
unloading run in threads, and requests for other models are answered meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from threading import Thread
from time import monotonic
from typing import TYPE_CHECKING, TypeVar

from redwood.errors import ArgumentError, RedwoodError
from redwood.server.errors import ApiError, unavailable, wrong
from redwood.server.models.entry import Model
from redwood.server.models.metrics import JoinedMetrics
from redwood.server.models.room import Room, give_back, mapped_bytes

if TYPE_CHECKING:
    from redwood.engine.text import Engine
    from redwood.server.service import Service

_AGAIN_S = 10.0  # after a failure, until the next attempt: who asks meanwhile gets the same error
_ENDING_S = 10.0  # for requests to take the errors of an engine that has died
_SAVE_S = 10.0  # for what a model keeps in files, when the server ends in the middle of that
log = logging.getLogger("redwood.server")
T = TypeVar("T")


class Keeper:
    """Keeps the models that are wanted loaded, within a bound of memory.

    Args:
        models: all of them; the first to be unloaded is the one not used for longest.
        metrics: count loads and unloads.
        room: for their weights.
        patience_s: longest wait for models with requests to make room.
        idle_s: unload what nobody used for so many seconds; None: only for another model.
    """

    def __init__(
        self,
        models: Sequence[Model],
        metrics: JoinedMetrics,
        room: Room,
        patience_s: float,
        idle_s: float | None,
    ) -> None:
        self._models, self._metrics, self._room = models, metrics, room
        self._patience_s, self._idle_s = patience_s, idle_s
        self._order: list[Model] = []  # wanted, in order of arrival
        self._awake = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._watching: dict[Model, asyncio.Task[None]] = {}
        self._unloading: set[asyncio.Task[None]] = set()

    @property
    def used(self) -> int:
        """Bytes that the loaded models take."""
        return sum(model.size for model in self._models)

    def adopt(self, model: Model, engine: Engine) -> None:
        """Takes a model that was loaded elsewhere; before `start`.

        Raises:
            ArgumentError: it takes more memory than all models may.
        """
        size = max(mapped_bytes(engine), model.spec.need() or 0)
        most = self._room.most
        if most is not None and size > most:
            raise ArgumentError(_too_large(model, size, most))
        share = self._room.share(size)
        self._hold(model, model.spec.serve(engine, model.metrics, share), size)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Starts the task, and the engines of models that are loaded."""
        self._loop = loop
        for model in self._models:
            if model.service is not None:
                self._run(model, model.service)
        self._task = loop.create_task(self._keep())

    async def stop(self) -> None:
        """Ends the task; what a thread is loading is dropped, what one saves may be saved."""
        tasks = [task for task in (self._task, *self._watching.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._unloading:
            await asyncio.wait(self._unloading, timeout=_SAVE_S)

    def wake(self) -> None:
        """Has the task look again: a model is wanted, or has become idle."""
        self._awake.set()

    async def wait_for(self, model: Model) -> None:
        """Returns once a model is loaded, with a lease of it.

        Raises:
            ApiError: it cannot be loaded.
        """
        if model.fault is not None and monotonic() - model.fault[1] < _AGAIN_S:
            raise model.fault[0]
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        model.waiting.append(granted)
        if model not in self._order:
            self._order.append(model)
        self.wake()
        try:
            await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled() and granted.exception() is None:
                model.release()
            self.wake()
            raise

    async def _keep(self) -> None:
        while True:
            self._awake.clear()
            try:
                if (model := self._next()) is not None:
                    self._order.remove(model)
                    await self._bring(model)
                    continue
                await self._tidy()
            except Exception:  # a bug; the models that are loaded go on
                log.exception("loading or unloading a model failed")
            with suppress(TimeoutError):
                async with asyncio.timeout(self._until_due()):
                    await self._awake.wait()

    def _next(self) -> Model | None:
        """The first model that is wanted and can be brought. One whose engine has died cannot until
        its requests have taken their errors, which slow clients delay; others go first, and who
        waits for it does so for a bounded time."""
        for model in list(self._order):
            if not model.ending:
                return model
            if model.died_s is None:
                model.died_s = monotonic()
            if monotonic() >= model.died_s + _ENDING_S:
                self._order.remove(model)
                message = (
                    f"the engine of the model {model.name!r} is down, and not loaded again yet"
                )
                model.refuse(unavailable(message, "engine_dead"))
        return None

    async def _bring(self, model: Model) -> None:
        """Loads a model for those that wait, if any still do, or tells them why not."""
        try:
            await self._make_room(model)
            if model.wanted and model.service is None:
                await self._load(model)
                model.fault = None
            model.grant()
        except ApiError as error:
            model.refuse(error)
        except Exception as error:
            model.refuse(self._note_fault(model, error))
            await self._aside(partial(give_back, self._room.cuda))
        await self._fit()

    async def _make_room(self, model: Model) -> None:
        """Unloads others until a model fits; those with requests are waited for.

        Raises:
            ApiError: 400: it can never fit; 503: others had requests for too long.
            RedwoodError: it is not there.
        """
        need = 0
        if model.dead:
            await self._unload(model, "died")
        if model.service is None:
            need = model.measured or await self._aside(model.spec.need) or 0
        most = self._room.most
        if most is None or model.service is not None:
            return
        if need > most:
            raise wrong(_too_large(model, need, most), "model", "model_too_large")
        until = monotonic() + self._patience_s
        try:
            while model.wanted and (over := self.used + need - most) > 0:
                self._awake.clear()
                chosen = self._chosen(model, over)
                busy = any(each.leases for each in chosen)
                for each in self._models:  # an idle one may be used until the others are idle, too
                    each.closing = each in chosen and (each.leases > 0 or not busy)
                    if each.takes_requests:
                        each.grant()
                if busy:
                    await self._woken(model, until)
                else:  # one at a time: meanwhile a request may take another of them
                    await self._unload(chosen[0], "room")
        finally:
            for each in self._models:
                each.closing = False
                if each.takes_requests:
                    each.grant()

    def _chosen(self, model: Model, over: int) -> list[Model]:
        """Loaded models to be unloaded for another: idle ones first, the longest unused first."""
        others = [each for each in self._models if each.service is not None and each is not model]
        others.sort(key=lambda each: (each.leases > 0, each.used_s))
        chosen: list[Model] = []
        while over > 0 and others:
            chosen.append(others.pop(0))
            over -= chosen[-1].size
        return chosen

    async def _woken(self, model: Model, until: float) -> None:
        """Waits until something has changed.

        Raises:
            ApiError: 503: nothing has in time.
        """
        try:
            async with asyncio.timeout(max(0.0, until - monotonic())):
                await self._awake.wait()
        except TimeoutError:
            message = (
                f"there was no memory for the model {model.name!r} within "
                f"{self._patience_s:g} seconds: others are answering"
            )
            raise unavailable(message, "no_room_for_model") from None

    async def _load(self, model: Model) -> None:
        before, others = self._room.held(), self._others(model)
        quiet = not any(each.leases for each in others)
        model.state = "loading"
        log.info("loading the model %s", model.name)
        began = monotonic()
        try:
            service = await self._aside(partial(self._made, model, others))
            grown = self._room.held() - before if quiet else 0
            size = max(mapped_bytes(service.engine), grown, 0)
            self._hold(model, service, size or model.spec.need() or 0)
        except BaseException:
            model.state = "unloaded"
            raise
        self._run(model, service)
        self._metrics.loads.labels(model.name, "ok").inc()
        log.info("loaded the model %s in %.1f s", model.name, monotonic() - began)

    def _made(self, model: Model, others: Sequence[Model]) -> Service:
        """In a thread: its service, with its part of the memory for keys and values."""
        engine = model.spec.load()
        services = [each.service for each in others if each.service is not None]
        mapped = sum(mapped_bytes(each.engine) for each in services)
        size = max(mapped_bytes(engine), model.measured or model.spec.need() or 0)
        return model.spec.serve(engine, model.metrics, self._room.share(self.used + size, mapped))

    def _hold(self, model: Model, service: Service, size: int) -> None:
        model.service, model.state = service, "loaded"
        model.size = model.measured = size
        model.used_s, model.died_s = monotonic(), None

    def _run(self, model: Model, service: Service) -> None:
        """Starts the engine of a loaded model, and the task that sees it die."""
        assert self._loop is not None
        service.start(self._loop)
        self._watching[model] = self._loop.create_task(self._see_die(model, service))

    async def _see_die(self, model: Model, service: Service) -> None:
        await service.died.wait()
        if model.service is service:
            log.error("the engine of the model %s has died: it is loaded again", model.name)
            self.wake()

    async def _unload(self, model: Model, reason: str) -> None:
        """Unloads an idle model: what it keeps is saved, its memory given back."""
        service, model.service, model.state = model.service, None, "unloading"
        assert service is not None and not model.leases
        watching = self._watching.pop(model, None)
        if watching is not None:
            watching.cancel()
        log.info("unloading the model %s (%s)", model.name, reason)
        assert self._loop is not None
        ending = self._loop.create_task(self._end(service))
        self._unloading.add(ending)
        ending.add_done_callback(self._unloading.discard)
        del service
        try:
            await asyncio.shield(ending)
        except Exception:
            log.exception("what the model %s keeps could not be saved", model.name)
        finally:
            del ending
            model.metrics.unwatch()
            await self._aside(partial(give_back, self._room.cuda))
            model.state, model.size = "unloaded", 0
            self._metrics.unloads.labels(model.name, reason).inc()

    async def _end(self, service: Service) -> None:
        await service.stop()
        await self._aside(service.close)

    async def _tidy(self) -> None:
        """Unloads models that died, and those that were idle for long enough."""
        for model in self._models:
            if model.leases or model.wanted or model.service is None:
                continue
            if model.dead:
                await self._unload(model, "died")
            elif self._idle_s is not None and monotonic() - model.used_s >= self._idle_s:
                await self._unload(model, "idle")

    async def _fit(self) -> None:
        """Unloads idle models while more memory is used than may be: more than was predicted."""
        most = self._room.most
        while most is not None and self.used > most:
            idle = [m for m in self._models if m.service is not None and not m.leases]
            if not idle:
                return
            await self._unload(min(idle, key=lambda each: each.used_s), "room")

    def _until_due(self) -> float | None:
        """Seconds until the next model may have been idle for long enough, or been waited for."""
        now = monotonic()
        left = [m.died_s + _ENDING_S - now for m in self._order if m.died_s is not None]
        if self._idle_s is not None:
            loaded = [m for m in self._models if m.service is not None and not m.leases]
            left += [self._idle_s - (now - model.used_s) for model in loaded]
        return max(0.01, min(left)) if left else None

    def _others(self, model: Model) -> list[Model]:
        return [each for each in self._models if each is not model and each.service is not None]

    def _note_fault(self, model: Model, error: Exception) -> ApiError:
        """The error of those that wait for a model that cannot be loaded; the reason, which may
        hold paths of this machine, goes to the log."""
        known = isinstance(error, RedwoodError)
        log.error(
            "the model %s cannot be loaded: %s",
            model.name,
            error,
            exc_info=None if known else error,
        )
        self._metrics.loads.labels(model.name, "failed").inc()
        told = unavailable(
            f"the model {model.name!r} cannot be loaded ({type(error).__name__}): the server's log "
            "says why",
            "model_load_failed",
            retry_after_s=int(_AGAIN_S),
        )
        told.headers["x-should-retry"] = "false"
        model.fault = told, monotonic()
        return told

    async def _aside(self, call: Callable[[], T]) -> T:
        """What `call` returns, from a thread that the end of the process does not wait for."""
        loop = asyncio.get_running_loop()
        made: asyncio.Future[T] = loop.create_future()

        def tell(result: T | None, error: BaseException | None) -> None:
            if made.done():
                return
            if error is not None:
                made.set_exception(error)
            else:
                made.set_result(result)  # type: ignore[arg-type]

        def run() -> None:
            result, error = None, None
            try:
                result = call()
            except BaseException as raised:  # what is no `Exception` would end the event loop
                plain = isinstance(raised, Exception) and not isinstance(raised, StopIteration)
                error = raised if plain else RuntimeError(repr(raised))
            with suppress(RuntimeError):  # the loop is closed: the server has ended
                loop.call_soon_threadsafe(tell, result, error)

        Thread(target=run, name="redwood-loading", daemon=True).start()
        return await made


def _too_large(model: Model, size: int, most: int) -> str:
    return (
        f"the model {model.name!r} needs {size / 2**20:,.0f} MiB, more than the "
        f"{most / 2**20:,.0f} MiB that all models may take"
    )
