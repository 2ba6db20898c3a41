"""Whatever a drafter does wrong costs drafts: no answer changes, and the log says so."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from planner_kit import curve
from redwood.algorithms.specinfer import expansion_tree
from redwood.drafters.base import ModelDrafter, NgramDrafter, UnionDrafter, attach
from redwood.drafters.context import Context
from redwood.engine.engine import RowEngine
from redwood.planner.budget import StepBudget
from redwood.planner.planner import Planner
from redwood.sampling import SamplingParams
from redwood.testing import TableBackend
from redwood.tree import Law, TokenTree

V = 12
PROMPTS = [[1, 2, 3, 1, 2, 3, 1], [4, 5], [6]]
SETTINGS: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 0.9, "seed": 3}]
POINT, WITHOUT, COUPLED = int(Law.POINT), int(Law.WITHOUT_REPLACEMENT), int(Law.COUPLED)


def answers(engine: RowEngine, **params: Any) -> list[list[int]]:
    made: dict[int, list[int]] = {
        engine.add(prompt, SamplingParams(**{"max_tokens": 25, **params})): [] for prompt in PROMPTS
    }
    while engine.busy:
        for step in engine.step():
            assert step.error is None
            made[step.request] += step.token_ids
    return list(made.values())


def drawn(root: int, probs: Any, ids: Any = None, token: int = 1) -> TokenTree:
    return TokenTree([root, token], [-1, 0], [POINT, WITHOUT], [-1, 0], probs, ids)


def odd_estimates(root: int, estimates: list[float]) -> TokenTree:
    return TokenTree.point([root, 1, 2], [-1, 0, 1], estimates)


def _raise(error: BaseException) -> Any:
    raise error


ANSWERS: dict[str, Callable[[int], Any]] = {
    "an error": lambda root: _raise(RuntimeError("no idea")),
    "an error of an iterator": lambda root: _raise(StopIteration()),
    "an assertion": lambda root: _raise(AssertionError()),
    "nothing": lambda root: None,
    "a list": lambda root: [root, 1],
    "another root": lambda root: TokenTree.chain([(root + 1) % V, 1]),
    "too many nodes": lambda root: TokenTree.chain([root] * 40),
    "a token outside": lambda root: TokenTree.chain([root, V]),
    "estimates that rise": lambda root: odd_estimates(root, [1.0, 0.2, 0.9]),
    "an estimate above 1": lambda root: odd_estimates(root, [1.0, 1.5, 0.1]),
    "an estimate below 0": lambda root: odd_estimates(root, [1.0, 0.5, -0.5]),
    "NaN estimates": lambda root: odd_estimates(root, [1.0, float("nan"), float("nan")]),
    "estimates of words": lambda root: odd_estimates(root, ["1", "a", "b"]),  # type: ignore[list-item]
    "a negative law": lambda root: drawn(root, [[-0.5, 1.5] + [0.0] * 10]),
    "a law of NaN": lambda root: drawn(root, [[float("nan")] * V]),
    "a law without mass": lambda root: drawn(root, [[0.0] * V]),
    "a law of another width": lambda root: drawn(root, [[0.5, 0.5]]),
    "a law of tokens outside": lambda root: drawn(root, [[0.5, 0.5]], [[1, V + 3]]),
    "a law with a token twice": lambda root: drawn(root, [[0.5, 0.5]], [[1, 1]]),
    "nodes of shared noise": lambda root: TokenTree([root, 1], [-1, 0], [0, COUPLED], [-1, -1]),
}


class Stranger:
    """Somebody's drafter, which answers oddly for texts that begin with 1, else with n-grams."""

    name, draws = "stranger", True

    def __init__(self, answer: Callable[[int], Any]) -> None:
        self._answer, self._others = answer, NgramDrafter()

    def propose(self, contexts: Sequence[Context], budgets: Sequence[int]) -> Any:
        return [
            self._answer(context.token_ids[-1])
            if context.token_ids[0] == 1
            else self._others.propose([context], [budget])[0]
            for context, budget in zip(contexts, budgets, strict=True)
        ]

    def release(self, key: int) -> None:
        self._others.release(key)


def _engine(drafter: Any, planned: bool, target: TableBackend | None = None) -> RowEngine:
    planner = Planner(drafter, curve(0.01)) if planned else None
    return RowEngine(target or TableBackend(V), drafter, budget=6, planner=planner)


