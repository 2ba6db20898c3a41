"""Decoding the prompts with every drafter: time per node, tokens per pass, learned rates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from statistics import median
from typing import Any, NamedTuple, cast

from redwood.algorithms.sequoia import optimal_tree
from redwood.backends.base import Backend
from redwood.bench.acceptance import Text, decoded, plain_verifier, teacher_forced
from redwood.bench.clocks import ClockedBackend, ClockedDrafter
from redwood.bench.curves import Progress
from redwood.bench.interleave import PLAIN, Candidate, Run, run
from redwood.bench.sizes import tokens_by_size
from redwood.drafters.base import Drafter, ModelDrafter
from redwood.engine.engine import RowEngine
from redwood.profiling.profile import DrafterProfile, MeasuredAcceptance, temperature_name
from redwood.sampling import SamplingParams

TREE_SIZES, MOST_LEVELS = (4, 8, 16), 8
"""Trees of a draft model that are decoded with, to compare with the expected tokens."""

_TREE_PROMPTS = 4  # enough for three numbers and for tables to begin with
_LEARNING_BUDGET = 12


class Bench:
    """Decodes the prompts at one temperature with any drafter."""

    def __init__(
        self,
        engine: RowEngine,
        prompts: Sequence[Sequence[int]],
        temperature: float,
        max_tokens: int,
        report: Progress,
    ) -> None:
        self.engine, self.prompts = engine, prompts
        self.temperature, self.max_tokens = temperature, max_tokens
        self.label = f"temperature {temperature_name(temperature)}"
        self.step_ms: list[float] = []
        self._report = report

    def plain_texts(self) -> list[Text]:
        """Decodes plainly, with seeds, so that the texts are reproducible."""
        verifier = plain_verifier(self.temperature)
        params = [self._params(seed=i, verifier=verifier) for i in range(len(self.prompts))]
        runs = self.runs(PLAIN, params, "Plain decoding")
        return [
            Text(list(prompt), made.token_ids)
            for prompt, made in zip(self.prompts, runs, strict=True)
        ]

    def unseeded(self, count: int) -> list[SamplingParams]:
        """Parameters under which drafters learn, and draw without shared noise."""
        return [self._params()] * count

    def coupled(self, count: int) -> list[SamplingParams]:
        """Parameters with a seed, the usual way: noise is shared with the drafter."""
        return [self._params(seed=i) for i in range(count)]

    def _params(self, **more: Any) -> SamplingParams:
        return SamplingParams(max_tokens=self.max_tokens, temperature=self.temperature, **more)

    def runs(self, candidate: Candidate, params: Sequence[SamplingParams], what: str) -> list[Run]:
        """Answers a prompt per entry of `params`."""
        advance = self.progress(what, len(params))
        made = []
        for prompt, each in zip(self.prompts, params, strict=False):
            made.append(run(self.engine, candidate, prompt, each))
            stats = made[-1].stats
            seconds = stats.seconds["verify"] + stats.seconds["other"]
            self.step_ms.append(1000.0 * seconds / stats.target_passes)
            advance()
        return made

    def progress(self, what: str, of: int) -> Callable[[], None]:
        """Returns a function to be called for every prompt that is done."""
        what, done = f"{what}, {self.label}", 0
        self._report(what, 0, of)

        def advance() -> None:
            nonlocal done
            done += 1
            self._report(what, done, of)

        return advance


class _Decoded(NamedTuple):
    """Tokens per pass by tree size, milliseconds per proposed node, and the learned tables."""

    sizes: dict[int, float]
    draft_ms: float
    learned: Any


def measured(
    bench: Bench, profile: DrafterProfile, drafter: Drafter, texts: Sequence[Text]
) -> DrafterProfile:
    """Returns the profile of a drafter with the measurements at one more temperature."""
    at = temperature_name(bench.temperature)
    kept = deepcopy(getattr(drafter, "reliability", None))
    rates: list[MeasuredAcceptance] = []
    try:
        if isinstance(drafter, ModelDrafter):
            rates = _acceptance(bench, profile.name, drafter.backend, texts)
            made = _with_trees(bench, profile.name, drafter, rates[0].rates)
        else:
            made = _with_texts(bench, profile.name, drafter, texts)
    finally:
        if kept is not None:
            cast(Any, drafter).reliability = kept
    return replace(
        profile,
        # Drawing above temperature 0 costs more.
        draft_ms=max(profile.draft_ms, made.draft_ms),
        acceptance=profile.acceptance | ({at: rates} if rates else {}),
        reliability=profile.reliability | ({at: made.learned} if made.learned else {}),
        tokens_by_size=profile.tokens_by_size | ({at: made.sizes} if made.sizes else {}),
    )


def _acceptance(
    bench: Bench, name: str, draft: Backend, texts: Sequence[Text]
) -> list[MeasuredAcceptance]:
    engine, count = bench.engine, len(texts)
    forced = teacher_forced(
        engine.target,
        draft,
        texts,
        bench.temperature,
        on_text=bench.progress(f"Acceptance of {name}", count),
    )
    counted = decoded(
        engine,
        draft,
        bench.prompts,
        bench.temperature,
        bench.max_tokens,
        on_text=bench.progress(f"Decoding with one level of {name}", count),
    )
    return [forced, counted]


def _with_trees(bench: Bench, name: str, drafter: ModelDrafter, rates: Sequence[float]) -> _Decoded:
    """Decodes with the best trees of some sizes, on the first prompts."""
    capacity = min(bench.engine.target.capacity, drafter.backend.capacity)
    count = min(_TREE_PROMPTS, len(bench.prompts))
    sizes, costs, learned = dict[int, float](), list[float](), getattr(drafter, "reliability", None)
    for size in (size for size in TREE_SIZES if size <= capacity):
        forwards = ClockedBackend(drafter.backend)
        parents = optimal_tree(rates, size, max_levels=MOST_LEVELS)
        shaped = ModelDrafter(cast(Backend, forwards), parents)
        if learned is not None:
            cast(Any, shaped).reliability = learned
        clocked = ClockedDrafter(shaped, forwards)
        candidate = Candidate(name, clocked, size)
        what = f"Decoding with {size} nodes of {name}"
        sizes[size] = _tokens_per_pass(bench.runs(candidate, bench.unseeded(count), what))
        if bench.temperature > 0.0:  # with a seed, children are another law's: learned as well
            bench.runs(candidate, bench.coupled(count), what)
        costs.append(clocked.ms_per_node)
    return _Decoded(sizes, median(costs) if costs else 0.0, _plain_values(learned))


def _with_texts(bench: Bench, name: str, drafter: Drafter, texts: Sequence[Text]) -> _Decoded:
    """Decodes with trees of one size; walks other sizes along the texts if nothing is drawn."""
    budget = min(_LEARNING_BUDGET, bench.engine.target.capacity)
    clocked = ClockedDrafter(drafter)
    params = bench.unseeded(len(texts))
    runs = bench.runs(Candidate(name, clocked, budget), params, f"Decoding with {name}")
    learned = _plain_values(getattr(drafter, "reliability", None))
    if drafter.draws:
        return _Decoded({budget: _tokens_per_pass(runs)}, clocked.ms_per_node, learned)
    sizes = tokens_by_size(drafter, texts, bench.temperature, bench.engine.target.vocab_size)
    return _Decoded(sizes, clocked.ms_per_node, learned)


def _tokens_per_pass(runs: Sequence[Run]) -> float:
    tokens = sum(made.stats.num_generated_tokens for made in runs)
    return tokens / sum(made.stats.target_passes for made in runs)


def _plain_values(learned: Any) -> Any:
    """The learned tables of a drafter as values for JSON: of one, or of several by name."""
    if isinstance(learned, Mapping):
        return {str(getattr(at, "name", at)): _plain_values(each) for at, each in learned.items()}
    return learned.to_dict() if hasattr(learned, "to_dict") else None
