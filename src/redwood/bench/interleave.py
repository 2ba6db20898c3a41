"""Candidates on one target: drafters to compare, and answers that are decoded in turns.

On CPUs, candidates answer a prompt concurrently, each with a row of its own on the same target, and
take turns step by step: a slow second of the machine affects all of them alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from time import perf_counter
from typing import NamedTuple

from redwood.algorithms.successors import AnyTable, copy_of
from redwood.drafters.base import Drafter, NgramDrafter, NoDrafter, attach, parts_of
from redwood.engine.engine import RowEngine, Step
from redwood.engine.stats import Stats
from redwood.errors import ArgumentError, CapacityError
from redwood.planner.planner import Planner
from redwood.sampling import SamplingParams

_WARM_UP_TOKENS = 8


class Candidate(NamedTuple):
    """A drafter and its budget, or a planner that chooses both."""

    name: str
    drafter: Drafter
    budget: int
    planner: Planner | None = None


PLAIN = Candidate("none", NoDrafter(), 1)
"""Plain decoding."""


class Run(NamedTuple):
    """One answer: its tokens and its statistics."""

    token_ids: list[int]
    stats: Stats


def run(
    engine: RowEngine,
    candidate: Candidate,
    prompt: Sequence[int],
    params: SamplingParams,
    on_step: Callable[[Step], None] | None = None,
) -> Run:
    """Answers one prompt (token ids) with one candidate; `on_step` sees every step.

    The engine must be idle; it keeps the candidate's drafter, budget and planner.
    """
    engine.drafter, engine.budget = candidate.drafter, candidate.budget
    engine.planner = candidate.planner
    key = engine.add(prompt, params)
    stats, tokens = engine.stats(key), list[int]()
    try:
        while True:
            for step in engine.step():
                if step.error is not None:
                    raise step.error
                if on_step is not None:
                    on_step(step)
                tokens += step.token_ids
                if step.finish_reason is not None:
                    return Run(tokens, stats)
    finally:
        engine.cancel(key)


class Stepper:
    """A candidate with rows of its own on the target of an engine.

    Attributes:
        seconds: of its steps since `start`.
        texts: token ids by prompt.
        stats: of each prompt.
        table: in place of the drafter's own, if that has one; None: its own.
    """

    def __init__(self, engine: RowEngine, candidate: Candidate, rows: int = 1) -> None:
        self.engine = RowEngine(
            engine.target,
            candidate.drafter,
            tokenizer=engine.tokenizer,
            eos_ids=sorted(engine.eos_ids),
            budget=candidate.budget,
            planner=candidate.planner,
            max_rows=rows,
            prefill_chunk=engine.prefill_chunk,
            prefill_beside=engine.prefill_beside,
            kv_tokens=engine.kv_tokens,
        )
        self.seconds = 0.0
        self.stats: list[Stats] = []
        self.table: AnyTable | None = None
        self._texts: dict[int, list[int]] = {}

    def start(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> None:
        """Queues prompts (token ids), and forgets the previous ones."""
        self.seconds, self.stats, self._texts = 0.0, [], {}
        for prompt in prompts:
            key = self.engine.add(prompt, params)
            if self.table is not None:
                attach(self.engine.drafter, key, table=self.table)
            self._texts[key] = []
            self.stats.append(self.engine.stats(key))

    @property
    def texts(self) -> list[list[int]]:
        return list(self._texts.values())

    def step(self) -> None:
        """Does one step of its rows."""
        start = perf_counter()
        steps = self.engine.step()
        self.seconds += perf_counter() - start
        for step in steps:
            if step.error is not None:
                raise step.error
            self._texts[step.request] += step.token_ids

    def stop(self) -> None:
        """Cancels unfinished requests."""
        for key in self._texts:
            self.engine.cancel(key)


def run_interleaved(
    steppers: Sequence[Stepper],
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    on_end: Callable[[], None] | None = None,
) -> None:
    """All steppers answer the prompts concurrently; the next step is that of the least total time.

    `on_end` is called as each of them ends.
    """
    try:
        for stepper in steppers:
            stepper.start(prompts, params)
        running = list(steppers)
        while running:
            stepper = min(running, key=lambda stepper: stepper.seconds)
            stepper.step()
            if not stepper.engine.busy:
                running.remove(stepper)
                if on_end is not None:
                    on_end()
    finally:
        for stepper in steppers:
            stepper.stop()


def alternate(
    engine: RowEngine,
    candidates: Sequence[Candidate],
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    repeats: int = 1,
    together: bool | None = None,
    on_run: Callable[[], None] | None = None,
) -> list[list[list[Run]]]:
    """Returns runs[candidate][prompt][repeat]; each candidate has a short warm-up run first.

    No run drafts from a table that knows its answer: each begins with what its candidate learned
    from the prompts before, not from the warm-up, another candidate or another repeat. The
    drafters' own tables get what was learned in the end.

    Args:
        together: candidates answer a prompt concurrently, in turns step by step, with a row of the
            target for each; False: one after the other, in rotating order. None: concurrently on
            CPUs, which others share; a GPU's memory may not hold more rows.
        on_run: called after each run.

    Raises:
        ArgumentError: no prompts, repeats below 1, a budget below 1.
        CapacityError: a budget beyond the target's capacity.
    """
    _check(engine, candidates, prompts, repeats)
    runs: list[list[list[Run]]] = [[[] for _ in prompts] for _ in candidates]
    if together is None:
        together = engine.target.device.type == "cpu"
    steppers = [Stepper(engine, candidate) for candidate in candidates]
    known = [_table_of(candidate.drafter) for candidate in candidates]
    short = replace(params, max_tokens=min(params.max_tokens, _WARM_UP_TOKENS))
    for stepper, table in zip(steppers, known, strict=True):
        stepper.table = None if table is None else copy_of(table)
        run_interleaved([stepper], prompts[:1], short)
    for i, prompt in enumerate(prompts):
        for repeat in range(repeats):
            order = rotated(range(len(steppers)), i * repeats + repeat)
            for stepper, table in zip(steppers, known, strict=True):
                stepper.table = None if table is None else copy_of(table)
            for group in [order] if together else [[j] for j in order]:
                run_interleaved([steppers[j] for j in group], [prompt], params, on_run)
                for j in group:
                    runs[j][i].append(Run(steppers[j].texts[0], steppers[j].stats[0]))
        known = [stepper.table for stepper in steppers]
    for candidate, table in zip(candidates, known, strict=True):
        own = _table_of(candidate.drafter)
        if own is not None and table is not None:
            own.load(table.entries(), table.rows)
    return runs


def _table_of(drafter: Drafter) -> AnyTable | None:
    """The table that a drafter teaches and drafts from, if it has one."""
    parts = [part for part in parts_of(drafter) if isinstance(part, NgramDrafter)]
    return next((part.table for part in parts if part.table is not None), None)


def _check(
    engine: RowEngine,
    candidates: Sequence[Candidate],
    prompts: Sequence[Sequence[int]],
    repeats: int,
) -> None:
    if not prompts or repeats < 1:
        raise ArgumentError(f"{len(prompts)} prompts and {repeats} repeats: both must be >= 1")
    for candidate in candidates:
        if candidate.budget < 1:
            raise ArgumentError(f"budget {candidate.budget} must be at least 1")
        if candidate.budget > engine.target.capacity:
            raise CapacityError(
                f"budget {candidate.budget} exceeds the capacity of {engine.target.capacity} "
                "slots: lower it"
            )


def rotated(items: Sequence[int], turn: int) -> list[int]:
    """Returns the items, another one first each turn."""
    at = turn % len(items)
    return [*items[at:], *items[:at]]
