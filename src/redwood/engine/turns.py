"""Taking turns: models and drafters hold one step at a time, whoever calls from whatever thread.

A step is given its models and drafters, all at once, and others that need one of them wait. So
engines may be called from several threads, and several engines may share a model or a drafter.
What must not wait, such as freeing a row, is put off until they are free.
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
_later: list[tuple[Sequence[object], Callable[[], None]]] = []  # what waits for a free moment


@contextmanager
def turn(things: Sequence[object], needless: Callable[[], bool]) -> Iterator[bool]:
    """Waits until nobody uses any of these, and keeps them for the block.

    Args:
        things: models, drafters; None is left out.
        needless: whether there is nothing to be done any more; asked before every wait.

    Yields: False where it became needless; the block then has nothing for itself.

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
    """Does something that needs these: at once if nobody uses them, else when they are free.

    Never waits. What an action raises goes to the caller if it is done at once, else to the log.
    """
    mine: list[int] = []
    try:
        with _gate:
            if not _take(things, mine):
                _later.append((things, action))
                return
        action()
    finally:
        _leave(mine)


def _take(things: Sequence[object], mine: list[int]) -> bool:
    """Takes all of them or none; the gate is held."""
    if _used(things):
        return False
    mine += [id(thing) for thing in things if thing is not None]
    _taken.update(dict.fromkeys(mine, threading.get_ident()))
    return True


def _used(things: Sequence[object]) -> list[int]:
    return [id(thing) for thing in things if id(thing) in _taken]


def _leave(mine: Sequence[int]) -> None:
    """Gives back what was taken, and does what waited for it."""
    if not mine:
        return
    with _gate:
        for each in mine:
            _taken.pop(each, None)
        waiting, _later[:] = list(_later), []
        _gate.notify_all()
    for things, action in waiting:
        try:
            when_free(things, action)
        except Exception:
            _log.exception("what was put off until the end of a step failed")


def _begin_anew() -> None:
    """In a forked child: whoever held these is not there."""
    global _gate
    _gate = threading.Condition(threading.RLock())
    _taken.clear()
    _later.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)
