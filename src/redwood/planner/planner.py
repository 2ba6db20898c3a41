"""The planner: which drafter, and how large a tree, from measured times and what was accepted.

Three decisions, each by tokens per time. Before a step: which arm drafts (nothing, one drafter, all
in one tree), by what each arm gave lately and what it cost. While a model drafts: whether another
level pays. Before the target runs: how many of the drafted nodes are scored. Times come from a
`LatencyModel`, corrected by what steps really take. Plain decoding is always a legal answer.

Nothing of a step's own coins is used: arms and estimates are settled before they are drawn, and
only nodes chosen without chance are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import inf
from operator import is_
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from redwood.algorithms.sequoia import choose_tree
from redwood.drafters.base import Drafter, ModelDrafter, NgramDrafter, NoDrafter
from redwood.drafters.context import Context
from redwood.drafters.limits import NO_LIMITS, Limits, ModelLimits
from redwood.drafters.proposing import tell
from redwood.planner.arms import BELIEF, FIRST_PAUSE, Arm, ArmStats, arms_of
from redwood.planner.budget import DecayedMean, LatencyCorrection, LevelBudget, StepBudget
from redwood.planner.ngram_lookahead import NgramLookahead, Preview
from redwood.profiling.latency import LatencyModel
from redwood.tree import TokenTree

_FADE, _FADE_ALL = 0.95, 0.98  # what a step weighs one step later: in its text, over all texts
_SHARE = 0.01  # of all time may be lost to arms that seemed worse,
_ONCE = 16.0  # and these plain passes, so that a first text can show what a model is worth
_ONCE_MS = 2000.0  # but no longer: a pass over streamed weights takes seconds
_LONGEST, _LONGEST_MODEL = 64, 512  # up to these; a model has to read the text first
_LENGTH_RATIO = 0.5  # of the tokens it may have, what a text is believed to take,
_LENGTH_BELIEF, _LENGTH_FADE = 2.0, 0.9  # until texts show it
_REST = 8  # steps in a row at most in which nothing is weighed
_MOST = 16
_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768)
_WIDTH = 8  # nodes of a level of a large drawn tree, roughly, for what drafting it takes
_NEAR = 32  # tokens by which rows may grow before times are made anew
_NGRAM = (1.3, 1.05)  # tokens per step and cost in plain passes, where nothing is known

Measure = Callable[[], LatencyModel]


def planned(
    planner: Planner, contexts: Sequence[Context], free_slots: Sequence[int], left: Sequence[int]
) -> StepPlan | None:
    """Returns the plan of a step, see `Planner.begin`; None where planning failed.

    It measures models and asks drafters, of which none may cost a request: the log says why.
    """
    try:
        return planner.begin(contexts, free_slots, left)
    except MemoryError:
        raise
    except Exception as error:
        tell(planner, error)
        return None


class StepPlan(NamedTuple):
    """What a step shall do: its arm, the nodes of each row at most, and its times.

    `best_ms` is set only when exploring: the best arm's ms per token, to compute the regret.
    `limits` are what its drafters may do. `drafted` are the trees of all rows, trimmed, where the
    lookahead made them already. `resting`: nothing was weighed, the last step's answer holds.
    """

    arm: int
    drafter: Drafter
    budgets: list[int]
    times: StepBudget
    best_ms: float | None
    drafted: list[TokenTree] | None = None
    limits: Limits = NO_LIMITS
    resting: bool = False


class Planner:
    """Chooses arms and sizes for an engine.

    Args:
        drafter: what may draft; its parts become arms.
        curve: times of the target, or a function that measures them when they are first needed.
        draft_curves: the same by model drafter; each model of `drafter` must have one.
        most: nodes of one row at most, the root included.

    Attributes:
        predicted_tokens, predicted_ms: sums over all steps of what was expected of each before the
            target ran.
    """

    def __init__(
        self,
        drafter: Drafter,
        curve: LatencyModel | Measure,
        draft_curves: Mapping[ModelDrafter, LatencyModel | Measure] | None = None,
        *,
        most: int = _MOST,
    ) -> None:
        self.arms = arms_of(drafter)
        self.most = most
        self._curves: dict[ModelDrafter | None, LatencyModel | Measure] = {None: curve}
        for model, measured in (draft_curves or {}).items():
            self._curves[model] = measured
        grams = [i for i, arm in enumerate(self.arms) if isinstance(arm.drafter, NgramDrafter)]
        self._ngram_arm = grams[0] if grams else -1
        self._lookahead = (
            NgramLookahead(cast(NgramDrafter, self.arms[grams[0]].drafter)) if grams else None
        )
        self._tokens, self._cost = (
            DecayedMean(),
            DecayedMean(),
        )  # of a row per step, and in plain passes
        self._records: list[ArmStats] = []
        self._correction = LatencyCorrection()
        self._factors: dict[ModelDrafter, DecayedMean] = {}
        self._read: set[tuple[ModelDrafter, int]] = set()  # prompts that a model has read
        self._left: dict[int, tuple[int, int]] = {}  # tokens a text could have at first, and now
        self._length_ratio = DecayedMean()
        self._drawn: dict[ModelDrafter, tuple[Any, int]] = {}
        self._near: tuple[tuple[int, int], NDArray[np.float64]] | None = None
        self._step = self._rest = 0  # steps so far, and those to come in which nothing is weighed
        self._resting: tuple[list[int], StepPlan] | None = None  # requests, and what they do then
        self._spent_ms = self._lost_ms = 0.0
        self.predicted_tokens = self.predicted_ms = 0.0

    def curve(self, model: ModelDrafter | None = None) -> LatencyModel:
        """Returns the times of a model drafter, or of the target."""
        made = self._curves[model]
        if not isinstance(made, LatencyModel):
            made = self._curves[model] = made()
        return made

    @property
    def prepared(self) -> bool:
        """Whether all times are known that the first step needs."""
        return bool(self._records)

    def begin(
        self, contexts: Sequence[Context], free_slots: Sequence[int], left: Sequence[int]
    ) -> StepPlan:
        """Returns the plan of a step.

        Args:
            contexts: of the rows, at least one.
            free_slots: nodes that each row has room for, at least 1.
            left: tokens that each row may still generate.
        """
        keys = [context.key for context in contexts]
        if self._rest > 0 and self._resting is not None and self._resting[0] == keys:
            self._rest -= 1
            return self._resting[1]
        lengths = [len(context.token_ids) for context in contexts]
        times = StepBudget(
            len(lengths), self._correction.apply(self._growth(lengths), len(lengths))
        )
        for context, count in zip(contexts, left, strict=True):
            self._left[context.key] = self._left.get(context.key, (count,))[0], count
        to_come = sum(left) * self._length_ratio.value(_LENGTH_RATIO, _LENGTH_BELIEF)
        budgets = [min(self.most, room) for room in free_slots]
        seen = None
        if self._lookahead is not None:
            seen = self._lookahead.ask(contexts, budgets, times, self._correction.speed)
        arm, best_ms = self._choose(contexts, max(1.0, to_come), times, seen)
        drafter, models = self.arms[arm]
        limits = self._limits(models, contexts, budgets, times)
        if seen is not None and arm == self._ngram_arm:
            return StepPlan(arm, drafter, budgets, seen.times, best_ms, seen.trees)
        if arm == 0 and best_ms is None:
            self._rest = self._steps_alike()
            self._resting = keys, StepPlan(arm, drafter, [1] * len(keys), times, None, resting=True)
        return StepPlan(arm, drafter, budgets, times, best_ms, limits=limits)

    def _limits(
        self,
        models: Sequence[ModelDrafter],
        contexts: Sequence[Context],
        budgets: Sequence[int],
        times: StepBudget,
    ) -> Limits:
        """How far the models of an arm may draft, by what their levels and the target cost."""
        longest, made = max(len(context.token_ids) for context in contexts), {}
        for model in models:
            self._read.update((model, context.key) for context in contexts)
            factor = self._factors.setdefault(model, DecayedMean()).value(1.0, BELIEF)
            levels = LevelBudget(times, self.curve(model), longest, factor, budgets.count(1))
            made[model] = ModelLimits(levels, self._drawn_size(model, times))
        return Limits(made)

    def _steps_alike(self) -> int:
        """Steps that would be plain as well: n-grams are not to be asked, no arm is to be tried."""
        waits = [_REST] if self._lookahead is None else [_REST, self._lookahead.waits]
        for i, record in enumerate(self._records):
            if i not in (0, self._ngram_arm) and self._step - record.last < record.pause:
                waits.append(record.pause - (self._step - record.last))
        return min(waits)

    def _drawn_size(self, model: ModelDrafter, times: StepBudget) -> int:
        """Nodes of a static tree, none of which can be left out once it is drawn (Sequoia, 4.1)."""
        assert self._near is not None
        known, rows = (self._near[0], tuple(model.acceptance)), times.rows
        if model not in self._drawn or self._drawn[model][0] != known:
            fitting = [n for n in _SIZES if n <= self.most and rows * (n - 1) < len(times.times)]
            sizes = {n: times.of(rows * n) for n in fitting}
            width = _WIDTH if self.most > _MOST else 1
            draft_ms = self.curve(model).ms([width] * rows, [0] * rows)
            size = choose_tree(model.acceptance, sizes, draft_ms).size
            self._drawn[model] = known, max(2, size)
        return self._drawn[model][1]

    def _growth(self, lengths: Sequence[int]) -> NDArray[np.float64]:
        """Times as nodes are added to these rows; made anew when they have grown by some tokens."""
        key = len(lengths), sum(lengths) // (_NEAR * len(lengths))
        if self._near is None or self._near[0] != key:
            most = (self.most - 1) * len(lengths)
            self._near = key, self.curve().growth(lengths, most)
        return self._near[1]

    def trim(
        self, plan: StepPlan, trees: Sequence[TokenTree], drafting_s: float
    ) -> list[TokenTree]:
        """Returns the trees less the nodes whose scoring would not pay."""
        drafting_ms = 1e3 * drafting_s / self._correction.speed
        if plan.drafted is not None and all(map(is_, trees, plan.drafted)):  # nothing was joined
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
            tokens: what each row got.
            target_s, other_s: time of the target's pass, and of what follows it; the first is None
                where the pass did other work as well.
        """
        times, record = plan.times, self._records[plan.arm]
        expected = times.of(times.nodes)
        speed = self._correction.speed
        if plan.resting:
            self.predicted_tokens += times.tokens
            self.predicted_ms += speed * expected
            self._spent_ms += expected
            self._step += 1
            if self._lookahead is not None:
                self._lookahead.rest()
            return
        models = self.arms[plan.arm].models if times.levels_ms else ()
        drafting = times.drafting_ms
        if models:
            drafting = times.levels_ms * self._factors[models[0]].value(1.0, BELIEF)
        self.predicted_tokens += times.tokens
        self.predicted_ms += speed * (expected + drafting)
        if target_s:  # a pass of 0 s was none that this clock can tell
            self._correction.learn(times.nodes, 1e3 * target_s, expected)
            speed = 1e3 * target_s / expected  # the machine's own, in this very step
        plain = times.of(times.rows)
        spent = expected + times.drafting_ms + 1e3 * other_s / speed
        record.cost_seen.add(spent / plain, _FADE_ALL)
        record.last = self._step
        for context, count, budget in zip(contexts, tokens, plan.budgets, strict=True):
            if budget == 1:  # it drafts nothing: nothing can be said of the arm
                continue
            if context.key not in record.texts:
                record.texts[context.key] = DecayedMean(BELIEF * record.known(), BELIEF)
            record.tokens_seen.add(count, _FADE_ALL)
            record.texts[context.key].add(count, _FADE)
        for model in models:
            off = times.drafting_ms / times.levels_ms
            self._factors[model].add(min(3.0, max(0.5, off)), _FADE)
        self._tokens.add(sum(tokens) / times.rows, _FADE)
        self._cost.add(spent / plain, _FADE)
        self._step += 1
        self._spent_ms += spent
        if plan.best_ms is not None:
            lost = spent - sum(tokens) * plan.best_ms
            self._lost_ms = max(0.0, self._lost_ms + lost)
            longest = _LONGEST_MODEL if self.arms[plan.arm].models else _LONGEST
            record.pause = min(2 * record.pause, longest) if lost > 0.0 else FIRST_PAUSE

    def release(self, key: int) -> None:
        """Forgets a request; notes how much of what it could have it took."""
        first, last = self._left.pop(key, (0, 0))
        if first > 0:
            self._length_ratio.add((first - last) / first, _LENGTH_FADE)
        for record in self._records:
            record.texts.pop(key, None)
        if self._lookahead is not None:
            self._lookahead.release(key)
        self._read = {pair for pair in self._read if pair[1] != key}

    def _choose(
        self, contexts: Sequence[Context], to_come: float, times: StepBudget, seen: Preview | None
    ) -> tuple[int, float | None]:
        """The arm of the step, whose reading of prompts is charged; see `StepPlan` for the second.

        The best arm gives most beyond what its time would give anyway, at the best rate that is
        known. What a model needs to read a prompt is spread over the tokens to come.
        """
        plain_ms = times.of(times.rows)
        if not self._records:
            self._records = [self._guess(arm, contexts) for arm in self.arms]
        prefill_ms = [self._prefill_ms(arm, contexts) for arm in self.arms]
        costs, tokens = [], []
        for record, fill in zip(self._records, prefill_ms, strict=True):
            tokens.append(sum(record.tokens_of(context.key) for context in contexts))
            costs.append(record.cost_now() * plain_ms + fill * tokens[-1] / to_come)
        known = [t / cost for t, cost in zip(tokens, costs, strict=True)]
        if seen is not None:  # this one step: no rate of the steps to come
            after = self._records[0].cost_now() - 1.0  # what follows a pass, whoever drafts
            tokens[self._ngram_arm], costs[self._ngram_arm] = (
                seen.tokens,
                seen.ms + after * plain_ms,
            )
            lately = self._tokens.total / self._cost.total if self._step else 0.0
            known[self._ngram_arm] = lately * len(contexts) / plain_ms
        rate = max(known)
        gains = [t - rate * cost for t, cost in zip(tokens, costs, strict=True)]
        if seen is not None and seen.times.nodes == times.rows:  # not asked, or nothing pays
            gains[self._ngram_arm] = -inf
        best = max(range(len(gains)), key=lambda arm: (gains[arm], arm))  # first, all in one tree
        if self._lookahead is not None and seen is not None:
            others = max(value for i, value in enumerate(known) if i != self._ngram_arm)
            saved_ms = (
                seen.tokens / others - costs[self._ngram_arm] if best == self._ngram_arm else 0.0
            )
            self._lookahead.settle(max(0.0, saved_ms) / plain_ms)
        once_ms = min(_ONCE * plain_ms, _ONCE_MS)
        allowed = _SHARE * self._spent_ms + once_ms - self._lost_ms
        arm, best_ms = best, None
        for i in sorted(range(len(gains)), key=lambda i: self._records[i].last):
            loss = costs[i] + prefill_ms[i] - tokens[i] / rate
            waited = self._step - self._records[i].last
            if i == best or (seen is not None and i == self._ngram_arm):
                continue
            if waited >= self._records[i].pause and loss <= allowed:
                arm, best_ms = i, 1.0 / rate
                self._lost_ms += prefill_ms[i]
                break
        self._spent_ms += prefill_ms[arm]
        return arm, best_ms

    def _guess(self, arm: Arm, contexts: Sequence[Context]) -> ArmStats:
        """What an arm may give, before it was ever tried."""
        if not arm.models:
            return ArmStats(1.0, 1.0) if isinstance(arm.drafter, NoDrafter) else ArmStats(*_NGRAM)
        length = max(len(context.token_ids) for context in contexts)
        times = self.curve().times(length, self.most)
        draft_ms = sum(self.curve(model).ms([1], [length]) for model in arm.models)
        sizes = {size: float(times[size]) for size in range(1, self.most + 1)}
        plan = choose_tree(arm.models[0].acceptance, sizes, draft_ms)
        return ArmStats(plan.expected_tokens, plan.time_per_token * plan.expected_tokens / sizes[1])

    def _prefill_ms(self, arm: Arm, contexts: Sequence[Context]) -> float:
        """What the models of an arm need to read the prompts that they have not read."""
        return sum(
            self.curve(model).ms([model.reads(len(context.token_ids))], [0])
            for model in arm.models
            for context in contexts
            if (model, context.key) not in self._read
        )
