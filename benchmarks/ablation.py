"""What each mechanism of the planner buys, on a scripted clock: no machine is timed.

    python benchmarks/replay.py --name ablation --num 28 --rows 4 \
        --prompts src/redwood/data/calibration.jsonl benchmarks/prompts/editing_dev.jsonl
    python benchmarks/ablation.py --json out.json

The engine, the planner and the n-gram drafter are the real ones. The target says recorded answers
(or random tokens), draft models agree with it as often as their probabilities say, or never; every
forward takes what a latency model says, within 3 %, an n-gram query and a comparison of arms take a
fixed time. Numbers are the time of decoding over that of plain decoding; the target's prefill, the
same in both, is left out, a draft model's is not.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import common
import numpy as np
import torch
from replay import Answer, load_answers
from rich.console import Console
from rich.table import Table
from torch import Tensor

from redwood.backends.base import Nodes
from redwood.drafters.base import ModelDrafter, NgramDrafter, UnionDrafter
from redwood.drafters.context import Context
from redwood.drafters.limits import NO_LIMITS, Limits
from redwood.engine import stats
from redwood.engine.engine import RowEngine
from redwood.planner import arms, budget, ngram_lookahead, planner
from redwood.planner.planner import Planner, StepPlan
from redwood.profiling.latency import LatencyModel, LatencyPoint
from redwood.sampling import SamplingParams
from redwood.testing import TableBackend
from redwood.tree import TokenTree

QUERY_MS, INDEX_MS, CHOOSE_MS = 0.1, 0.001, 0.1  # a query, each token it indexes; weighing of arms
JITTER = 0.03
MAX_TOKENS = 1024  # asked for; answers have 128 at most, as chats seldom take what they may
EOS, OTHER = 0, 1  # the end; what the target says to texts that are not the record's


class Machine(NamedTuple):
    """Milliseconds of a plain pass; passes of 1, 4, 8, 16 nodes over it, as the planner is told and
    as they are; a draft model's pass over the target's; prompt tokens that it reads."""

    plain_ms: float
    told: tuple[float, ...]
    true: tuple[float, ...]
    draft: float
    window: int | None

    def model(self, shape: Sequence[float], scale: float = 1.0) -> LatencyModel:
        """The latency model of such passes."""
        times = [(n, scale * self.plain_ms * t) for n, t in zip((1, 4, 8, 16), shape, strict=True)]
        return LatencyModel(tuple(LatencyPoint(1, n, 0, ms, ms, ms) for n, ms in times))


_CPU, _FLAT = (1.0, 1.2, 1.7, 2.6), (1.0, 1.0, 1.02, 1.05)
MACHINES = {
    "cpu": Machine(5.0, _CPU, _CPU, 0.35, 128),
    "cpu, all read": Machine(5.0, _CPU, _CPU, 0.35, None),
    "gpu": Machine(5.0, _FLAT, _FLAT, 0.1, None),
    "streamed": Machine(3000.0, _FLAT, _FLAT, 0.02, None),
    "misjudged": Machine(5.0, (1.0, 1.05, 1.1, 1.2), (1.2, 1.6, 2.2, 3.4), 0.35, 128),
}
# Shares of tokens at which a draft model gives its first choice 0.95, 0.7 and 0.4.
QUALITIES = {"good": (0.8, 0.15, 0.05), "fair": (0.3, 0.4, 0.3)}


class Case(NamedTuple):
    """Texts, what joins the n-grams, the machine, rows at once."""

    texts: str
    drafter: str
    machine: str
    rows: int = 1

    def __str__(self) -> str:
        return f"{self.texts}, {self.drafter}, {self.machine}, {self.rows}"


CASES = [
    *(Case("edits", d, m) for d in ("ngram", "good", "useless") for m in ("cpu", "gpu")),
    *(Case("open", d, m) for d in ("ngram", "good", "fair", "useless") for m in ("cpu", "gpu")),
    *(Case("random", d, m) for d in ("ngram", "useless") for m in ("cpu", "gpu")),
    *(Case("mixed", d, m) for d in ("fair", "turning") for m in ("cpu", "gpu")),
    *(Case(t, d, m, 4) for t in ("open", "edits") for d in ("good", "useless")
      for m in ("cpu", "gpu")),
    *(Case("open", d, "streamed") for d in ("good", "useless")),
    *(Case("reading", d, "cpu, all read") for d in ("good", "useless")),
    *(Case("edits", "ngram", "misjudged"), Case("open", "fair", "misjudged")),
]  # fmt: skip


class ScriptedClock:
    """Seconds that pass where the simulation says so."""

    def __init__(self, seed: int) -> None:
        self.now, self._rng = 0.0, np.random.default_rng(seed)

    def __call__(self) -> float:
        return self.now

    def spend(self, ms: float) -> None:
        self.now += ms / 1e3

    def passes(self, ms: float) -> None:
        """The same for a forward, whose time is never quite the same."""
        self.spend(ms * math.exp(JITTER * self._rng.normal()))


class Script(TableBackend):
    """A model that knows the answers: the first token of a prompt says which one.

    Args:
        quality: of a draft model, see `QUALITIES`; "useless": never right, and sure of it;
            "turning": useless for the first half of the texts, then good. "": the target.
    """

    def __init__(
        self, answers: Sequence[Answer], vocab: int, clock: ScriptedClock, times: LatencyModel,
        quality: str = "",
        seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(vocab, capacity=4096)
        self._known = {answer.prompt[0]: (i, answer) for i, answer in enumerate(answers)}
        self._clock, self._times, self._quality, self._seed = clock, times, quality, seed

    def extend(self, rows: Sequence[Nodes]) -> list[Tensor]:
        drafts = [nodes for nodes in rows if self._quality or nodes.num_logits is None]
        count = sum(len(nodes.token_ids) for nodes in drafts)
        if count:
            self._clock.passes(self._times.ms([count], [0]))
        return super().extend(rows)

    def logits(self, text: Sequence[int]) -> Tensor:
        index, answer = self._known[text[0]]
        said, place = text[len(answer.prompt) :], len(text) - len(answer.prompt)
        right = OTHER
        if list(said) == answer.answer[: len(said)]:
            right = answer.answer[place] if place < len(answer.answer) else EOS
        scores = torch.full((self.vocab_size,), -20.0)
        if not self._quality:
            scores[right] = 0.0
            return scores
        rng, quality = (
            np.random.default_rng([self._seed, index, max(0, place), len(self._quality)]),
            self._quality,
        )
        if quality == "turning":
            quality = "useless" if 2 * index < len(self._known) else "good"
        first, second, third = (int(t) for t in rng.integers(2, self.vocab_size, 3))
        sure = 0.7
        if quality in QUALITIES and right != OTHER:
            sure = float(rng.choice([0.95, 0.7, 0.4], p=QUALITIES[quality]))
            first, second = (right, second) if rng.random() < sure else (first, right)
        for token, prob in ((third, 0.3), (second, 0.7)):
            scores[token] = math.log((1 - sure) * prob)
        scores[first] = math.log(sure)
        return scores


class TimedNgrams(NgramDrafter):
    """N-grams whose queries take scripted time."""

    def __init__(self, clock: ScriptedClock) -> None:
        super().__init__()
        self._clock, self._lengths = clock, dict[int, int]()

    def propose(
        self, contexts: Sequence[Context], budgets: Sequence[int], limits: Limits = NO_LIMITS
    ) -> list[TokenTree]:
        for context in contexts:
            length = len(context.token_ids)
            new = length - self._lengths.get(context.key, 0)
            self._clock.spend(QUERY_MS + INDEX_MS * new)
            self._lengths[context.key] = length
        return super().propose(contexts, budgets, limits)


class TimedPlanner(Planner):
    """A planner that takes time where it compares arms."""

    clock: ScriptedClock
    _last: StepPlan | None = None

    def begin(self, *args: Any) -> StepPlan:
        plan = super().begin(*args)
        if plan is not self._last:
            self.clock.spend(CHOOSE_MS)
        self._last = plan
        return plan


def compact(answers: Sequence[Answer]) -> tuple[list[Answer], int]:
    """The answers in a small vocabulary, each prompt with a first token of its own; its size."""
    used = sorted({token for a in answers for token in (*a.prompt, *a.answer)})
    ids, count = {token: 2 + i for i, token in enumerate(used)}, 2 + len(used)
    made = [
        Answer(a.kind, [count + i, *map(ids.__getitem__, a.prompt)], [ids[t] for t in a.answer])
        for i, a in enumerate(answers)
    ]
    return made, count + len(answers)


def texts_of(records: Sequence[Answer]) -> dict[str, list[Answer]]:
    rng = np.random.default_rng(1)
    edits = [a for a in records if a.kind == "edit"][:12]
    questions = [a for a in records if a.kind != "edit"][:12]
    random = [
        Answer("random", *(rng.integers(0, 3000, n).tolist() for n in (100, 128)))
        for _ in range(12)
    ]
    mixed = [a for pair in zip(edits[:6], questions[:6], strict=True) for a in pair]
    reading = [
        Answer("reading", [*a.prompt, *rng.integers(0, 3000, 700).tolist()], a.answer[:40])
        for a in questions
    ]
    return {"reading": reading, "edits": edits, "open": questions, "random": random, "mixed": mixed}


def simulated_s(case: Case, answers: Sequence[Answer], planned: bool, seed: int = 0) -> float:
    """Seconds of decoding all answers; the seed sets their order and all that is drawn."""
    machine, clock = MACHINES[case.machine], ScriptedClock(seed)
    order = np.random.default_rng(seed).permutation(len(answers)) if seed else range(len(answers))
    known, vocab = compact(
        [answers[i] for i in order] * (3 if case.rows > 1 else 1)
    )  # as many steps
    target = Script(known, vocab, clock, machine.model(machine.true))
    with patch.object(stats, "perf_counter", clock), \
         patch.object(ngram_lookahead, "perf_counter", clock):  # fmt: skip
        engine = RowEngine(target, eos_ids=[EOS], max_rows=case.rows)
        if planned:
            drafter: Any = TimedNgrams(clock)
            curves: dict[ModelDrafter, LatencyModel] = {}
            if case.drafter != "ngram":
                draft_times = machine.model(machine.true, machine.draft)
                backend = Script(known, vocab, clock, draft_times, case.drafter, seed)
                model = ModelDrafter(backend, window=machine.window)
                drafter = UnionDrafter([model, drafter])
                curves[model] = machine.model(machine.told, machine.draft)
            made = TimedPlanner(drafter, machine.model(machine.told), curves)
            made.clock = clock
            engine = RowEngine(target, drafter, planner=made, eos_ids=[EOS], max_rows=case.rows)
        params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0)
        want = {engine.add(answer.prompt, params): [*answer.answer, EOS] for answer in known}
        said: dict[int, list[int]] = {key: [] for key in want}
        while engine.busy:
            for step in engine.step():
                assert step.error is None, step.error
                said[step.request] += step.token_ids
        assert said == want
    return clock.now


Change = tuple[Any, str, Any]


class _NoFactors(dict[Any, Any]):
    """Factors of drafting time that nothing is learned of."""

    def setdefault(self, key: Any, default: Any = None) -> Any:
        return budget.DecayedMean()

    __getitem__ = setdefault


def _stats(last: int, pause: int) -> Callable[..., arms.ArmStats]:
    return lambda tokens, cost: arms.ArmStats(tokens, cost, last=last, pause=pause)


def _whole_cost(end: Callable[..., None]) -> Callable[..., None]:
    def counted(self: Planner, plan: StepPlan, *args: Any) -> None:
        end(self, plan if plan.best_ms is None else plan._replace(best_ms=0.0), *args)

    return counted


def _unfactored(init: Callable[..., None]) -> Callable[..., None]:
    def made(self: Planner, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        self._factors = _NoFactors()

    return made


_NO_PAUSE = [
    (planner, "ArmStats", _stats(-1, 1)), (planner, "FIRST_PAUSE", 1),
    (planner, "_MAX_PAUSE", 1),
]  # fmt: skip
ABLATIONS: dict[str, list[Change]] = {
    "share of time": [(planner, "_EXPLORE_SHARE", 0.0)],
    "passes up front": [(planner, "_EXPLORE_PASSES", 0.0)],
    "doubling pause": [(planner, "_MAX_PAUSE", 16)],
    "longest pause": [(planner, "_MAX_PAUSE", 10**9)],
    "any pause": _NO_PAUSE,
    "regret, not cost": [(Planner, "end", _whole_cost(Planner.end))],
    "reused plans": [(planner, "_MAX_REUSE", 0)],
    "length ratio": [(planner, "_LENGTH_RATIO", 1.0), (planner, "_LENGTH_BELIEF", 1e12)],
    "learned length": [(planner, "_LENGTH_BELIEF", 1e12)],
    "two fades": [(planner, "_FADE_ALL", 0.95)],
    "rates by text": [(arms.ArmStats, "tokens_of", lambda self, key: self.known())],
    "belief": [(arms, "BELIEF", 1.0), (planner, "BELIEF", 1.0)],
    "drafting factor": [(Planner, "__init__", _unfactored(Planner.__init__))],
    "speed": [(budget, "_SPEED_RATE", 0.0)],
    "shape": [(budget, "_SHAPE_RATE", 0.0)],
    "query debt": [(ngram_lookahead, "_SHARE", 1e9)],
    "query credit": [(ngram_lookahead, "_CREDIT", 0.0)],
    "nodes that pay": [(ngram_lookahead, "_FULL_EVERY", 1)],
    "full queries": [(ngram_lookahead, "_FULL_EVERY", 10**9)],
}


@contextmanager
def without(names: Sequence[str]) -> Iterator[None]:
    """The planner without these mechanisms."""
    with ExitStack() as stack:
        for target, name, value in (change for each in names for change in ABLATIONS[each]):
            stack.enter_context(patch.object(target, name, value))
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--answers", default="ablation", help="name of the record")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each case, to be averaged")
    parser.add_argument("--only", nargs="*", help="mechanisms; a+b: without both; default: each")
    parser.add_argument("--cases", default="", help="cases with this in their name; default: all")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    texts = texts_of(load_answers(args.answers))
    seeds, cases = range(args.seeds), [case for case in CASES if args.cases in str(case)]
    plain = {(c, s): simulated_s(c, texts[c.texts], False, s) for c in cases for s in seeds}
    rows: list[dict[str, Any]] = []
    table = Table(title="time over plain decoding, without a mechanism")
    for column in ("without", "mean", "worst", "in", "largest rise", "in", "largest fall", "in"):
        table.add_column(column, justify="right")
    for name in ["none", *(ABLATIONS if args.only is None else args.only)]:
        with without([] if name == "none" else name.split("+")):
            every = {
                c: [simulated_s(c, texts[c.texts], True, s) / plain[c, s] for s in seeds]
                for c in cases
            }
        own = {c: float(np.mean(every[c])) for c in cases}
        rows.append(
            {
                "without": name,
                "cases": {str(case): own[case] for case in cases},
                "seeds": {str(c): every[c] for c in cases},
            }
        )
        base = rows[0]["cases"]
        moved = {case: own[case] / base[str(case)] - 1.0 for case in cases}
        worst, up, down = (f(m, key=m.__getitem__) for f, m in
                           ((max, own), (max, moved), (min, moved)))  # fmt: skip
        mean = math.exp(float(np.mean(np.log(list(own.values())))))
        told = (
            name, f"{mean:.4f}", f"{own[worst]:.4f}", str(worst),
            f"{moved[up]:+.2%}", str(up), f"{moved[down]:+.2%}", str(down),
        )  # fmt: skip
        rows[-1] |= {"mean": mean, "worst": own[worst]}
        print(*told, sep=" | ", flush=True)
        table.add_row(*told)
        if args.json:
            setting = common.setting(answers=args.answers, seeds=args.seeds, cases=args.cases)
            args.json.write_text(json.dumps({"setting": setting, "rows": rows}, indent=1) + "\n")
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
