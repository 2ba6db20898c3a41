"""Locks of models and drafters: each takes part in one step at a time, from whatever thread.

A step acquires its models and drafters together, and others that need one of them wait. So engines
may be called from several threads, and several engines may share a model or a drafter. Actions that
must not wait, such as freeing a row, are deferred until the lock is free.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import FrameType

from redwood.errors import UnsupportedError

_log = logging.getLogger(__name__)
# Reentrant: the garbage collector may end a stream, which asks for a turn, at any place. Entered by
# itself, not by way of the condition: an interrupt between the two would leave it locked.
_lock = threading.RLock()
_gate = threading.Condition(_lock)
# id of what is in use -> the thread that uses it, and the frame that gives it back
_taken: dict[int, tuple[int, FrameType]] = {}
_deferred: list[tuple[Sequence[object], Callable[[], None]]] = []  # what waits for a free moment


def turn(things: Sequence[object], needless: Callable[[], bool]) -> AbstractContextManager[bool]:
    """Acquires all of these, when no other step uses them, for a block.

    Args:
        things: models, drafters; None is left out.
        needless: whether the block has become unnecessary; called before every wait.

    Returns: a context whose value is False where it became needless; the block then holds none.

    Raises:
        UnsupportedError: this very thread uses one of them: waiting would not end.
    """
    return _Turn(things, needless)


class _Turn(AbstractContextManager[bool]):
    def __init__(self, things: Sequence[object], needless: Callable[[], bool]) -> None:
        self._things, self._needless = things, needless
        self._mine: list[int] = []

    def __enter__(self) -> bool:
        user = sys._getframe(1)
        try:
            with _lock:
                while not self._needless():
                    if _take(self._things, self._mine, user):
                        break
                    mine = threading.get_ident()
                    if any(_taken[each][0] == mine for each in _used(self._things)):
                        raise UnsupportedError(
                            "a step was asked for inside a step of the same model or drafter: "
                            "processors and drafters need an engine of their own"
                        )
                    _gate.wait()
        except BaseException:
            _leave(self._mine)
            raise
        return bool(self._mine)

    def __exit__(self, *exc: object) -> None:
        _leave(self._mine)


def when_free(things: Sequence[object], action: Callable[[], None]) -> None:
    """Runs an action that needs these: now if they are free, else when they become free.

    Never waits. An error of the action goes to the caller if it runs now, else to the log.
    """
    mine: list[int] = []
    try:
        with _lock:
            if not _take(things, mine, sys._getframe()):
                _deferred.append((things, action))
                return
        action()
    finally:
        _leave(mine)


def _take(things: Sequence[object], mine: list[int], user: FrameType) -> bool:
    """Acquires all of them or none, for a frame of this thread; the lock is held."""
    thread = threading.get_ident()
    for each in _used(things):
        taken_by, frame = _taken[each]
        if taken_by != thread or _runs(frame):
            return False
        del _taken[each]  # an interrupt (Ctrl-C) came just where it was given back
    wanted = [id(thing) for thing in things if thing is not None]
    _taken.update(dict.fromkeys(wanted, (thread, user)))
    mine += wanted
    return True


def _runs(frame: FrameType) -> bool:
    """Whether a frame is among those that this thread is in."""
    at: FrameType | None = sys._getframe()
    while at is not None and at is not frame:
        at = at.f_back
    return at is not None


def _used(things: Sequence[object]) -> list[int]:
    return [id(thing) for thing in things if id(thing) in _taken]


def _leave(mine: Sequence[int]) -> None:
    """Releases them, and runs the deferred actions that are now possible."""
    if not mine:
        return
    with _lock:
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
    global _lock, _gate
    _lock = threading.RLock()
    _gate = threading.Condition(_lock)
    _taken.clear()
    _deferred.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset)
