"""N-grams are asked before an arm is chosen: what they promise now decides, and no text changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_planner import PROMPTS, answers, drafter_of, planner_for

from conftest import tiny_llama
from planner_kit import curve
from redwood.backends.load import wrap_model
from redwood.drafters.base import NgramDrafter
from redwood.drafters.context import Context
from redwood.engine.engine import RowEngine
from redwood.planner import ngram_lookahead
from redwood.planner.budget import StepBudget
from redwood.planner.ngram_lookahead import NgramLookahead
from redwood.planner.planner import Planner
from redwood.sampling import History, SamplingParams
from redwood.tree import TokenTree

COPIED = [*range(40, 60)] * 4 + [*range(40, 50)]  # what follows is plain to see
NEW = [*range(100, 190)]


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngram_lookahead, "_SHARE", 1e9)


def context(text: list[int], key: int = 1) -> Context:
    return Context(key, list(text), SamplingParams(temperature=0.0), History(text), 300)


def taught(planner: Planner, arm: str, tokens: int) -> Planner:
    """The arm gave so many tokens per step, for two passes' time, whatever the text."""
    planner.begin([context(NEW, 99)], [100], [100])
    for record, known in zip(planner._records, planner.arms, strict=True):
        name = known.drafter.name
        record.tokens, record.cost = (tokens, 2.0) if name == arm else (1.0, 1.0)
        record.pause = 10**9  # no tries
    return planner


def chosen(planner: Planner, text: list[int], key: int = 1) -> str:
    return planner.begin([context(text, key)], [100], [100]).drafter.name


@pytest.mark.usefixtures("always")
def test_n_grams_that_promise_more_now_draft_although_a_model_is_better_on_the_average() -> None:
    drafter = drafter_of("union")
    planner = taught(planner_for(drafter), "model", 3)
    assert chosen(planner, NEW, 2) == "model"
    ngram = next(arm.drafter for arm in planner.arms if arm.drafter.name == "ngram")
    ngram.reliability = type(ngram.reliability)([0.99] * 80)
    assert chosen(planner, COPIED, 3) == "ngram"
    assert chosen(planner, NEW, 4) == "model"


@pytest.mark.usefixtures("always")
def test_n_grams_that_were_good_lately_do_not_draft_where_nothing_matches() -> None:
    planner = taught(planner_for(drafter_of("union")), "ngram", 8)
    for key in (2, 3):
        plan = planner.begin([context(NEW, key)], [100], [100])
        assert plan.drafted is None or [len(tree) for tree in plan.drafted] == [1]


def dear_after_passes(planner: Planner, cost: float) -> Planner:
    """Each step takes so many plain passes, as where other work shares the processors."""
    planner.begin([context(NEW, 99)], [100], [100])
    planner._records[0].cost, planner._records[0].pause = cost, 10**9
    return planner


def test_n_grams_that_were_not_asked_do_not_draft_however_dear_a_step_is() -> None:
    planner = dear_after_passes(planner_for(NgramDrafter()), 5.0)
    assert planner._lookahead is not None
    planner._lookahead._debt = 1.0  # nor will they be asked for a hundred steps
    planner._step = 1  # the last text repeated itself
    planner._tokens.add(8.0, 1.0)
    planner._cost.add(1.0, 1.0)
    assert [chosen(planner, NEW, key) for key in range(2, 52)] == ["none"] * 50


@pytest.mark.usefixtures("always")
def test_what_follows_a_pass_is_not_saved_by_n_grams_that_find_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planner, saved = dear_after_passes(planner_for(NgramDrafter()), 5.0), []
    assert planner._lookahead is not None
    monkeypatch.setattr(planner._lookahead, "settle", saved.append)
    for key in range(2, 12):
        chosen(planner, NEW, key)
    assert saved == [0.0] * 10


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("name", ["ngram", "union"])
@pytest.mark.parametrize("slope", [0.01, 3.0])
def test_no_text_changes(name: str, slope: float) -> None:
    target, drafter = wrap_model(tiny_llama()), drafter_of(name)
    engine = RowEngine(target, drafter, planner=planner_for(drafter, slope))
    for params in ({"temperature": 0.0}, {"temperature": 0.8, "seed": 3}):
        plain = answers(RowEngine(target), [*PROMPTS, COPIED], **params)
        assert answers(engine, [*PROMPTS, COPIED], **params) == plain
    assert engine.planner is not None and engine.planner.predicted_tokens > 0.0


