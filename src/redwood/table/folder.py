"""A table for each API key of a server, within one memory budget, and their files in one folder.

What a request is drafted from can be inferred from its timing, so answers to one key must not be
drafts for another (docs/table.md): every namespace has a table, and a file named by a digest.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import NamedTuple

from filelock import BaseFileLock, FileLock, Timeout

from redwood.algorithms.source_rates import LearnedRates
from redwood.algorithms.successors import LEAST_BYTES, MAX_BYTES, AnyTable, successor_table
from redwood.errors import ArgumentError, TableError
from redwood.table.keeping import INTERVAL_S, KeptTable, WhenFree, keep_saving
from redwood.table.target import TargetId

_MOST_TABLES = 256
_PATIENCE_S = 1.0  # for a step to end, all tables together
_PART = 4  # one namespace may take a quarter of the budget
_log = logging.getLogger(__name__)


class _Held(NamedTuple):
    table: AnyTable
    kept: KeptTable | None


class KeyTables:
    """Tables by namespace; the least recently used ones are evicted from memory. Thread-safe.

    Args:
        max_bytes: of all tables together. An evicted table is loaded from its file, or empty, when
            it is needed again; a running request keeps its own until it ends.
        most: tables in memory.
        folder: of the files, created with access for its owner only; None: no files. Files of other
            models in it are not touched.
        target: the model; needed with a folder.
        rates: learned acceptance rates over all texts, saved with every table.
        when_free: see `KeptTable`.
        interval_s: between savings.

    Raises:
        ArgumentError: a budget below 512 KiB.
        TableError: the folder cannot be created.
    """

    def __init__(
        self,
        max_bytes: int = MAX_BYTES,
        *,
        most: int = _MOST_TABLES,
        folder: str | Path | None = None,
        target: TargetId | None = None,
        rates: LearnedRates | None = None,
        when_free: WhenFree | None = None,
        interval_s: float = INTERVAL_S,
    ) -> None:
        if max_bytes < LEAST_BYTES:
            raise ArgumentError(f"tables take at least 512 KiB, not {max_bytes} bytes")
        self._max_bytes, self._most = max_bytes, most
        self._each = max(LEAST_BYTES, max_bytes // _PART)
        self._rates, self._when_free = rates, when_free
        self._taught = False  # rates were loaded from the first file that was opened
        self._held: OrderedDict[str, _Held] = OrderedDict()  # the latest used is last
        self._lock = threading.Lock()
        self._folder: Path | None = None
        self._target, self._writable = target, False
        self._guard: BaseFileLock | None = None
        self._end: Callable[[], None] = lambda: None
        if folder is not None:
            assert target is not None
            self._open_folder(Path(folder), target)
            self._end = keep_saving(self._all_kept, interval_s)

    def _open_folder(self, folder: Path, target: TargetId) -> None:
        path = folder.expanduser() / target.short
        try:
            if folder.is_file():
                raise TableError(f"{folder} is a file: with API keys, --table names a folder")
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            path.mkdir(exist_ok=True, mode=0o700)
            guard = self._guard = FileLock(path / ".lock")
            guard.acquire(timeout=0)
            self._writable = True
        except Timeout:
            _log.warning("tables in %s are read and not written: another process keeps them", path)
        except OSError as error:
            raise TableError(f"cannot write to {path}: {error.strerror or error}") from error
        self._folder = path

    def table(self, namespace: str) -> AnyTable:
        """Returns the table of a namespace, an empty one the first time.

        If its file cannot be used, the table is empty and will not be saved; the reason is logged.
        """
        key = _file_name(namespace)
        with self._lock:
            if key not in self._held:
                self._held[key] = self._opened(key)
            self._held.move_to_end(key)
            made = self._held[key].table
        self.trim()
        return made

    def trim(self) -> None:
        """Evicts the least recently used tables until the budget is met."""
        dropped = []
        with self._lock:
            size = self.nbytes
            while len(self._held) > 1 and (size > self._max_bytes or len(self._held) > self._most):
                gone = self._held.popitem(last=False)[1]
                size -= gone.table.nbytes
                dropped.append(gone.kept)
        for kept in dropped:
            if kept is not None:
                kept.close()

    @property
    def nbytes(self) -> int:
        """Memory of all tables, in bytes."""
        return sum(held.table.nbytes for held in self._held.values())

    def __len__(self) -> int:
        return len(self._held)

    def close(self) -> None:
        """Saves all tables and releases the folder's lock."""
        patience_s = _PATIENCE_S
        for kept in self._all_kept():
            begin = monotonic()
            kept.close(max(0.0, patience_s))
            patience_s -= monotonic() - begin
        self._end()
        if self._guard is not None:
            self._guard.release()

    def _all_kept(self) -> list[KeptTable]:
        with self._lock:
            return [held.kept for held in self._held.values() if held.kept is not None]

    def _opened(self, key: str) -> _Held:
        table = successor_table(self._each)
        if self._folder is None or self._target is None:
            return _Held(table, None)
        try:
            kept = KeptTable(
                self._folder / f"{key}.table",
                self._target,
                table,
                self._rates,
                when_free=self._when_free,
                guarded=True,
                taught=self._taught,
            )
            self._taught = self._taught or len(table) > 0
            kept.writable = self._writable
            return _Held(table, kept)
        except TableError as error:
            _log.warning("a table kept for drafting is not used: %s", error)
            return _Held(successor_table(self._each), None)


def _file_name(namespace: str) -> str:
    """A digest, since the namespace may be secret and is no path."""
    if not namespace:
        raise ArgumentError("a namespace must have a name")
    words = f"user {namespace}".encode("utf-8", "backslashreplace")
    return hashlib.sha256(words).hexdigest()[:32]
