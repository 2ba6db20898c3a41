"""Ctrl-C at the moments that no `finally` covers: the models are not held for ever."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest

from redwood.engine import turns
from redwood.engine.engine import RowEngine
from redwood.sampling import SamplingParams
from redwood.testing import TableBackend

PARAMS = SamplingParams(max_tokens=3, ignore_eos=True, temperature=0)


def _answer(engine: RowEngine) -> list[int]:
    key, made = engine.add([1, 2, 3], PARAMS), list[int]()
    while engine.busy:
        made += [token for step in engine.step() if step.request == key for token in step.token_ids]
    return made


def _interrupt(monkeypatch: pytest.MonkeyPatch, name: str, late: bool) -> None:
    """One call of a function of `turns` is interrupted, before or after it did its work."""
    function = getattr(turns, name)

    def interrupted(*given: Any) -> Any:
        if late and given[0]:
            function(*given)
        if not given[0]:
            return function(*given)
        monkeypatch.setattr(turns, name, function)
        raise KeyboardInterrupt

    monkeypatch.setattr(turns, name, interrupted)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("name", ["_leave", "_take"])
def test_an_interrupt_where_a_turn_is_taken_or_given_back_holds_nobody_up(
    monkeypatch: pytest.MonkeyPatch, name: str, late: bool
) -> None:
    engine = RowEngine(TableBackend(9, capacity=64))
    right = _answer(engine)
    key = engine.add([1, 2, 3], PARAMS)
    _interrupt(monkeypatch, name, late)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    engine.cancel(key)  # as `generate` and `stream` do: from then on other threads find it free
    made: Sequence[int] = []

    def ask() -> None:
        nonlocal made
        made = _answer(engine)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(60)
    assert made == right and _answer(engine) == right


def test_what_a_step_uses_is_not_free_inside_it() -> None:
    things, told = [object()], list[str]()
    with turns.turn(things, lambda: False) as mine:
        assert mine
        turns.when_free(things, lambda: told.append("later"))
        assert not told
        with pytest.raises(Exception, match="inside a step"), turns.turn(things, lambda: False):
            pass
    assert told == ["later"]
