"""One request inside the server: its choices, what the engine reports of them, and its deadlines.

A choice is one answer to one prompt; a request has n times its prompts of them. The worker's thread
writes into a choice and posts events; the event loop reads them here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from redwood.engine.stats import Stats
from redwood.sampling import SamplingParams
from redwood.server.errors import ApiError, as_api_error, full


@dataclass
class Event:
    """What happened to one choice.

    Args:
        choice: its index.
        started: it has a row now; nothing else is set.
        text, token_ids, logprobs, finish_reason: of a step; see `redwood.engine.engine.Step`.
        error: the choice has failed.
        trace: the step's tree, if it was asked for; see `redwood.server.trace`.
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
    """One answer to one prompt, on its way through the engine.

    Args:
        generation: the request it belongs to.
        index: in the answer.
        key: the engine's number, once it has one.
        stats: the engine's live statistics, from then on.
        last_s: when its last tokens came.
        tokens: of the answer so far.
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
        """Whose request it is."""
        return self.generation.owner


class Generation:
    """One request: choices, events, times.

    Args:
        prompts: a choice each.
        params: likewise.
        owner: from `Keys.owner`.
        trace: whether steps are to come with their trees.
        arrived_s: when the request came in, on the clock of `perf_counter`.

    Attributes: `events` (the worker posts to it), `started_s` and `first_token_s` (None before).
    """

    def __init__(
        self,
        prompts: Sequence[list[int]],
        params: Sequence[SamplingParams],
        *,
        owner: str = "open",
        trace: bool = False,
        arrived_s: float | None = None,
    ) -> None:
        self.owner, self.trace = owner, trace
        self.choices = [
            Choice(self, index, prompt, each)
            for index, (prompt, each) in enumerate(zip(prompts, params, strict=True))
        ]
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.arrived_s = perf_counter() if arrived_s is None else arrived_s
        self.started_s: float | None = None
        self.first_token_s: float | None = None
        self.ended = False

    async def follow(self, queue_timeout_s: float, timeout_s: float) -> AsyncIterator[Event]:
        """Yields the events of all choices until all have ended; `started` is kept to itself.

        Raises:
            ApiError: what failed in the engine; 429 when no row came in time; 504 at the deadline.
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
        waited = perf_counter() - self.arrived_s
        allowed = timeout_s - waited
        queued = self.started_s is None and queue_timeout_s < timeout_s
        if queued:
            allowed = queue_timeout_s - waited
        try:
            async with asyncio.timeout(max(0.0, allowed)):
                return await self.events.get()
        except TimeoutError:
            if queued:
                message = f"no row became free within {queue_timeout_s:g} seconds"
                raise full(message, "queue_timeout", retry_after_s=5) from None
            message = f"the request took longer than {timeout_s:g} seconds"
            headers = {"x-should-retry": "false"}
            raise ApiError(504, message, code="timeout", headers=headers) from None
