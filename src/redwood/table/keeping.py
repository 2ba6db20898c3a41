"""A table in use and its file: read at the start, saved now and then and at the end.

One process writes a file. Another one that opens it reads it, learns for itself, and saves nothing.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from redwood.algorithms.source_rates import LearnedRates
from redwood.algorithms.successors import AnyTable
from redwood.errors import TableError
from redwood.table.file import check_rates, lock_of, read_table, write_table
from redwood.table.target import TargetId

INTERVAL_S = 300.0
"""Seconds between two savings."""
_SHARE = 0.01  # of all time that copying a table out may take, during which no step is made
_PATIENCE_S = 1.0  # at the end, for a step to end
_log = logging.getLogger(__name__)

WhenFree = Callable[[Callable[[], None]], None]
"""Runs an action when no step uses the table."""


def _at_once(action: Callable[[], None]) -> None:
    action()


class _Copy(NamedTuple):
    """A table as it was at one moment."""

    entries: Any
    rows: int
    rates: dict[str, Any]


class KeptTable:
    """A table that is kept in a file.

    Args:
        path: of the file, which need not exist yet; its folder must.
        target: the model that fills the table.
        table, rates: that get what the file holds.
        when_free: runs what copies the table; None: at once.
        taught: `rates` have learned already, and are left as they are.
        guarded: the caller holds a lock around the folder, so none is needed for the file.

    Attributes:
        writable: False where another process keeps the file, or it cannot be written.
        filled: see `TableInfo`.
        seconds: that the last copy took.

    Raises:
        TableError: a file that is damaged, of another version or another model, or a folder that
            does not exist. The table is as before.
    """

    def __init__(
        self,
        path: str | Path,
        target: TargetId,
        table: AnyTable,
        rates: LearnedRates | None = None,
        *,
        when_free: WhenFree | None = None,
        guarded: bool = False,
        taught: bool = False,
    ) -> None:
        self.path = Path(path).expanduser().resolve()
        self.target, self.table = target, table
        self.filled: dict[str, int] = {}
        self.seconds = 0.0
        self._rates, self._taught, self._when_free = rates, taught, when_free or _at_once
        self._pid = os.getpid()
        self._patience_s: float | None = None  # for the end of a step; None: however long it takes
        self._copying: threading.Event | None = None
        self._saving = threading.Lock()
        self._saved_rows = table.rows
        if not self.path.parent.is_dir():
            raise TableError(f"{self.path.parent} does not exist: make the table's folder first")
        if self.path.is_dir():
            raise TableError(f"{self.path} is a folder: a table is a file")
        self._lock = None if guarded else lock_of(self.path)
        self.writable = self._lock is None or self._locked(self._lock)
        try:
            self._load()
        except BaseException:
            self._unlock()
            raise

    def _locked(self, lock: FileLock) -> bool:
        try:
            lock.acquire(timeout=0)
            return True
        except Timeout:
            why = "another process keeps it"
        except (OSError, NotImplementedError) as error:
            why = str(getattr(error, "strerror", None) or error)
            if not self.path.exists():
                raise TableError(f"cannot write {self.path}: {why}") from error
        _log.warning("%s is read and not written: %s", self.path, why)
        return False

    def _load(self) -> None:
        if not self.path.exists():
            return
        info, entries = read_table(self.path, self.target)
        rates = LearnedRates()
        check_rates(self.path, info.rates, rates)
        try:
            self.table.load(entries, info.rows)
        except ValueError as error:
            raise TableError(f"{self.path} is damaged: {error}; remove it") from error
        if self._rates is not None and info.rates and not self._taught:
            self._rates.load(info.rates)
        self.filled = dict(info.filled)
        self._saved_rows = self.table.rows

    def save(self, filled: Mapping[str, int] | None = None) -> bool:
        """Writes the table if it has learned anything; returns whether it did.

        Args:
            filled: replaces `filled`, and is written even where nothing was learned.

        Raises:
            TableError: see `write_table`; the old file stays.
        """
        with self._saving:
            if not self.writable or os.getpid() != self._pid:
                return False
            if filled is None and self.table.rows == self._saved_rows:
                return False
            copied = self._copy()
            if copied is None:
                return False
            known = self.filled if filled is None else dict(filled)
            write_table(self.path, self.target, *copied, known)
            self.filled, self._saved_rows = known, copied.rows
            return True

    def _copy(self) -> _Copy | None:
        """The table between two steps; None where it is closed before the step ends."""
        held: list[_Copy] = []
        done = threading.Event()

        def take() -> None:
            begin = perf_counter()
            if not held:
                rates = {} if self._rates is None else self._rates.to_dict()
                held.append(_Copy(self.table.entries(), self.table.rows, rates))
            self.seconds = perf_counter() - begin
            done.set()

        self._copying = done
        last = self._patience_s
        self._when_free(take)
        if not done.wait(last) and last is not None:  # the engine is stuck
            take()
        return held[0] if held else None

    def close(self, patience_s: float = _PATIENCE_S) -> None:
        """Saves for the last time and frees the file; a failure goes to the log.

        Args:
            patience_s: for the end of a step; then the table is copied as it is.
        """
        if os.getpid() != self._pid:  # a forked child: the file is its parent's
            return
        self._patience_s = patience_s
        if self._copying is not None:
            self._copying.set()  # who waits for the end of a step gives up
        try:
            self.save()
        except TableError as error:
            _log.warning("what the target said could not be kept: %s", error)
        except Exception:
            _log.exception("%s could not be saved", self.path)
        finally:
            self.writable = False
            self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()


def keep_saving(
    tables: Callable[[], Sequence[KeptTable]], interval_s: float = INTERVAL_S
) -> Callable[[], None]:
    """Saves tables every so many seconds, on a thread of its own; returns what ends it.

    A failure is one line in the log, said again only when it changes. Where copying a large table
    takes long, the next saving waits until that is 1 % of the time.

    Args:
        tables: called each time.
    """
    stop, said = threading.Event(), set[str]()

    def work() -> None:
        pause = interval_s
        while not stop.wait(pause):
            copying = 0.0
            for each in tables():
                try:
                    if each.save():
                        copying += each.seconds
                        said.clear()
                except TableError as error:
                    if str(error) not in said:
                        said.add(str(error))
                        _log.warning("what the target said could not be kept: %s", error)
                except Exception:
                    _log.exception("%s could not be saved", each.path)
            pause = max(interval_s, copying / _SHARE)

    thread = threading.Thread(target=work, name="redwood-table", daemon=True)
    thread.start()

    def end() -> None:
        stop.set()
        if thread is not threading.current_thread():
            thread.join(_PATIENCE_S)

    return end
