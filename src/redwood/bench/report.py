"""Figures: speed of candidates on one target, token for token comparisons, times of one forward.

Answers come from `interleave`; loading and printing are elsewhere. Prefill, a model drafter's
included, is not part of decoding time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from statistics import median

import numpy as np
import torch

from redwood.backends.base import Backend, Nodes
from redwood.backends.rows import fill
from redwood.bench.interleave import Candidate, Run, rotated
from redwood.engine.engine import RowEngine
from redwood.engine.stats import STAGES
from redwood.errors import ArgumentError, CapacityError
from redwood.profiling.measure import Kind, filled_rows, random_tokens, timed_forward
from redwood.sampling import GumbelNoise, History, SamplingParams, probs_from_scores, scores

NEAR_TIE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 3e-1}
"""Two best scores closer than this share of the scores' spread are a near tie, by logits' dtype."""

_WARM_UP_ROUNDS = 2


@dataclass(frozen=True)
class Difference:
    """The first difference between an answer and the plain one.

    Args:
        prompt: index of the prompt.
        position: index of the first token that differs.
        plain_token, token: the two tokens; None where an answer had ended.
        margin: difference of the plain run's two best scores there, recomputed; None where only one
            token was possible.
        near_tie: whether the margin is within `NEAR_TIE`.
    """

    prompt: int
    position: int
    plain_token: int | None
    token: int | None
    margin: float | None
    near_tie: bool


@dataclass(frozen=True)
class Report:
    """Figures of a candidate over all prompts. Spreads are quartiles.

    `tokens_per_s` is the median over the prompts, `ratio_to_plain` the median of the ratios of
    single prompts, `mean_acceptance_length` all tokens by all target passes. `identical` and the
    counts after it are None where nothing can be compared (no seed); `budget` is None if planned.
    """

    drafter: str
    budget: int | None
    num_prompts: int
    tokens_per_s: float
    tokens_per_s_spread: tuple[float, float]
    ratio_to_plain: float
    ratio_spread: tuple[float, float]
    mean_acceptance_length: float
    identical: bool | None
    num_identical: int | None
    num_differences: int | None
    num_near_ties: int | None
    differences: list[Difference]
    ms_per_pass: dict[str, float]


@dataclass(frozen=True)
class ForwardTimes:
    """Milliseconds of one forward by number of tokens: median and quartiles."""

    backend: str
    ms: dict[int, float]
    spread: dict[int, tuple[float, float]]
    context: int
    repeats: int
    dtype: str
    device: str


def reports(
    engine: RowEngine,
    candidates: Sequence[Candidate],
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    runs: Sequence[Sequence[Sequence[Run]]],
) -> list[Report]:
    """Returns a report per candidate of `alternate`; the first candidate is the plain one."""
    plain = runs[0]
    return [
        _report(candidate, own, plain, _differences(engine, prompts, params, own, plain))
        for candidate, own in zip(candidates, runs, strict=True)
    ]


def comparable(params: SamplingParams) -> bool:
    """Whether plain decoding gives one text only: arg-max, or coupled by a seed."""
    return params.temperature == 0.0 or (params.seed is not None and params.coupled)


def first_difference(
    engine: RowEngine,
    prompt: Sequence[int],
    params: SamplingParams,
    plain: Sequence[int],
    other: Sequence[int],
    index: int = 0,
) -> Difference | None:
    """Returns the first difference of `other` from `plain` (token ids); None: they are equal.

    Args:
        index: of the prompt, for `Difference.prompt`.
    """
    pairs = enumerate(zip_longest(plain, other))
    found = next(((i, a, b) for i, (a, b) in pairs if a != b), None)
    if found is None:
        return None
    position, plain_token, token = found
    margin, limit = _margin(engine.target, prompt, params, plain[:position])
    finite = margin if math.isfinite(margin) else None
    return Difference(index, position, plain_token, token, finite, margin <= limit)


def forward_times(
    backend: Backend, counts: Sequence[int], *, context: int, repeats: int
) -> ForwardTimes:
    """Times one forward of each number of tokens (a chain) behind `context` committed tokens.

    The numbers of tokens are interleaved in rotating order; the row is truncated after each.

    Raises:
        ArgumentError: a count or repeats below 1, a negative context.
        CapacityError: context and tokens do not fit.
    """
    counts = list(dict.fromkeys(counts))
    if not counts or min(counts) < 1:
        raise ArgumentError(f"tokens {counts} must be numbers of at least 1")
    if context < 0 or repeats < 1:
        raise ArgumentError(f"context {context} must be 0 or more, repeats {repeats} at least 1")
    if context + max(counts) > backend.capacity:
        raise CapacityError(
            f"context {context} and {max(counts)} tokens exceed the capacity of "
            f"{backend.capacity} slots: lower them"
        )
    tokens = random_tokens(backend, context + max(counts))
    times: dict[int, list[float]] = {count: [] for count in sorted(counts)}
    dtype, kinds = "", {count: Kind(1, count, context) for count in counts}
    with filled_rows(backend, list(kinds.values()), tokens) as rows:
        for turn in range(-_WARM_UP_ROUNDS, repeats):
            for count in rotated(counts, turn):
                ms, logits = timed_forward(backend, kinds[count], rows, tokens)
                if turn >= 0:
                    times[count].append(ms)
                dtype = str(logits.dtype).removeprefix("torch.")
    return ForwardTimes(
        backend=backend.name,
        ms={count: median(listed) for count, listed in times.items()},
        spread={count: quartiles(listed) for count, listed in times.items()},
        context=context,
        repeats=repeats,
        dtype=dtype,
        device=str(backend.device),
    )


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Returns the first and the third quartile."""
    low, high = np.percentile(values, [25, 75])
    return float(low), float(high)


