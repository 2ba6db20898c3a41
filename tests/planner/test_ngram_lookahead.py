"""N-grams are asked before an arm is chosen: what they promise now decides, and no text changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from planner_kit import (
    PROMPTS,
    ScriptedClock,
    TimedTable,
    answers,
    arms_used,
    context,
    curve,
    drafter_of,
    planner_for,
    simulate,
)
from redwood.drafters.base import NgramDrafter
from redwood.drafters.context import Context
from redwood.engine.engine import RowEngine
from redwood.planner.budget import StepBudget
from redwood.planner.ngram_lookahead import NgramLookahead
from redwood.planner.planner import Planner
from redwood.sampling import SamplingParams
from redwood.tree import TokenTree

COPIED = [*range(40, 60)] * 4 + [*range(40, 50)]  # what follows is plain to see
NEW = [*range(100, 190)]
GIVES = {"none": (1, 0.0), "ngram": (8, 0.0), "model": (3, 10.0), "model+ngram": (3, 40.0)}


class SlowNgrams(NgramDrafter):
    """N-grams that take some seconds of a scripted clock to answer."""

    def __init__(self, clock: ScriptedClock) -> None:
        super().__init__()
        self.clock, self.seconds, self.asked = clock, 0.0, 0

    def propose(self, contexts: Any, budgets: Any) -> list[TokenTree]:  # type: ignore[override]
        self.clock.now += self.seconds
        self.asked += 1
        return super().propose(contexts, budgets)


def chosen(planner: Planner, text: Sequence[int], key: int = 1) -> str:
    plan = planner.begin([context(text, key)], [100], [100])
    assert plan.best_ms is None, "it tries an arm that seems worse"
    return plan.drafter.name


@pytest.mark.usefixtures("clock")
def test_n_grams_that_promise_more_now_draft_although_a_model_is_better_on_the_average() -> None:
    planner = planner_for(drafter_of("union"))
    simulate(planner, GIVES, 100, NEW)
    assert chosen(planner, NEW, 2) == "model"
    ngram: Any = next(arm.drafter for arm in planner.arms if arm.drafter.name == "ngram")
    ngram.reliability.load({"hits": [99.0] * 80, "trials": [99.0] * 80})
    assert chosen(planner, COPIED, 3) == "ngram"
    assert chosen(planner, NEW, 4) == "model"


@pytest.mark.usefixtures("clock")
def test_n_grams_that_were_good_lately_do_not_draft_where_nothing_matches() -> None:
    planner = planner_for(drafter_of("union"))
    assert arms_used(simulate(planner, GIVES, 60, COPIED))[-10:] == ["ngram"] * 10
    for key in (2, 3):
        plan = planner.begin([context(NEW, key)], [100], [100])
        assert plan.drafted is None or [len(tree) for tree in plan.drafted] == [1]


def test_n_grams_that_were_not_asked_do_not_draft_however_dear_a_step_is(
    clock: ScriptedClock,
) -> None:
    ngrams = SlowNgrams(clock)
    planner = planner_for(ngrams)
    simulate(planner, GIVES, 3, NEW, key=1, after_ms=400.0)  # other work shares the processors
    assert arms_used(simulate(planner, GIVES, 30, COPIED, key=2))[-1] == "ngram"
    ngrams.seconds = 100.0  # and so they will not be asked for long
    assert arms_used(simulate(planner, GIVES, 1, COPIED, key=2)) == ["ngram"]
    asked = ngrams.asked
    assert [chosen(planner, NEW, key) for key in range(3, 53)] == ["none"] * 50
    assert ngrams.asked == asked


@pytest.mark.usefixtures("clock")
def test_what_follows_a_pass_is_not_saved_by_n_grams_that_find_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planner, saved = planner_for(NgramDrafter()), list[float]()
    simulate(planner, GIVES, 20, NEW, after_ms=40.0)
    monkeypatch.setattr(NgramLookahead, "settle", lambda self, value: saved.append(value))
    for key in range(2, 12):
        chosen(planner, NEW, key)
    assert saved == [0.0] * 10


@pytest.mark.parametrize("name", ["ngram", "union"])
@pytest.mark.parametrize("slope", [0.01, 3.0])
def test_no_text_changes(name: str, slope: float, clock: ScriptedClock) -> None:
    target, drafter = TimedTable(clock, slope), drafter_of(name, clock)
    engine = RowEngine(target, drafter, planner=planner_for(drafter, slope))
    for params in ({"temperature": 0.0}, {"temperature": 0.8, "seed": 3}):
        plain = answers(RowEngine(target), [*PROMPTS, COPIED], **params)
        assert answers(engine, [*PROMPTS, COPIED], **params) == plain
    assert engine.planner is not None and engine.planner.predicted_tokens > 0.0


@pytest.mark.usefixtures("clock")
def test_rows_without_room_get_bare_roots() -> None:
    seen = NgramLookahead(NgramDrafter()).query(
        [context(COPIED, 1), context(COPIED, 2)], [1, 8], StepBudget(2, np.full(17, 10.0)), 1.0
    )
    assert seen is not None
    assert len(seen.trees[0]) == 1 and len(seen.trees[1]) > 1
    assert 2.0 < seen.tokens <= 9.0 and seen.ms == 10.0


def test_nothing_is_weighed_while_n_grams_wait_and_nothing_changes(clock: ScriptedClock) -> None:
    ngrams = SlowNgrams(clock)
    planner = planner_for(ngrams)
    first = [context(NEW, 1), context([*NEW, 7], 2)]

    def step(contexts: list[Context]) -> bool:
        plan = planner.begin(contexts, [100] * len(contexts), [100] * len(contexts))
        assert plan.drafter.name == "none"
        trees = [TokenTree.chain(each.token_ids[-1:]) for each in contexts]
        assert planner.trim(plan, trees, 0.0) == trees and plan.times.nodes == len(contexts)
        planner.end(plan, contexts, [1] * len(contexts), plan.times.of(len(contexts)) / 1e3, 0.0)
        return plan.reused

    assert not step(first)  # what reading a text takes does not count
    ngrams.seconds = 1.062 * curve(0.1).ms([1, 1], [90, 91]) / 1e3
    # The credit pays for one pass, the share of twelve steps for the rest.
    assert not step(first) and ngrams.asked == 2
    ngrams.seconds = 1.0
    assert [step(first) for _ in range(12)] == [True] * 8 + [False] + [True] * 3
    assert ngrams.asked == 2 and planner.predicted_tokens == 2 * 14
    assert not step(first) and ngrams.asked == 3
    assert [step(first) for _ in range(3)] == [True] * 3
    assert not step(first[:1]) and step(first[:1])  # another batch is weighed anew
    assert ngrams.asked == 3


def test_asking_in_vain_takes_its_share_of_the_time_and_no_more(clock: ScriptedClock) -> None:
    ngrams = SlowNgrams(clock)
    ngrams.seconds = 0.00098
    asked, times = NgramLookahead(ngrams), StepBudget(1, np.full(17, 10.0))
    replies = []
    for step in range(100):
        reply = asked.query([context(COPIED)], [8], times, 1.0)
        assert reply is not None
        replies += [step] * bool(reply.trees)
        asked.settle(0.5 if step == 56 else 0.0)
    # The first time a text is read does not count. The credit of one pass covers ten queries of
    # 9.8 %, and what a query saves covers later ones; each of the others is paid back in twenty
    # steps.
    assert replies == [*range(12), 17, 37, *range(56, 62), 74, 94]


def test_a_drafter_that_fails_promises_nothing(clock: ScriptedClock) -> None:
    class Broken(NgramDrafter):
        def propose(self, contexts: Any, budgets: Any) -> list[TokenTree]:
            raise RuntimeError("no index")

    broken = Broken()
    times = StepBudget(1, np.full(17, 10.0))
    seen = NgramLookahead(broken).query([context(COPIED)], [8], times, 1.0)
    assert [len(tree) for tree in seen.trees] == [1] and seen.tokens == 1.0
    planner = Planner(broken, curve(0.01))
    engine = RowEngine(TimedTable(clock, 0.01), broken, planner=planner)
    key = engine.add(COPIED, SamplingParams(max_tokens=3, temperature=0.0))
    steps = []
    while engine.busy:
        steps += engine.step()
    assert steps[-1].request == key
    assert sum(len(step.token_ids) for step in steps) == 3
    assert all(step.error is None for step in steps)
