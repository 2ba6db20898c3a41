"""Tokenisation in threads of its own, so that short texts do not wait for long ones.

Two queues with a thread each: one for short texts, in order of arrival, and one for long texts,
shortest first. The characters in the long queue are bounded; a text beyond that gets a 429.
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
"""Most characters of a short text, which takes about 10 ms."""

T = TypeVar("T")


class Encoders:
    """Runs tokenisation in threads; for one event loop.

    Args:
        max_chars: characters that all long texts together may have; a text alone may have more.
    """

    def __init__(self, max_chars: int) -> None:
        self._max_chars = max_chars
        self.chars = 0
        self._short, self._long = (
            ShortestFirst("redwood-encode"),
            ShortestFirst("redwood-encode-long"),
        )

    def close(self) -> None:
        """Ends the threads."""
        self._short.close()
        self._long.close()

    async def run(self, size: int, call: Callable[[], T]) -> T:
        """Returns what `call` returns, from a thread.

        Args:
            size: characters of its text.

        Raises:
            ApiError: 429: too many characters of long texts are waiting.
        """
        if size <= SHORT:
            return await self._short.run(0, call)
        if self.chars and self.chars + size > self._max_chars:
            raise full(
                f"prompts of {self.chars} characters are being tokenised already; with this one "
                f"it would be more than {self._max_chars}",
                "queue_tokens_full",
            )
        self.chars += size
        try:
            return await self._long.run(size, call)
        finally:
            self.chars -= size


class ShortestFirst:
    """A thread that runs the smallest of the waiting calls, equal ones in order of arrival.

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
        """Returns what `call` returns. Cancelling it removes a call that has not started."""
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()
        heappush(self._waiting, (size, next(self._numbers), turn))
        self._next()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._end()  # its turn had just come: pass it on
            raise
        made = loop.run_in_executor(self._pool, call)
        made.add_done_callback(self._ended)
        return await asyncio.shield(made)  # a running call cannot be stopped: it keeps the thread

    def _next(self) -> None:
        while self._waiting and not self._busy:
            turn = heappop(self._waiting)[2]
            if not turn.done():
                self._busy = True
                turn.set_result(None)

    def _ended(self, made: asyncio.Future[T]) -> None:
        if not made.cancelled():
            made.exception()  # marks it as retrieved, in case nobody waits for it any more
        self._end()

    def _end(self) -> None:
        self._busy = False
        self._next()
