"""Admission control: limits on the queue, and round-robin between API keys.

A choice (one answer to one prompt) waits here until the engine has a row for it. Owners (API keys)
take turns, so that a thousand requests of one client do not delay the single one of another.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any, Generic, Protocol, TypeVar

from redwood.server.errors import full


class Waiting(Protocol):
    """An entry of the queue."""

    @property
    def owner(self) -> str:
        """The API key it belongs to, by name; see `Keys.owner`."""
        ...

    @property
    def prompt(self) -> Sequence[int]:
        """Token ids of its prompt."""
        ...


T = TypeVar("T", bound=Waiting)


class Place:
    """Where a request is counted before it is queued.

    Args:
        admission: it enters this one.
        owner: whose it is.

    Raises: as `Admission.enter`.
    """

    def __init__(self, admission: Admission[Any], owner: str) -> None:
        admission.enter(owner)
        self._in: Admission[Any] | None = admission
        self._owner = owner

    def move(self, admission: Admission[Any]) -> None:
        """Has it counted there, and no longer where it was; raises as `Admission.enter`."""
        if admission is not self._in:
            admission.enter(self._owner)
            self.leave()
            self._in = admission

    def leave(self) -> None:
        """Ends it; may be called again."""
        if self._in is not None:
            self._in.leave(self._owner)
            self._in = None


class Admission(Generic[T]):
    """A bounded queue, round-robin between owners. Thread-safe.

    Args:
        rows: choices that the engine decodes at once.
        max_queue: choices that may wait in addition.
        max_tokens: prompt tokens that may wait.
        max_per_owner: choices of one owner that may wait.
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
        """Requests that are not queued yet: their bodies arrive, or are being tokenised."""
        return self._entering.total()

    def enter(self, owner: str) -> None:
        """Counts a request whose body arrives; `leave` undoes it.

        Raises:
            ApiError: 429: the queue is full, so that reading the body would be wasted.
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
        """Ends what `enter` began: the request has been queued, or has failed."""
        with self._lock:
            self._entering[owner] -= 1
            if not self._entering[owner]:
                del self._entering[owner]

    @contextmanager
    def place(self, owner: str) -> Iterator[Place]:
        """Counts a request as `enter` does, until the place is left at the latest."""
        place = Place(self, owner)
        try:
            yield place
        finally:
            place.leave()

    def push(self, choices: Sequence[T]) -> None:
        """Queues all choices of one request, or none.

        Raises:
            ApiError: 429: a limit would be exceeded.
        """
        owner, tokens = choices[0].owner, sum(len(choice.prompt) for choice in choices)
        with self._lock:
            free = max(0, self.rows - self.num_running)
            over = self.num_waiting + len(choices) - free  # those that have to wait
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
        """Takes the next choice off the queue and reserves a row for it, which `done` frees.

        None: nothing waits, or no row is free.
        """
        with self._lock:
            if self.num_running >= self.rows or not self._queues:
                return None
            owner, queue = self._queues.popitem(last=False)
            choice = queue.popleft()
            if queue:
                self._queues[owner] = queue  # at the end: the other owners come first
            self.num_waiting -= 1
            self._tokens -= len(choice.prompt)
            self.num_running += 1
            return choice

    def done(self) -> None:
        """Frees the row of a choice that was popped and has ended."""
        with self._lock:
            self.num_running -= 1

    def remove(self, choices: Iterable[T]) -> None:
        """Removes those of the choices that still wait."""
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
