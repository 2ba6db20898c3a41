"""The one thread that owns the engine.

It takes choices off the queue, makes steps, and posts their results to the event loop. /health
reports the age of its heartbeat. An error in a step ends the choices that were in it and no others;
only the death of the thread ends the server.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from threading import Event as Flag
from threading import Thread
from time import monotonic, perf_counter
from typing import TYPE_CHECKING

from redwood.engine.request import Step
from redwood.errors import ArgumentError, RedwoodError
from redwood.sampling import SamplingParams
from redwood.server.admission import Admission
from redwood.server.errors import unavailable
from redwood.server.generation import Choice, Event, Generation
from redwood.server.memory import Memory
from redwood.server.metrics import Metrics
from redwood.server.tables import OwnTables
from redwood.server.tokens import TokenTexts
from redwood.server.trace import describe

if TYPE_CHECKING:
    from redwood.engine.text import Engine

_IDLE_S = 0.5  # between heartbeats when there is nothing to do
_FAILURES = 3  # steps in a row that raise, after which the engine counts as broken
log = logging.getLogger("redwood.server")


class Worker:
    """Runs an engine for an event loop.

    Args:
        engine: only this thread calls it from now on, except for `encode`.
        admission: the queue of choices.
        metrics: count the steps.
        memory: keeps finished answers to draft from; None: they are not kept.
        tables: a table for each owner; None: all draft from the engine's, if it has one.
        namespace_of: name of an owner that stays when keys change places: owners with another one
            share no keys and values.

    Attributes: `died`: set in the event loop when the thread has ended.
    """

    def __init__(
        self,
        engine: Engine,
        admission: Admission[Choice],
        metrics: Metrics,
        memory: Memory | None = None,
        tables: OwnTables | None = None,
        namespace_of: Callable[[str], str] = str,
    ) -> None:
        self.engine, self.admission, self._memory = engine, admission, memory
        self._tables, self._namespace_of = tables, namespace_of
        self._metrics, self._texts = metrics, TokenTexts(engine.tokenizer)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = Thread(target=self._main, name="redwood-engine", daemon=True)
        self._wake, self._stop = Flag(), Flag()
        self._cancelled: deque[Generation] = deque()
        self._running: dict[int, Choice] = {}
        self._beat_s = monotonic()
        self._failures = 0
        self.died = asyncio.Event()

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Starts the thread; events are posted to `loop`."""
        self._loop = loop
        self._beat_s = monotonic()
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Ends the thread after the step it is in."""
        self._stop.set()
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def submit(self, generation: Generation) -> None:
        """Queues a request.

        Raises:
            ApiError: 429: the queue is full; 503: the thread is dead.
        """
        if self.alive:
            self.admission.push(generation.choices)
            self._wake.set()
        if not self.alive:  # checked again: it may have died in the meantime
            self.admission.remove(generation.choices)
            raise unavailable("the engine is down", "engine_dead")

    def cancel(self, generation: Generation) -> None:
        """Removes a request's choices from the queue and, after the current step, the engine."""
        self.admission.remove(generation.choices)
        self._cancelled.append(generation)
        self._wake.set()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def heartbeat_age_s(self) -> float:
        """Seconds since the thread last began a step, or was last idle."""
        return monotonic() - self._beat_s

    def trouble(self, timeout_s: float) -> str | None:
        """Returns "engine_dead", "engine_stalled" or "engine_failing"; None: all is well.

        Args:
            timeout_s: age of the heartbeat from which on the engine counts as stalled.
        """
        if not self.alive:
            return "engine_dead"
        if self.heartbeat_age_s > timeout_s:
            return "engine_stalled"
        return "engine_failing" if self._failures >= _FAILURES else None

    def _main(self) -> None:
        try:
            while not self._stop.is_set():
                self._beat_s = monotonic()
                self._wake.clear()
                self._drop_cancelled()
                self._admit()
                if self.engine.busy:
                    self._step()
                else:
                    self._wake.wait(_IDLE_S)
        except BaseException:
            log.critical("the engine's thread has died", exc_info=True)
        finally:
            error = unavailable("the engine is down", "engine_dead")
            self._fail(list(self._running.values()), error)
            while (choice := self.admission.pop()) is not None:
                self.admission.done()
                self._post([(choice.generation, Event(choice.index, error=error))])
            self._call(self.died.set)

    def _drop_cancelled(self) -> None:
        while self._cancelled:
            for choice in self._cancelled.popleft().choices:
                if choice.key in self._running:
                    self._end(choice)

    def _admit(self) -> None:
        """Moves choices from the queue to free rows of the engine."""
        while (choice := self.admission.pop()) is not None:
            try:
                choice.key = self.engine.add(choice.prompt, self._salted(choice))
            except Exception as error:
                self.admission.done()
                self._count_error(error)
                self._post([(choice.generation, Event(choice.index, error=error))])
                continue
            choice.stats = self.engine.stats(choice.key)
            if self._memory is not None:
                self._memory.recall(choice)
            if self._tables is not None:
                self._tables.recall(choice)
            choice.last_s = perf_counter()
            self._running[choice.key] = choice
            self._metrics.queue_s.observe(choice.last_s - choice.generation.arrived_s)
            self._post([(choice.generation, Event(choice.index, started=True))])

    def _salted(self, choice: Choice) -> SamplingParams:
        """Its parameters, with its owner in the salt."""
        salt = f"{self._namespace_of(choice.owner)}\0{choice.params.cache_salt}"
        return replace(choice.params, cache_salt=salt)

    def _step(self) -> None:
        try:
            steps = self.engine.step()
        except Exception as error:
            self._failures += 1
            self._count_error(error)
            ended = [choice for choice in self._running.values() if not self._in_engine(choice)]
            self._fail(ended or list(self._running.values()), error)
            return
        if steps:
            self._failures = 0
        now = perf_counter()
        events = []
        for step in steps:
            choice = self._running.get(step.request)
            if choice is None:
                continue
            try:
                events.append((choice.generation, self._event(choice, step, now)))
            except Exception as error:
                self._count_error(error)
                self._fail([choice], error)
        self._post(events)

    def _event(self, choice: Choice, step: Step, now: float) -> Event:
        """Counts a step of a choice and ends it if the step was its last; returns its event."""
        generation = choice.generation
        if step.error is not None:
            self._count_error(step.error)
            self._end(choice)
            return Event(choice.index, error=step.error)
        self._metrics.count_step(step)
        choice.tokens += step.token_ids
        if choice.stats.num_generated_tokens > len(step.token_ids):
            self._metrics.token_s.observe((now - choice.last_s) / len(step.token_ids))
        else:
            self._metrics.prompt_tokens.inc(len(choice.prompt))
            self._metrics.first_token_s.observe(now - generation.arrived_s)
        choice.last_s = now
        if step.finish_reason is not None:
            self._metrics.prediction_accepted.inc(choice.stats.num_prediction_tokens_accepted)
            self._metrics.prediction_rejected.inc(choice.stats.num_prediction_tokens_rejected)
            self._end(choice)
            if self._memory is not None:
                self._memory.keep(choice)
        return Event(
            choice.index,
            text=step.text,
            token_ids=step.token_ids,
            logprobs=step.logprobs,
            finish_reason=step.finish_reason,
            trace=describe(step, choice.stats, self._texts) if generation.trace else None,
        )

    def _in_engine(self, choice: Choice) -> bool:
        """Whether the engine still has this choice."""
        try:
            self.engine.stats(choice.key or 0)
        except ArgumentError:
            return False
        return True

    def _end(self, choice: Choice) -> None:
        """Takes a choice out of the engine, if it is still there, and frees its row."""
        if choice.key is None or self._running.pop(choice.key, None) is None:
            return
        self.admission.done()
        try:
            self.engine.cancel(choice.key)
        except Exception:
            log.exception("a request could not be taken out of the engine")

    def _fail(self, choices: Sequence[Choice], error: BaseException) -> None:
        for choice in choices:
            self._end(choice)
        self._post([(each.generation, Event(each.index, error=error)) for each in choices])

    def _count_error(self, error: BaseException) -> None:
        """Counts an error; an unexpected one is logged with its traceback."""
        self._metrics.engine_errors.labels(type(error).__name__).inc()
        if not isinstance(error, RedwoodError):
            log.error("a step of the engine failed", exc_info=error)

    def _post(self, events: Sequence[tuple[Generation, Event]]) -> None:
        if events:
            self._call(_deliver, events)

    def _call(self, function: object, *args: object) -> None:
        assert self._loop is not None and callable(function)
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the loop is closed: the server has ended
            log.debug("an event came after the end")


def _deliver(events: Sequence[tuple[Generation, Event]]) -> None:
    for generation, event in events:
        generation.events.put_nowait(event)
