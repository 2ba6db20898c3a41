"""A table in use and its file: loaded at the start, saved at intervals and at the end.

One process writes a file. Others that open it load it and learn in memory, but do not save.
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
_SHARE = 0.01  # of all time may be spent copying tables, during which no step is made
_PATIENCE_S = 1.0  # for the current step to end, when the table is closed
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
        table, rates: the file is loaded into them.
        when_free: runs an action between steps, here the copying of the table; None: at once.
        taught: `rates` have learned already and are not loaded.
        guarded: the caller holds a lock on the folder, so the file is not locked.

    Attributes:
        writable: False where another process has locked the file, or it cannot be written.
        filled: see `TableInfo`.
        seconds: that the last copy took.

    Raises:
        TableError: the file is damaged, of another version or another model, or its folder does not
            exist. The table is unchanged.
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
        self._patience_s: float | None = None  # for the current step to end; None: no limit
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
        """Saves the table and unlocks the file; a failure is logged.

        Args:
            patience_s: for the current step to end; after it the table is copied as it is.
        """
        if os.getpid() != self._pid:  # a forked child: the file is its parent's
            return
        self._patience_s = patience_s
        if self._copying is not None:
            self._copying.set()  # ends the waiting for a step
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
    """Saves tables every `interval_s` seconds, in a thread; returns a function that ends it.

    A failure is logged once, and again only if its cause changes. If copying a large table takes
    long, the interval is extended so that copying takes 1 % of the time.

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
                    cause = str(error.__cause__ or error)  # the message counts free bytes, too
                    if cause not in said:
                        said.add(cause)
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