def _differences(
    engine: RowEngine,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    own: Sequence[Sequence[Run]],
    plain: Sequence[Sequence[Run]],
) -> list[Difference] | None:
    """The first difference on every prompt that has one, in any repeat; None: not comparable."""
    if not comparable(params):
        return None
    found = []
    for i, (prompt, answers) in enumerate(zip(prompts, own, strict=True)):
        reference = plain[i][0].token_ids
        unlike = next((a.token_ids for a in answers if a.token_ids != reference), reference)
        difference = first_difference(engine, prompt, params, reference, unlike, i)
        if difference is not None:
            found.append(difference)
    return found


def _report(
    candidate: Candidate,
    own: Sequence[Sequence[Run]],
    plain: Sequence[Sequence[Run]],
    differences: list[Difference] | None,
) -> Report:
    stats = [answer.stats for answers in own for answer in answers]
    speeds = [median(answer.stats.tokens_per_s for answer in answers) for answers in own]
    ratios = [
        median(a.stats.tokens_per_s / p.stats.tokens_per_s for a, p in zip(ours, base, strict=True))
        for ours, base in zip(own, plain, strict=True)
    ]
    passes = sum(s.target_passes for s in stats)
    return Report(
        drafter=candidate.name,
        budget=None if candidate.planner else candidate.budget,
        num_prompts=len(own),
        tokens_per_s=median(speeds),
        tokens_per_s_spread=quartiles(speeds),
        ratio_to_plain=median(ratios),
        ratio_spread=quartiles(ratios),
        mean_acceptance_length=sum(s.num_generated_tokens for s in stats) / passes,
        identical=None if differences is None else not differences,
        num_identical=None if differences is None else len(own) - len(differences),
        num_differences=None if differences is None else len(differences),
        num_near_ties=None if differences is None else sum(d.near_tie for d in differences),
        differences=differences or [],
        ms_per_pass=_ms_per_pass([s.seconds for s in stats], passes),
    )


def _ms_per_pass(seconds: Sequence[Mapping[str, float]], passes: int) -> dict[str, float]:
    stages = [stage for stage in STAGES if stage != "prefill"]
    return {stage: 1000.0 * sum(s[stage] for s in seconds) / passes for stage in stages}


def _margin(
    backend: Backend, prompt: Sequence[int], params: SamplingParams, answer: Sequence[int]
) -> tuple[float, float]:
    """The margin of the two best choices of plain decoding after `answer`, and that of a near tie.

    At temperature 0 the choices are by score, else by log p plus the noise of the seed.
    """
    tokens = [*prompt, *answer]
    row = backend.open()
    try:
        fill(backend, row, tokens[:-1])
        (logits,) = backend.extend([Nodes(row, tokens[-1:])])
    finally:
        backend.release(row)
    history = History(prompt)
    history.extend(answer)
    keys = scores(logits[0], params, history)
    limit = NEAR_TIE.get(logits.dtype, NEAR_TIE[torch.float32]) * float(logits.float().std())
    if params.temperature > 0.0:
        assert params.seed is not None
        noise = GumbelNoise(params.seed, len(keys))(len(tokens))
        keys = probs_from_scores(keys, params).log() + torch.from_numpy(noise)
        limit /= params.temperature
    best, second = keys.topk(2).values.tolist()
    return best - second, limit