@pytest.mark.parametrize("where", ["alone", "in a union", "planned", "planned union"])
@pytest.mark.parametrize("what", ANSWERS)
def test_an_odd_answer_is_a_bare_root_and_a_line_in_the_log(
    what: str, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    target = TableBackend(V)
    drafter: Any = Stranger(ANSWERS[what])
    if "union" in where:
        drafter = UnionDrafter([drafter, NgramDrafter()])
    engine = _engine(drafter, "planned" in where, target)
    for params in [*SETTINGS, {"temperature": 0.8, "seed": 2, "verifier": "traversal"}]:
        if params.get("verifier") is None:
            assert answers(engine, **params) == answers(RowEngine(target), **params)
        else:
            assert [len(text) for text in answers(engine, **params)] == [25, 25, 25]
    assert target.num_rows == 0
    said = [entry.getMessage() for entry in caplog.records if entry.levelno >= logging.WARNING]
    assert all("Stranger failed" in line and "\n" not in line for line in said)
    assert len(said) == len(set(said)) <= 3
    if what not in ("nodes of shared noise",):
        assert said, "nothing was said"


def test_a_wrong_number_of_trees_is_put_right_by_asking_one_by_one() -> None:
    class Short(Stranger):
        def propose(self, contexts: Any, budgets: Any) -> Any:
            return super().propose(contexts, budgets)[:1]

    target = TableBackend(V, order=1)
    engine = _engine(Short(lambda root: TokenTree.chain([root])), False, target)
    assert answers(engine) == answers(RowEngine(target))


@pytest.mark.parametrize("method", ["release", "prefill"])
@pytest.mark.parametrize("planned", [False, True])
def test_other_methods_may_raise_as_well(method: str, planned: bool) -> None:
    class Odd(Stranger):
        pass

    setattr(Odd, method, lambda self, given: _raise(RuntimeError("no")))
    target, others = TableBackend(V), NgramDrafter()
    drafter = UnionDrafter([Odd(lambda root: TokenTree.chain([root])), others])
    assert answers(_engine(drafter, planned, target)) == answers(RowEngine(target))
    assert target.num_rows == 0 and not others._texts


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("union", [False, True])
def test_what_is_no_fault_of_a_drafter_goes_through_it(
    error: type[BaseException], planned: bool, union: bool
) -> None:
    target, drafter = TableBackend(V), Stranger(lambda root: _raise(error()))
    engine = _engine(UnionDrafter([drafter, NgramDrafter()]) if union else drafter, planned, target)
    with pytest.raises(error):
        answers(engine)
    assert target.num_rows == 0 and not engine.busy


def test_the_other_parts_of_a_union_draft_on_with_the_datastores_they_were_given() -> None:
    calls = 0

    def fail_once(root: int) -> TokenTree:
        nonlocal calls
        calls += 1
        return TokenTree.chain([root]) if calls != 2 else _raise(RuntimeError("once"))

    class Store:
        chunks = ()

    grams = NgramDrafter()
    engine = _engine(UnionDrafter([Stranger(fail_once), grams]), False)
    keys = [engine.add(prompt, SamplingParams(max_tokens=25)) for prompt in PROMPTS]
    for key in keys:
        attach(engine.drafter, key, [Store()])  # type: ignore[list-item]
    for _ in range(4):
        engine.step()
        assert set(keys) == grams._attached.keys()
    assert calls > 2
    accepted = [engine.stats(key).num_draft_tokens for key in keys]
    assert accepted[0] > 0


class Failing(TableBackend):
    """Raises at one pass, after it has taken the nodes."""

    def __init__(self, at: int, error: BaseException | None = None, **options: Any) -> None:
        super().__init__(V, **options)
        self.at, self.calls, self.opened = at, 0, 0
        self.error = error or RuntimeError("lost")

    def extend(self, rows: Any) -> Any:
        made = super().extend(rows)
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        return made

    def open(self) -> int:
        self.opened += 1
        return super().open()


@pytest.mark.parametrize("at", range(1, 9))
@pytest.mark.parametrize("planned", [False, True])
def test_a_draft_model_that_fails_once_goes_on_from_the_text(at: int, planned: bool) -> None:
    target, backend = TableBackend(V), Failing(at)
    model = ModelDrafter(backend, window=4)
    planner = Planner(model, curve(0.1), {model: curve(1e-4, 1e-3)}) if planned else None
    engine = RowEngine(target, model, budget=6, planner=planner)
    for params in SETTINGS:
        assert answers(engine, **params) == answers(RowEngine(target), **params)
    assert backend.calls > at + 3, "it drafts on"
    assert target.num_rows == backend.num_rows == 0
    assert backend.opened <= 2 * len(PROMPTS) + (at <= len(PROMPTS)), "rows are kept"


def test_nan_of_a_draft_model_costs_drafts_only() -> None:
    class Nan(TableBackend):
        def extend(self, rows: Any) -> Any:
            return [torch.full_like(made, torch.nan) for made in super().extend(rows)]

    target = TableBackend(V)
    engine = RowEngine(target, ModelDrafter(Nan(V)), budget=6)
    for params in SETTINGS:
        assert answers(engine, **params) == answers(RowEngine(target), **params)


def test_times_of_a_draft_model_that_cannot_be_measured_cost_drafts_only() -> None:
    model = ModelDrafter(TableBackend(V))
    target = TableBackend(V)
    planner = Planner(model, curve(0.1), {model: lambda: _raise(RuntimeError("no clock"))})
    assert answers(RowEngine(target, model, planner=planner)) == answers(RowEngine(target))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), RuntimeError("lost")])
