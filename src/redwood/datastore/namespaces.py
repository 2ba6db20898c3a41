"""Datastores of finished answers, one for each user of a server; not shared by default.

Answers are queued in memory and written rarely, since an addition sorts the last chunk again. What
a request is drafted from can be inferred from its timing (docs/datastore.md), so answers to one
user must not be drafts for another: every namespace has a folder of its own.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from redwood.datastore.build import CHUNK_TOKENS, add, create
from redwood.datastore.chunk import Values, as_values, check_sorter
from redwood.datastore.folder import remove
from redwood.datastore.store import MANIFEST, Datastore, TokenizerId
from redwood.errors import ArgumentError, DatastoreError, RedwoodError, check_count

INTERVAL_S = 1200.0
_MOST_TOKENS = 1 << 24
_MOST_QUEUED = 1 << 20
_MOST_OPEN = 256
_PARTS = 8  # chunks of a full namespace, of which the oldest is dropped
_log = logging.getLogger(__name__)


class Namespaces:
    """Finished answers of a server, from which later answers to the same user are drafted.
    Thread-safe.

    `append` queues answers and `flush` writes them; `start` flushes at intervals. A failure to
    write is logged, and the answers stay queued up to `most_queued`.

    Args:
        folder: of all namespaces; created with access for its owner only.
        tokenizer: of the target. Namespaces of other models in the folder are not touched.
        name: of the target.
        shared: namespace -> name of a group whose members share their answers. None: every
            namespace has its own.
        most_tokens: of one namespace on disk; beyond that the oldest are dropped.
        most_queued: queued tokens of one namespace; beyond that the oldest answers are dropped.
        most_open: chunk files that are kept open, those of the namespaces used last; each takes a
            file descriptor. A request keeps those it drafts from open until it ends. None: 256, or
            an eighth of the limit of open files, if that is less.

    Raises:
        ArgumentError: a count out of range.
        DatastoreError: the folder cannot be created.
        UnsupportedError: pydivsufsort is not installed.
    """

    def __init__(
        self,
        folder: str | Path,
        tokenizer: Any,
        *,
        name: str = "",
        shared: Mapping[str, str] | None = None,
        most_tokens: int = _MOST_TOKENS,
        most_queued: int = _MOST_QUEUED,
        most_open: int | None = None,
    ) -> None:
        check_count("most_tokens", most_tokens, least=128)
        check_count("most_queued", most_queued)
        most_open = _most_open() if most_open is None else most_open
        check_count("most_open", most_open)
        check_sorter()
        given = isinstance(tokenizer, TokenizerId)
        self._tokenizer = tokenizer if given else TokenizerId.of(tokenizer, name)
        self._folder = Path(folder) / self._tokenizer.sha256[:16]
        self._shared = dict(shared or {})
        self._most_tokens, self._most_queued = most_tokens, most_queued
        self._most_open = most_open
        self._lock = threading.Lock()  # of the queues and the open datastores
        self._flushing = threading.Lock()
        self._queues: dict[str, deque[Values]] = {}
        self._open: OrderedDict[str, Datastore | None] = OrderedDict()  # the latest used is last
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.num_dropped = 0
        """Answers that were dropped before they were written, because the queue was full."""

    def append(self, namespace: str, answers: Iterable[Sequence[int]]) -> None:
        """Queues finished answers, token ids of each. Cheap. Empty ones are skipped.

        Raises:
            ArgumentError: an empty namespace, or answers that are no token ids.
        """
        key = self._key(namespace)
        made = [values for values in map(as_values, answers) if len(values) > 1]
        with self._lock:
            self._queue(key, made)

    def stores(self, namespace: str) -> list[Datastore]:
        """Returns the datastore of a namespace as it is now, in a list; empty if there is none.

        For `drafters.base.attach`, before a request's first step. A datastore that cannot be read
        is skipped, and the reason is logged.
        """
        key = self._key(namespace)
        with self._lock:
            store = self._open[key] if key in self._open else self._opened(key)
            self._keep_open(key, store)
        return [] if store is None else [store]

    def _keep_open(self, key: str, store: Datastore | None) -> None:
        """Marks a datastore as the last used; drops the least recently used beyond the limit."""
        self._open[key] = store
        self._open.move_to_end(key)
        held = sum(map(_num_files, self._open.values()))
        while held > self._most_open and len(self._open) > 1:
            held -= _num_files(self._open.popitem(last=False)[1])

    def flush(self) -> int:
        """Writes the queues; returns the number of answers written. One thread at a time."""
        written = 0
        with self._flushing:
            with self._lock:
                queues, self._queues = self._queues, {}
            for key, queue in queues.items():
                try:
                    self._write(key, queue)
                    written += len(queue)
                except (RedwoodError, OSError) as error:
                    _log.warning("answers could not be kept for drafting: %s", error)
                    with self._lock:
                        later = self._queues.pop(key, deque())
                        self._queue(key, [*queue, *later])
        return written

    def forget(self, namespace: str) -> int:
        """Removes all answers of a namespace; returns the bytes freed. Open snapshots stay.

        Raises:
            DatastoreError: its folder cannot be removed.
        """
        key = self._key(namespace)
        with self._flushing, self._lock:
            self._queues.pop(key, None)
            self._open.pop(key, None)
            path = self._folder / key
            return remove(path) if path.is_dir() else 0

    def start(self, interval_s: float = INTERVAL_S) -> None:
        """Flushes every `interval_s` seconds, in a thread of its own, until `close`.

        Raises:
            ArgumentError: the interval is not above 0, or `start` was called before.
        """
        if not interval_s > 0.0:
            raise ArgumentError(f"interval_s {interval_s} must be above 0")
        if self._thread is not None:
            raise ArgumentError("these namespaces are being flushed already")

        def work() -> None:
            while not self._stop.wait(interval_s):
                self.flush()

        self._thread = threading.Thread(target=work, name="redwood-namespaces", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops the thread and flushes for the last time."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _key(self, namespace: str) -> str:
        """Name of the folder: a digest, since the namespace may be secret and is no path."""
        if not isinstance(namespace, str) or not namespace:
            raise ArgumentError("a namespace must have a name: answers of nobody are not kept")
        group = self._shared.get(namespace)
        words = f"group {group}" if group is not None else f"user {namespace}"
        return hashlib.sha256(words.encode("utf-8", "backslashreplace")).hexdigest()[:32]

    def _queue(self, key: str, answers: Sequence[Values]) -> None:
        queue = self._queues.setdefault(key, deque())
        queue.extend(answers)
        size = sum(map(len, queue))
        while size > self._most_queued:
            size -= len(queue.popleft())
            self.num_dropped += 1

    def _write(self, key: str, queue: Sequence[Values]) -> None:
        path = self._folder / key
        if queue and not (path / MANIFEST).exists():
            _private(self._folder)
            most = min(CHUNK_TOKENS, self._most_tokens // _PARTS)
            create(path, self._tokenizer, chunk_tokens=most)
        if queue:
            answers = (values[:-1].astype("int64") - 1 for values in queue)
            add(path, answers, most_tokens=self._most_tokens)
            with self._lock:
                if key in self._open:  # in use: reopened here, not by the next request
                    self._open[key] = self._opened(key)

    def _opened(self, key: str) -> Datastore | None:
        path = self._folder / key
        try:
            return Datastore.open(path) if (path / MANIFEST).exists() else None
        except RedwoodError as error:
            _log.warning("answers kept for drafting are not used: %s", error)
            return None


def _num_files(store: Datastore | None) -> int:
    """Files that a namespace counts for; at least one, since it always takes memory."""
    return 1 if store is None else max(1, len(store.chunks))


def _most_open() -> int:
    try:
        from resource import RLIM_INFINITY, RLIMIT_NOFILE, getrlimit
    except ImportError:  # not on Windows
        return _MOST_OPEN
    limit = getrlimit(RLIMIT_NOFILE)[0]
    return _MOST_OPEN if limit == RLIM_INFINITY else max(1, min(_MOST_OPEN, limit // 8))


def _private(folder: Path) -> None:
    """Creates the folder, with access for its owner only."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.mkdir(exist_ok=True, mode=0o700)
    except OSError as error:
        raise DatastoreError(f"cannot make {folder}: {error.strerror or error}") from error
