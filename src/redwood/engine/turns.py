"""Locks of models and drafters: each takes part in one step at a time, from whatever thread.

A step acquires its models and drafters together, and others that need one of them wait. So engines
may be called from several threads, and several engines may share a model or a drafter. Actions that
must not wait, such as freeing a row, are deferred until the lock is free.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from redwood.errors import UnsupportedError

_log = logging.getLogger(__name__)
# Reentrant: the garbage collector may end a stream, which asks for a turn, at any place.
_gate = threading.Condition(threading.RLock())
_taken: dict[int, int] = {}  # id of what is in use -> the thread that uses it
_deferred: list[tuple[Sequence[object], Callable[[], None]]] = []  # what waits for a free moment


@contextmanager
def turn(things: Sequence[object], needless: Callable[[], bool]) -> Iterator[bool]:
    """Acquires all of these, when no other step uses them, for the block.

    Args:
        things: models, drafters; None is left out.
        needless: whether the block has become unnecessary; called before every wait.

    Yields: False where it became needless; the block then holds none of them.

    Raises:
        UnsupportedError: this very thread uses one of them: waiting would not end.
    """
    mine: list[int] = []
    try:
        with _gate:
            while not needless():
                if _take(things, mine):
                    break
                if threading.get_ident() in {_taken[each] for each in _used(things)}:
                    raise UnsupportedError(
                        "a step was asked for inside a step of the same model or drafter: "
                        "processors and drafters need an engine of their own"
                    )
                _gate.wait()
        yield bool(mine)
    finally:
        _leave(mine)


def when_free(things: Sequence[object], action: Callable[[], None]) -> None:
    """Runs an action that needs these: now if they are free, else when they become free.

    Never waits. An error of the action goes to the caller if it runs now, else to the log.
    """
    mine: list[int] = []
    try:
        with _gate:
            if not _take(things, mine):
                _deferred.append((things, action))
                return
        action()
    finally:
        _leave(mine)


def _take(things: Sequence[object], mine: list[int]) -> bool:
    """Acquires all of them or none; the gate is held."""
    if _used(things):
        return False
    mine += [id(thing) for thing in things if thing is not None]
    _taken.update(dict.fromkeys(mine, threading.get_ident()))
    return True


def _used(things: Sequence[object]) -> list[int]:
    return [id(thing) for thing in things if id(thing) in _taken]


def _leave(mine: Sequence[int]) -> None:
    """Releases them, and runs the deferred actions that are now possible."""
    if not mine:
        return
    with _gate:
        for each in mine:
            _taken.pop(each, None)
        waiting, _deferred[:] = list(_deferred), []
        _gate.notify_all()
    for things, action in waiting:
        try:
            when_free(things, action)
        except Exception:
            _log.exception("what was put off until the end of a step failed")


def _reset() -> None:
    """Resets the locks in a forked child, which has no thread that holds one."""
    global _gate
    _gate = threading.Condition(threading.RLock())
    _taken.clear()
    _deferred.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset)
