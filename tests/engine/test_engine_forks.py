"""A child forked from a process with an engine: told at once, and free to load its own."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from redwood.backends.native.load import load_native
from redwood.engine.text import Engine
from redwood.errors import UnsupportedError
from redwood.sampling import SamplingParams
from redwood.testing import TableBackend

PROMPT = [1, 2, 3]

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks there")


class Slow(TableBackend):
    """Waits in a pass until it may go on."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    def extend(self, rows: Any) -> Any:
        self.entered.set()
        assert self.go_on.wait(30)
        return super().extend(rows)


def _answer(engine: Engine) -> list[int]:
    return list(engine.generate(PROMPT, max_tokens=30).token_ids)


def _in_child(call: Callable[[], Any]) -> str:
    """What a forked child says of a call, within ten seconds."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
        child = os.fork()
    if child == 0:
        try:
            said = repr(call())
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    timer = threading.Timer(20.0, os.kill, (child, 9))
    timer.start()
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode()
    timer.cancel()
    assert os.waitpid(child, 0)[1] == 0, "the child hung, or died"
    return said


@pytest.mark.parametrize("call", ["generate", "stream", "add", "step", "going on"])
def test_a_forked_child_is_told_at_once_that_the_engine_is_its_parents(call: str) -> None:
    engine = Engine(Slow(), budget=1)
    stream = engine.stream([1], max_tokens=9)
    next(stream)
    calls: dict[str, Callable[[], Any]] = {
        "generate": lambda: engine.generate([1, 2]),
        "stream": lambda: engine.stream([1, 2]),
        "add": lambda: engine.add([1, 2]),
        "step": engine.step,
        "going on": lambda: list(stream),
    }
    said = _in_child(calls[call])
    assert said.startswith("UnsupportedError: a model loaded in process") and "spawn" in said
    assert sum(len(piece.token_ids) for piece in stream) == 8, "the parent goes on"


def test_a_fork_in_the_middle_of_a_step_leaves_a_child_that_can_begin_anew() -> None:
    target = Slow()
    engine = Engine(target, budget=1)
    engine.add([1], SamplingParams(max_tokens=2))
    target.go_on.clear()
    stepping = threading.Thread(target=engine.step)
    stepping.start()
    assert target.entered.wait(30)

    def begin() -> list[int]:
        for key in list(engine._requests):
            engine.cancel(key)
        return _answer(Engine(TableBackend(), budget=1))

    assert _in_child(begin) == repr(_answer(Engine(TableBackend(), budget=1)))
    target.go_on.set()
    stepping.join(30)


def test_a_forked_child_may_load_a_native_model_of_its_own(tiny_model_folder: Path) -> None:
    pytest.importorskip("redwood._native", reason="installed without a compiler")
    target: Any = load_native(tiny_model_folder, None, threads=2)
    wanted = Engine(target, budget=1).generate([5, 6, 7], max_tokens=5).token_ids

    def in_child() -> list[int]:
        nonlocal target
        with pytest.raises(UnsupportedError, match="forked"):
            target.extend([])
        target = None  # nobody is there to be waited for
        own = load_native(tiny_model_folder, None, threads=2)
        return list(Engine(own, budget=1).generate([5, 6, 7], max_tokens=5).token_ids)

    assert _in_child(in_child) == repr(wanted)
    assert Engine(target, budget=1).generate([5, 6, 7], max_tokens=5).token_ids == wanted
