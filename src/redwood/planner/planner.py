"""The planner: which drafter, and what tree size, from measured latency and acceptance rates.

Three decisions, each for the most expected tokens per time. Before a step: which arm drafts
(nothing, one drafter, all in one tree), by its recent tokens per step and cost. While a model
drafts: whether another level pays. Before the target runs: how many of the drafted nodes are
scored. Latency comes from a `LatencyModel`, corrected online. Plain decoding is one of the arms.

No decision depends on a step's own random numbers: arms and estimates are fixed before these are
drawn, and only nodes chosen without randomness are pruned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import exp, inf, log
from operator import is_
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from redwood.algorithms.sequoia import choose_tree
from redwood.drafters.base import Drafter, ModelDrafter, NgramDrafter, NoDrafter
from redwood.drafters.context import Context
from redwood.drafters.limits import NO_LIMITS, Limits, ModelLimits
from redwood.drafters.proposing import log_fault
from redwood.planner.arms import BELIEF, FIRST_PAUSE, Arm, ArmStats, arms_of
from redwood.planner.budget import DecayedMean, LatencyCorrection, LevelBudget, StepBudget
from redwood.planner.ngram_lookahead import NgramLookahead, Preview
from redwood.profiling.latency import LatencyModel
from redwood.tree import TokenTree

_FADE, _FADE_ALL = 0.95, 0.98  # decay per step: in its text, over all texts; of texts per text
# Exploration budget: 1 % of total time, plus the cost of 16 plain passes up front (a first text can
# then show what a model is worth).
_EXPLORE_SHARE, _EXPLORE_PASSES = 0.01, 16.0
_MAX_PAUSE = 64  # steps without exploring an arm
_LENGTH_RATIO = 0.5  # prior: tokens that a text takes, over those that it may take
_LENGTH_BELIEF = 2.0  # weight of that prior, in texts
_MAX_REUSE = 8  # steps in a row at most that reuse a plan
_MAX_NODES = 16  # of a row, unless the target's backend says otherwise
_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768)
_LEVEL_WIDTH = 8  # nodes of a level of a large static tree, roughly, for the cost of drafting it
_REFRESH_TOKENS = 32  # tokens by which rows may grow before their times are computed anew
_TIMED_NODES = 16  # of a pass of a draft model, by which its guesses are chosen
_NGRAM_PRIOR = (1.3, 1.05)  # tokens per step, and cost of a step in plain passes

Measure = Callable[[], LatencyModel]


def planned(
    planner: Planner, contexts: Sequence[Context], free_slots: Sequence[int], max_new: Sequence[int]
) -> StepPlan | None:
    """Returns the plan of a step, see `Planner.begin`; None where planning failed.

    Planning measures models and queries drafters; a fault of either is logged and ends no request.
    """
    try:
        return planner.begin(contexts, free_slots, max_new)
    except MemoryError:
        raise
    except Exception as error:
        log_fault(planner, error)
        return None


class StepPlan(NamedTuple):
    """What a step does.

    Attributes:
        arm, drafter: who drafts; `arm` is an index of `Planner.arms`.
        budgets: most nodes of each row, the root included.
        times: latency by number of nodes.
        best_ms: set only when exploring: the best arm's ms per token, to compute the regret.
        drafted: trees of all rows, trimmed, where the n-gram lookahead has made them; else None.
        limits: of the drafters.
        reused: this is the plan of the step before; no arms were compared.
    """

    arm: int
    drafter: Drafter
    budgets: list[int]
    times: StepBudget
    best_ms: float | None
    drafted: list[TokenTree] | None = None
    limits: Limits = NO_LIMITS
    reused: bool = False


class Planner:
    """Chooses arms and tree sizes for the steps of an engine.

    Args:
        drafter: what may draft; its parts become arms.
        curve: latency model of the target, or a function that measures it when first needed.
        draft_curves: the same by model drafter; each model of `drafter` must have one.
        most: most nodes of one row, the root included.

    Attributes:
        predicted_tokens, predicted_ms: sums over all steps of the tokens and the time that were
            expected of each before the target ran.
    """

    def __init__(
        self,
        drafter: Drafter,
        curve: LatencyModel | Measure,
        draft_curves: Mapping[ModelDrafter, LatencyModel | Measure] | None = None,
        *,
        most: int = _MAX_NODES,
    ) -> None:
        self.arms = arms_of(drafter)
        self.most = most
        self._curves: dict[ModelDrafter | None, LatencyModel | Measure] = {None: curve}
        for model, measured in (draft_curves or {}).items():
            self._curves[model] = measured
        self._ngram_arm, self._lookahead = -1, None
        for i, arm in enumerate(self.arms):
            if isinstance(arm.drafter, NgramDrafter) and self._lookahead is None:
                self._ngram_arm, self._lookahead = i, NgramLookahead(arm.drafter)
        self._tokens = DecayedMean()  # of a row per step, whatever arm drafted
        self._cost = DecayedMean()  # of a step, in plain passes
        self._records: list[ArmStats] = []  # by arm
        self._correction = LatencyCorrection()
        self._factors: dict[ModelDrafter, DecayedMean] = {}  # drafting time over the model's
        self._prefilled: set[tuple[ModelDrafter, int]] = set()  # prompts by model and request
        self._max_tokens: dict[int, tuple[int, int]] = {}  # of a text, at first and from here on
        self._log_length_ratio = DecayedMean()
        self._static_sizes: dict[ModelDrafter, tuple[Any, int]] = {}  # what it is valid for, size
        self._growth_times: tuple[tuple[int, int], NDArray[np.float64]] | None = None
        self._step = 0
        self._reuses = 0  # steps to come that may reuse the plan
        self._reusable: tuple[list[int], StepPlan] | None = None  # requests, and their plan
        self._spent_ms = self._regret_ms = 0.0
        self.predicted_tokens = self.predicted_ms = 0.0

    def curve(self, model: ModelDrafter | None = None) -> LatencyModel:
        """Returns the latency model of a model drafter, or of the target."""
        made = self._curves[model]
        if not isinstance(made, LatencyModel):
            made = self._curves[model] = made()
        return made

    @property
    def prepared(self) -> bool:
        """Whether all latencies are known that the first step needs."""
        return bool(self._records)

    def begin(
        self, contexts: Sequence[Context], free_slots: Sequence[int], max_new: Sequence[int]
    ) -> StepPlan:
        """Returns the plan of a step.

        Args:
            contexts: of the rows, at least one.
            free_slots: most nodes of each row, at least 1.
            max_new: tokens that each row may still generate.
        """
        keys = [context.key for context in contexts]
        if self._reuses > 0 and self._reusable is not None and self._reusable[0] == keys:
            self._reuses -= 1
            return self._reusable[1]
        lengths = [len(context.token_ids) for context in contexts]
        times = StepBudget(
            len(lengths), self._correction.apply(self._growth(lengths), len(lengths))
        )
        for context, count in zip(contexts, max_new, strict=True):
            self._max_tokens[context.key] = self._max_tokens.get(context.key, (count,))[0], count
        ratio = exp(self._log_length_ratio.value(log(_LENGTH_RATIO), _LENGTH_BELIEF))
        budgets = [min(self.most, free) for free in free_slots]
        preview = None
        if self._lookahead is not None:
            preview = self._lookahead.query(contexts, budgets, times, self._correction.speed)
        to_come = max(1.0, ratio * sum(max_new))
        arm, best_ms = self._choose(contexts, to_come, times, preview)
        drafter, models = self.arms[arm]
        limits = self._limits(models, contexts, budgets, times, preview)
        if preview is not None and arm == self._ngram_arm:
            return StepPlan(arm, drafter, budgets, preview.times, best_ms, preview.trees)
        if arm == 0 and best_ms is None:
            self._reuses = self._steps_alike()
            self._reusable = keys, StepPlan(arm, drafter, [1] * len(keys), times, None, reused=True)
        return StepPlan(arm, drafter, budgets, times, best_ms, limits=limits)

    def _limits(
        self,
        models: Sequence[ModelDrafter],
        contexts: Sequence[Context],
        budgets: Sequence[int],
        times: StepBudget,
        preview: Preview | None,
    ) -> Limits:
        """How far the models of an arm may draft, by the latency of levels and target."""
        longest = max(len(context.token_ids) for context in contexts)
        by_model = {}
        for model in models:
            self._prefilled.update((model, context.key) for context in contexts)
            factor = self._factors.setdefault(model, DecayedMean()).value(1.0, BELIEF)
            levels = LevelBudget(times, self.curve(model), longest, factor, budgets.count(1))
            pass_ms = self.curve(model).times(longest, _TIMED_NODES)[1:].tolist()
            by_model[model] = ModelLimits(levels, self._static_size(model, times), pass_ms)
        trees = () if preview is None else preview.whole
        keys = [context.key for context in contexts]
        guesses = dict(zip(keys, trees, strict=True)) if trees else {}
        return Limits(by_model, guesses=guesses)

    def _steps_alike(self) -> int:
        """Steps to come that would be plain as well: no lookahead and no exploration is due."""
        waits = [_MAX_REUSE] if self._lookahead is None else [_MAX_REUSE, self._lookahead.waits]
        for i, record in enumerate(self._records):
            if i not in (0, self._ngram_arm) and self._step - record.last < record.pause:
                waits.append(record.pause - (self._step - record.last))
        return min(waits)

    def _static_size(self, model: ModelDrafter, times: StepBudget) -> int:
        """Size of a static tree, no node of which can be pruned once it is drawn (Sequoia, 4.1)."""
        assert self._growth_times is not None
        known, rows = (self._growth_times[0], tuple(model.acceptance)), times.rows
        if model not in self._static_sizes or self._static_sizes[model][0] != known:
            fitting = [n for n in _SIZES if n <= self.most and rows * (n - 1) < len(times.times)]
            sizes = {n: times.of(rows * n) for n in fitting}
            width = _LEVEL_WIDTH if self.most > _MAX_NODES else 1
            draft_ms = self.curve(model).ms([width] * rows, [0] * rows)
            size = choose_tree(model.acceptance, sizes, draft_ms).size
            self._static_sizes[model] = known, max(2, size)
        return self._static_sizes[model][1]

    def _growth(self, lengths: Sequence[int]) -> NDArray[np.float64]:
        """Latency as nodes are added to these rows; cached until they have grown by some tokens."""
        key = len(lengths), sum(lengths) // (_REFRESH_TOKENS * len(lengths))
        if self._growth_times is None or self._growth_times[0] != key:
            most = (self.most - 1) * len(lengths)
            self._growth_times = key, self.curve().growth(lengths, most)
        return self._growth_times[1]

    def trim(
        self, plan: StepPlan, trees: Sequence[TokenTree], drafting_s: float
    ) -> list[TokenTree]:
        """Returns the trees without the nodes whose scoring does not pay."""
        drafting_ms = 1e3 * drafting_s / self._correction.speed
        if plan.drafted is not None and all(map(is_, trees, plan.drafted)):  # trimmed already
            plan.times.drafting_ms = drafting_ms
            return list(trees)
        return plan.times.trim(trees, drafting_ms)

    def end(
        self,
        plan: StepPlan,
        contexts: Sequence[Context],
        tokens: Sequence[int],
        target_s: float | None,
        other_s: float,
    ) -> None:
        """Learns from a step.

        Args:
            tokens: how many each row got.
            target_s, other_s: seconds of the target's pass, and of what follows it; the first is
                None where the pass did other work as well.
        """
        times, record = plan.times, self._records[plan.arm]
        expected = times.of(times.nodes)
        speed = self._correction.speed
        if plan.reused:
            self.predicted_tokens += times.tokens
            self.predicted_ms += speed * expected
            self._spent_ms += expected
            self._step += 1
            if self._lookahead is not None:
                self._lookahead.skip()
            return
        models = self.arms[plan.arm].models if times.levels_ms else ()
        drafting = times.drafting_ms
        if models:
            drafting = times.levels_ms * self._factors[models[0]].value(1.0, BELIEF)
        self.predicted_tokens += times.tokens
        self.predicted_ms += speed * (expected + drafting)
        if target_s:  # a pass of 0 s was none that this clock can tell
            self._correction.learn(times.nodes, 1e3 * target_s, expected)
            speed = 1e3 * target_s / expected  # of the machine, in this very step
        plain = times.of(times.rows)
        spent = expected + times.drafting_ms + 1e3 * other_s / speed
        record.cost_seen.add(spent / plain, _FADE_ALL)
        record.last = self._step
        for context, count, budget in zip(contexts, tokens, plan.budgets, strict=True):
            if budget == 1:  # a row without drafts says nothing of the arm
                continue
            if context.key not in record.texts:
                record.texts[context.key] = DecayedMean(BELIEF * record.known(), BELIEF)
            record.tokens_seen.add(count, _FADE_ALL)
            record.texts[context.key].add(count, _FADE)
        for model in models:
            factor = times.drafting_ms / times.levels_ms
            self._factors[model].add(min(3.0, max(0.5, factor)), _FADE)
        self._tokens.add(sum(tokens) / times.rows, _FADE)
        self._cost.add(spent / plain, _FADE)
        self._step += 1
        self._spent_ms += spent
        if plan.best_ms is not None:
            regret = spent - sum(tokens) * plan.best_ms
            self._regret_ms = max(0.0, self._regret_ms + regret)
            record.pause = min(2 * record.pause, _MAX_PAUSE) if regret > 0.0 else FIRST_PAUSE

    def release(self, key: int) -> None:
        """Forgets a request; learns what share of its maximum length it took."""
        first, last = self._max_tokens.pop(key, (0, 0))
        if first > 0:
            taken = max(1, first - last)
            self._log_length_ratio.add(log(taken / first), _FADE_ALL)
        for record in self._records:
            record.texts.pop(key, None)
        if self._lookahead is not None:
            self._lookahead.release(key)
        self._prefilled = {pair for pair in self._prefilled if pair[1] != key}

    def _choose(
        self,
        contexts: Sequence[Context],
        to_come: float,
        times: StepBudget,
        preview: Preview | None,
    ) -> tuple[int, float | None]:
        """The arm of the step, and `StepPlan.best_ms`. The arm's prefill cost is charged here.

        The best arm has the least regret against the best known rate (tokens per ms). The prefill
        cost of a model is spread over the tokens expected to come.
        """
        plain_ms = times.of(times.rows)
        if not self._records:
            self._records = [self._prior(arm, contexts) for arm in self.arms]
        prefill_ms = [self._prefill_ms(arm, contexts) for arm in self.arms]
        costs, tokens = [], []
        for record, ms in zip(self._records, prefill_ms, strict=True):
            tokens.append(sum(record.tokens_of(context.key) for context in contexts))
            costs.append(record.cost_now() * plain_ms + ms * tokens[-1] / to_come)
        rates = [t / cost for t, cost in zip(tokens, costs, strict=True)]
        if preview is not None:  # of this one step, not a rate of later ones
            after = self._records[0].cost_now() - 1.0  # what follows a pass, with any arm
            tokens[self._ngram_arm] = preview.tokens
            costs[self._ngram_arm] = preview.ms + after * plain_ms
            recent = self._tokens.total / self._cost.total if self._step else 0.0
            rates[self._ngram_arm] = recent * len(contexts) / plain_ms
        best_rate = max(rates)
        gains = [t - best_rate * cost for t, cost in zip(tokens, costs, strict=True)]
        if preview is not None and preview.times.nodes == times.rows:  # skipped, or nothing pays
            gains[self._ngram_arm] = -inf
        # Of equals the last arm, which is all drafters in one tree.
        best = max(range(len(gains)), key=lambda arm: (gains[arm], arm))
        if self._lookahead is not None and preview is not None:
            others = max(rate for i, rate in enumerate(rates) if i != self._ngram_arm)
            saved_ms = 0.0
            if best == self._ngram_arm:
                saved_ms = preview.tokens / others - costs[self._ngram_arm]
            self._lookahead.settle(max(0.0, saved_ms) / plain_ms)
        up_front_ms = _EXPLORE_PASSES * plain_ms
        budget_ms = _EXPLORE_SHARE * self._spent_ms + up_front_ms - self._regret_ms
        arm, best_ms = best, None
        for i in sorted(range(len(gains)), key=lambda i: self._records[i].last):
            regret = costs[i] + prefill_ms[i] - tokens[i] / best_rate
            waited = self._step - self._records[i].last
            if i == best or (preview is not None and i == self._ngram_arm):
                continue
            if waited >= self._records[i].pause and regret <= budget_ms:
                arm, best_ms = i, 1.0 / best_rate
                self._regret_ms += prefill_ms[i]
                break
        self._spent_ms += prefill_ms[arm]
        return arm, best_ms

    def _prior(self, arm: Arm, contexts: Sequence[Context]) -> ArmStats:
        """The prior of an arm: expected tokens and cost of a step, before it was ever tried."""
        if not arm.models:
            plain = isinstance(arm.drafter, NoDrafter)
            return ArmStats(1.0, 1.0) if plain else ArmStats(*_NGRAM_PRIOR)
        length = max(len(context.token_ids) for context in contexts)
        times = self.curve().times(length, self.most)
        draft_ms = sum(self.curve(model).ms([1], [length]) for model in arm.models)
        sizes = {size: float(times[size]) for size in range(1, self.most + 1)}
        plan = choose_tree(arm.models[0].acceptance, sizes, draft_ms)
        return ArmStats(plan.expected_tokens, plan.time_per_token * plan.expected_tokens / sizes[1])

    def _prefill_ms(self, arm: Arm, contexts: Sequence[Context]) -> float:
        """Prefill cost: time for the models of an arm to read the prompts that are new to them."""
        return sum(
            self.curve(model).ms([model.reads(len(context.token_ids))], [0])
            for model in arm.models
            for context in contexts
            if (model, context.key) not in self._prefilled
        )
