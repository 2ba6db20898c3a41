"""What tests of the planner share: models by table whose passes take scripted time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from redwood.backends.base import Nodes
from redwood.drafters.base import ModelDrafter, NgramDrafter, UnionDrafter
from redwood.drafters.context import Context
from redwood.engine import stats
from redwood.engine.engine import RowEngine
from redwood.planner import ngram_lookahead
from redwood.planner.arms import arms_of
from redwood.planner.planner import Planner, StepPlan
from redwood.profiling.latency import LatencyModel, LatencyPoint
from redwood.sampling import History, SamplingParams
from redwood.testing import TableBackend
from redwood.tree import TokenTree
from table_kit import NoisyTable

PROMPTS = [[5, 9, 17, 33, 5, 9, 17, 40, 5, 9], [2, 3, 2, 3, 2, 3, 2], [77], list(range(100, 160))]
VOCAB = 300


def curve(slope: float, base: float = 10.0) -> LatencyModel:
    """A pass of n nodes takes base + slope (n - 1)."""
    sizes = (1, 2, 4, 8, 16)
    times = [base + slope * (n - 1) for n in sizes]
    points = (LatencyPoint(1, n, 0, ms, ms, ms) for n, ms in zip(sizes, times, strict=True))
    return LatencyModel(tuple(points))


class ScriptedClock:
    """Seconds that pass only where a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> ScriptedClock:
    """The clock of engines and of the lookahead, to which n-grams are asked in no time."""
    made = ScriptedClock()
    for module in (stats, ngram_lookahead):
        monkeypatch.setattr(module, "perf_counter", made)
    return made


class TimedTable(NoisyTable):
    """A table whose passes take what a curve says."""

    def __init__(
        self, clock: ScriptedClock, slope: float, base: float = 10.0, **options: Any
    ) -> None:
        super().__init__(**{"noise": 0.0, **options})
        self._clock, self._slope, self._base = clock, slope, base

    def extend(self, rows: Sequence[Nodes]) -> list[Tensor]:
        count = sum(len(nodes.token_ids) for nodes in rows)
        self._clock.now += (self._base + self._slope * (count - 1)) / 1e3
        return super().extend(rows)


def drafter_of(name: str, clock: ScriptedClock | None = None, **options: Any) -> Any:
    """N-grams, a model that agrees with the target more often than not, or both."""
    model = TimedTable(clock or ScriptedClock(), 0.1, 1.0, **{"noise": 0.3, **options})
    made = {"ngram": NgramDrafter(), "model": ModelDrafter(model, width=32)}
    return made[name] if name in made else UnionDrafter([made["model"], made["ngram"]])


def planner_for(drafter: Any, slope: float = 0.1, draft: float = 1.0) -> Planner:
    """A planner by a target whose pass takes 10 ms, and `slope` ms for each node more."""
    models = arms_of(drafter)[-1].models
    return Planner(drafter, curve(slope), {model: curve(draft / 10, draft) for model in models})


def answers(engine: RowEngine, prompts: Any, **params: Any) -> list[list[int]]:
    """The tokens that each prompt gets, all of them asked at once."""
    keys = {engine.add(p, SamplingParams(**{"max_tokens": 40, **params})): i
            for i, p in enumerate(prompts)}  # fmt: skip
    out: list[list[int]] = [[] for _ in prompts]
    while engine.busy:
        for step in engine.step():
            out[keys[step.request]] += step.token_ids
    return out


def context(text: Sequence[int], key: int = 1) -> Context:
    return Context(key, list(text), SamplingParams(temperature=0.0), History(text), VOCAB)


def simulate(
    planner: Planner,
    gives: dict[str, tuple[int, float]],
    steps: int,
    text: Sequence[int] = range(50),
    key: int = 1,
    after_ms: float = 0.0,
) -> list[StepPlan]:
    """Plans of steps of a machine that is as its curve says.

    Args:
        gives: per arm: tokens per step, drafting ms.
        after_ms: what follows each pass.
    """
    plans = []
    for _ in range(steps):
        asked = [context(text, key)]
        plan = planner.begin(asked, [100], [100])
        count, draft_ms = gives[plan.drafter.name]
        tree = TokenTree.chain([0] * count) if plan.drafted is None else plan.drafted[0]
        planner.trim(plan, [tree], draft_ms / 1e3)
        planner.end(plan, asked, [count], plan.times.of(plan.times.nodes) / 1e3, after_ms / 1e3)
        plans.append(plan)
    return plans


def arms_used(plans: Sequence[StepPlan]) -> list[str]:
    return [plan.drafter.name for plan in plans]


class InOrder(Planner):
    """A planner in whose engine the nth text draws by the nth generator."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.seen: set[int] = set()

    def begin(
        self, contexts: Sequence[Context], free_slots: Sequence[int], left: Sequence[int]
    ) -> StepPlan:
        for each in contexts:
            if each.key not in self.seen:
                each.rng = np.random.default_rng(len(self.seen))
                self.seen.add(each.key)
        return super().begin(contexts, free_slots, left)


def law_after(target: TableBackend, tokens: Sequence[int], temperature: float) -> Any:
    """The probabilities of the next token, float64 [V]."""
    return torch.softmax(target.logits(tokens).double() / temperature, -1).numpy()
