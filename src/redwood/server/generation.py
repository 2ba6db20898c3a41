"""One request inside the server: its choices, the events of the engine, and its deadlines.

A choice is one answer to one prompt; a request has (number of prompts) x n of them. The worker's
thread updates the choices and posts events; the event loop reads the events here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from redwood.engine.stats import Stats
from redwood.sampling import SamplingParams
from redwood.server.errors import as_api_error, full, too_long
from redwood.server.tools.reading import PlainReader, Reader


@dataclass
class Event:
    """What happened to one choice.

    Args:
        choice: its index.
        started: it has got a row; the other fields are not set.
        text, token_ids, logprobs, finish_reason: of a step; see `redwood.engine.engine.Step`.
        error: why the choice has failed; None: it has not.
        trace: the step's tree, if the request asked for it; see `redwood.server.trace`.
    """

    choice: int
    started: bool = False
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: Sequence[Any] | None = None
    finish_reason: str | None = None
    error: BaseException | None = None
    trace: dict[str, Any] | None = None


@dataclass(eq=False)
class Choice:
    """One answer to one prompt.

    Args:
        generation: the request it belongs to.
        index: in the response's `choices`.
        prompt: token ids.
        params: how to sample.
        key: the engine's number of it; None while it waits.
        stats: the engine's statistics of it, updated at every step.
        last_s: when its last tokens were made, on the clock of `perf_counter`.
        tokens: token ids of the answer so far.
    """

    generation: Generation
    index: int
    prompt: list[int]
    params: SamplingParams
    key: int | None = None
    stats: Stats = field(default_factory=Stats)
    last_s: float = 0.0
    tokens: list[int] = field(default_factory=list)

    @property
    def owner(self) -> str:
        """The API key of the request, by name; see `Keys.owner`."""
        return self.generation.owner


class Generation:
    """One request: choices, events, times.

    Args:
        prompts: token ids of the prompt of each choice.
        params: of each choice.
        owner: from `Keys.owner`.
        trace: whether events carry the trees of their steps.
        arrived_s: when the request arrived, on the clock of `perf_counter`.
        readers: of the choices' texts; None: text is text.

    Attributes: `events`: queue that the worker posts to; `queued_s`: since when it waits for a row,
    later than its arrival if its model had to be loaded; `started_s`, `first_token_s`: when the
    first choice got a row, and the first token was made, None before; `ended`: all choices have.
    """

    def __init__(
        self,
        prompts: Sequence[list[int]],
        params: Sequence[SamplingParams],
        *,
        owner: str = "open",
        trace: bool = False,
        arrived_s: float | None = None,
        readers: Sequence[Reader] | None = None,
    ) -> None:
        self.owner, self.trace = owner, trace
        self.readers = [PlainReader() for _ in prompts] if readers is None else list(readers)
        self.choices = [
            Choice(self, index, prompt, each)
            for index, (prompt, each) in enumerate(zip(prompts, params, strict=True))
        ]
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.arrived_s = perf_counter() if arrived_s is None else arrived_s
        self.queued_s = self.arrived_s
        self.started_s: float | None = None
        self.first_token_s: float | None = None
        self.ended = False

    async def follow(self, queue_timeout_s: float, timeout_s: float) -> AsyncIterator[Event]:
        """Yields the events of all choices until all have ended, but not those with `started`.

        Raises:
            ApiError: the engine failed; 429: no row within `queue_timeout_s`; 504: not complete
                within `timeout_s`.
        """
        left = len(self.choices)
        while left:
            event = await self._next(queue_timeout_s, timeout_s)
            if event.error is not None:
                raise as_api_error(event.error)
            if event.started:
                self.started_s = self.started_s or perf_counter()
                continue
            if self.first_token_s is None:
                self.first_token_s = perf_counter()
            left -= event.finish_reason is not None
            self.ended = left == 0
            yield event

    async def _next(self, queue_timeout_s: float, timeout_s: float) -> Event:
        now = perf_counter()
        allowed = timeout_s - (now - self.arrived_s)
        in_queue = queue_timeout_s - (now - self.queued_s)
        queued = self.started_s is None and in_queue < allowed
        if queued:
            allowed = in_queue
        try:
            async with asyncio.timeout(max(0.0, allowed)):
                return await self.events.get()
        except TimeoutError:
            if queued:
                message = f"no row became free within {queue_timeout_s:g} seconds"
                raise full(message, "queue_timeout", retry_after_s=5) from None
            raise too_long(timeout_s) from None
