"""Tokenising beside the event loop: short texts do not wait for long ones.

Two queues with a thread each: one for short texts, in order of arrival, and one for long texts, the
shortest first. What the long queue holds is bounded; more is refused before it is read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from heapq import heappop, heappush
from itertools import count
from typing import TypeVar

from redwood.server.errors import full

SHORT = 2**15
"""Characters of a short text: some 10 ms."""

T = TypeVar("T")


class Encoders:
    """Runs what makes tokens of texts; for one event loop.

    Args:
        max_signs: characters that long texts may have together; a single one may have more.
    """

    def __init__(self, max_signs: int) -> None:
        self._max_signs = max_signs
        self.signs = 0
        self._short, self._long = Stepper("redwood-encode"), Stepper("redwood-encode-long")

    def close(self) -> None:
        """Ends the threads."""
        self._short.close()
        self._long.close()

    async def run(self, size: int, call: Callable[[], T]) -> T:
        """Returns what `call` returns, from a thread.

        Args:
            size: characters of its text.

        Raises:
            ApiError: 429 for a long text where too many wait.
        """
        if size <= SHORT:
            return await self._short.run(0, call)
        if self.signs and self.signs + size > self._max_signs:
            raise full(
                f"prompts of {self.signs} characters are being tokenised already; with this one "
                f"it would be more than {self._max_signs}",
                "queue_tokens_full",
            )
        self.signs += size
        try:
            return await self._long.run(size, call)
        finally:
            self.signs -= size


class Stepper:
    """A thread that takes the smallest of what waits, of equal ones the first.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, name)
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._numbers = count()
        self._busy = False

    def close(self) -> None:
        """Ends the thread once it has nothing to do."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def run(self, size: int, call: Callable[[], T]) -> T:
        """Returns what `call` returns; who stops waiting for it loses the place, if it waits."""
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()
        heappush(self._waiting, (size, next(self._numbers), turn))
        self._next()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._end()  # it was this one's turn just now
            raise
        made = loop.run_in_executor(self._pool, call)
        made.add_done_callback(self._ended)
        return await asyncio.shield(made)  # a call that runs keeps the thread until it ends

    def _next(self) -> None:
        while self._waiting and not self._busy:
            turn = heappop(self._waiting)[2]
            if not turn.done():
                self._busy = True
                turn.set_result(None)

    def _ended(self, made: asyncio.Future[T]) -> None:
        if not made.cancelled():
            made.exception()  # seen, should nobody wait for it any more
        self._end()

    def _end(self) -> None:
        self._busy = False
        self._next()
