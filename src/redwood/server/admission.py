"""Admission: limits on what waits, and round-robin between API keys.

A choice (one answer to one prompt) waits here until the engine has a row for it. Turns go round
between owners, so that one client's thousand requests do not stand before another's one.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Sequence
from threading import Lock
from typing import Generic, Protocol, TypeVar

from redwood.server.errors import full


class Waiting(Protocol):
    """What waits: someone's prompt."""

    @property
    def owner(self) -> str:
        """Whose it is."""
        ...

    @property
    def prompt(self) -> Sequence[int]:
        """Its tokens."""
        ...


T = TypeVar("T", bound=Waiting)


class Admission(Generic[T]):
    """A bounded queue with turns; for any thread.

    Args:
        rows: choices that the engine works on at once.
        max_queue, max_tokens, max_per_owner: choices, prompt tokens, and choices of one owner that
            may wait besides.
    """

    def __init__(self, rows: int, max_queue: int, max_tokens: int, max_per_owner: int) -> None:
        self.rows, self._max_queue = rows, max_queue
        self._max_tokens, self._max_per_owner = max_tokens, max_per_owner
        self._lock = Lock()
        self._queues: OrderedDict[str, deque[T]] = OrderedDict()
        self._entering: Counter[str] = Counter()
        self._tokens = 0
        self.num_waiting = 0
        self.num_running = 0

    @property
    def num_entering(self) -> int:
        """Requests whose bodies arrive, or are made into tokens."""
        return self._entering.total()

    def enter(self, owner: str) -> None:
        """Lets a request begin to send its body; `leave` undoes it.

        Raises:
            ApiError: 429: it could not wait anyway.
        """
        with self._lock:
            if self.num_entering + self.num_waiting + self.num_running >= (
                self.rows + self._max_queue
            ):
                raise self._full()
            mine = len(self._queues.get(owner, ())) + self._entering[owner]
            if mine >= self._max_per_owner + max(0, self.rows - self.num_running):
                raise self._full_for_key()
            self._entering[owner] += 1

    def leave(self, owner: str) -> None:
        """Says that a request that entered has been queued, or has failed."""
        with self._lock:
            self._entering[owner] -= 1
            if not self._entering[owner]:
                del self._entering[owner]

    def push(self, choices: Sequence[T]) -> None:
        """Queues all choices of one request, or none.

        Raises:
            ApiError: 429.
        """
        owner, tokens = choices[0].owner, sum(len(choice.prompt) for choice in choices)
        with self._lock:
            free = max(0, self.rows - self.num_running)
            over = self.num_waiting + len(choices) - free  # what finds no row at once
            mine = len(self._queues.get(owner, ())) + len(choices) - free
            if over > self._max_queue:
                raise self._full()
            if mine > self._max_per_owner:
                raise self._full_for_key()
            if over > 0 and self._tokens + tokens > self._max_tokens:
                raise full(
                    f"{self._tokens} prompt tokens are waiting already; with these {tokens} it "
                    f"would be more than {self._max_tokens}",
                    "queue_tokens_full",
                )
            self._queues.setdefault(owner, deque()).extend(choices)
            self.num_waiting += len(choices)
            self._tokens += tokens

    def pop(self) -> T | None:
        """Returns whose turn it is, if the engine has a row; `done` gives the row back."""
        with self._lock:
            if self.num_running >= self.rows or not self._queues:
                return None
            owner, queue = self._queues.popitem(last=False)
            choice = queue.popleft()
            if queue:
                self._queues[owner] = queue  # to the end: the others come first
            self.num_waiting -= 1
            self._tokens -= len(choice.prompt)
            self.num_running += 1
            return choice

    def done(self) -> None:
        """Says that a choice that was popped has ended."""
        with self._lock:
            self.num_running -= 1

    def remove(self, choices: Iterable[T]) -> None:
        """Takes out those that still wait."""
        with self._lock:
            for choice in choices:
                queue = self._queues.get(choice.owner)
                if queue is None or choice not in queue:
                    continue
                queue.remove(choice)
                if not queue:
                    del self._queues[choice.owner]
                self.num_waiting -= 1
                self._tokens -= len(choice.prompt)

    def _full(self) -> Exception:
        return full(
            f"the server is full: {self.num_running} answers run, {self.num_waiting} wait",
        )

    def _full_for_key(self) -> Exception:
        return full(
            f"of {self._max_per_owner} answers that may wait for this key, all do",
            "key_queue_full",
        )