@pytest.mark.usefixtures("always")
def test_rows_without_room_get_bare_roots() -> None:
    seen = NgramLookahead(NgramDrafter()).query(
        [context(COPIED, 1), context(COPIED, 2)], [1, 8], StepBudget(2, np.full(17, 10.0)), 1.0
    )
    assert seen is not None
    assert len(seen.trees[0]) == 1 and len(seen.trees[1]) > 1
    assert 2.0 < seen.tokens <= 9.0 and seen.ms == 10.0


def test_nothing_is_weighed_while_n_grams_wait_and_nothing_changes() -> None:
    planner = planner_for(NgramDrafter())
    assert planner._lookahead is not None
    first = [context(NEW, 1), context([*NEW, 7], 2)]

    def step(contexts: list[Context]) -> bool:
        plan = planner.begin(contexts, [100] * len(contexts), [100] * len(contexts))
        assert plan.drafter.name == "none"
        trees = [TokenTree.chain(each.token_ids[-1:]) for each in contexts]
        assert planner.trim(plan, trees, 0.0) == trees and plan.times.nodes == len(contexts)
        planner.end(plan, contexts, [1] * len(contexts), plan.times.of(len(contexts)) / 1e3, 0.0)
        return plan.reused

    assert not step(first)  # the n-grams were asked
    planner._lookahead._debt = 0.062  # twelve steps
    assert not step(first)
    assert [step(first) for _ in range(9)] == [True] * 8 + [False]
    assert planner._lookahead.waits == 2 and planner.predicted_tokens == 2 * 11
    planner._lookahead._debt = 1.0
    assert [step(first) for _ in range(3)] == [True, True, False]  # the two that were left
    assert not step(first[:1]) and step(first[:1])  # another batch is weighed anew


def test_asking_in_vain_takes_its_share_of_the_time_and_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]

    class Slow(NgramDrafter):
        def propose(self, contexts: Any, budgets: Any) -> list[TokenTree]:
            now[0] += 0.00098
            return super().propose(contexts, budgets)

    monkeypatch.setattr(ngram_lookahead, "perf_counter", lambda: now[0])
    asked, times = NgramLookahead(Slow()), StepBudget(1, np.full(17, 10.0))
    told = []
    for step in range(100):
        reply = asked.query([context(COPIED)], [8], times, 1.0)
        assert reply is not None
        told += [step] * bool(reply.trees)
        asked.settle(0.2 if 61 <= step < 70 else 0.0)
    # The first time a text is read does not count; 9.8 % of a pass are paid back in twenty, or by
    # what is saved.
    assert told == [0, 1, 21, 41, *range(61, 71), 90]


@pytest.mark.usefixtures("always")
def test_a_drafter_that_fails_promises_nothing() -> None:
    class Broken(NgramDrafter):
        def propose(self, contexts: Any, budgets: Any) -> list[TokenTree]:
            raise RuntimeError("no index")

    broken = Broken()
    step = StepBudget(1, np.full(17, 10.0))
    seen = NgramLookahead(broken).query([context(COPIED)], [8], step, 1.0)
    assert [len(tree) for tree in seen.trees] == [1] and seen.tokens == 1.0
    engine = RowEngine(wrap_model(tiny_llama()), broken, planner=Planner(broken, curve(0.01)))
    key = engine.add(COPIED, SamplingParams(max_tokens=3, temperature=0.0))
    steps = []
    while engine.busy:
        steps += engine.step()
    assert steps[-1].request == key
    assert sum(len(step.token_ids) for step in steps) == 3
    assert all(step.error is None for step in steps)