@pytest.mark.parametrize("where", ["draft", "target"])
def test_no_row_stays_open_however_a_step_ended(error: BaseException, where: str) -> None:
    backend = Failing(5, error) if where == "draft" else TableBackend(V)
    target = Failing(5, error) if where == "target" else TableBackend(V)
    model = ModelDrafter(backend)
    planner = Planner(model, curve(5.0), {model: curve(1e-3, 1e-2)})
    engine = RowEngine(target, model, planner=planner)
    engine.add([1, 2, 3], SamplingParams(max_tokens=30))
    try:
        while engine.busy:
            engine.step()
    except (Exception, KeyboardInterrupt) as raised:
        assert raised is error
    assert backend.num_rows == target.num_rows == 0


def test_trimming_keeps_what_drawn_nodes_hang_from() -> None:
    row = [[1.0 / V] * V]
    tree = TokenTree(
        [0, 1, 5, 2, 3, 4],
        [-1, 0, 1, 1, 0, 4],
        [POINT, POINT, WITHOUT, POINT, POINT, POINT],
        [-1, -1, 0, -1, -1, -1],
        row,
        None,
        [1.0, 0.01, 0.005, 0.001, 0.3, 0.2],
    )
    dear = StepBudget(1, 10.0 + 10.0 * torch.arange(6).numpy())
    (kept,) = dear.trim([tree], 0.0)
    assert kept.token_list == [0, 1, 5]
    assert kept.law_list == [POINT, POINT, WITHOUT] and dear.nodes == 3
    (same,) = StepBudget(1, 10.0 + 1e-6 * torch.arange(6).numpy()).trim([tree], 0.0)
    assert same is tree


WIDTHS = [5, 8, 11, 13, 20]


def _force(ids: Any, scores: Any) -> Any:
    """The token after the last one; made for all tokens of the target."""
    wanted = (int(ids[0, -1]) + 1) % V
    made = torch.full_like(scores, -torch.inf)
    made[0, wanted] = scores[0, wanted]
    assert scores.shape == (1, V)
    return made


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize(
    "params",
    [
        {"repetition_penalty": 1.3},
        {"presence_penalty": 0.7},
        {"frequency_penalty": -0.4},
        {"logit_bias": {V - 1: 2.0, 0: -100.0}},
        {"min_p": 0.2},
        {"top_k": V - 1},
        {"top_p": 0.7},
        {"logits_processor": _force},
        {"repetition_penalty": 0.8, "logit_bias": {10: 1.0}, "top_p": 0.9, "logprobs": 3},
    ],
    ids=lambda params: "+".join(params),
)
def test_a_draft_model_of_another_width_changes_no_text(
    width: int, temperature: float, params: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    for law in ("without_replacement", "with_replacement", "point"):
        shape = expansion_tree([2, 1, 1])
        drafter = ModelDrafter(TableBackend(width), shape, law=law)
        engine = RowEngine(TableBackend(V), drafter, budget=5)
        more = {**params, "temperature": temperature, "seed": 4}
        assert answers(engine, **more) == answers(RowEngine(TableBackend(V)), **more)
        free = {**more, "seed": None}
        assert [len(text) for text in answers(engine, **free)] == [25] * 3
    assert not caplog.records, "nothing failed"


@pytest.mark.parametrize("width", [8, 20])
@pytest.mark.parametrize(
    ("params", "tokens"),
    [({"logit_bias": {7: 90.0, 11: 50.0}}, 7), ({"logits_processor": _force}, None)],
)
def test_what_a_request_asks_for_is_in_the_draft_as_far_as_it_is_wide(
    width: int, params: dict[str, Any], tokens: int | None
) -> None:
    engine = RowEngine(TableBackend(V), ModelDrafter(TableBackend(width, seed=9)), budget=4)
    key = engine.add([3], SamplingParams(max_tokens=4, **params))
    (step,) = engine.step()
    assert step.request == key and step.num_accepted == 3
    assert step.token_ids == ([7] * 4 if tokens else [4, 5, 6, 7])
