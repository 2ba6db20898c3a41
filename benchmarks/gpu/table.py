"""Tokens per second of every way to answer the same prompts, in turns."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch
from subjects import Subject, stock

from redwood.bench.interleave import Candidate
from redwood.bench.interleave import run as answer
from redwood.bench.report import quartiles
from redwood.drafters.base import NoDrafter
from redwood.engine.engine import RowEngine
from redwood.sampling import SamplingParams

_WARM_UP_TOKENS = 8


class Timed(NamedTuple):
    """One answer. `seconds` are without prefill; passes and stages where they are known."""

    tokens: int
    seconds: float
    passes: int | None = None
    stages: dict[str, float] | None = None


class Way(NamedTuple):
    """A way to answer a prompt."""

    name: str
    budget: int | None
    answer: Callable[[list[int], SamplingParams], Timed]


def ways(subject: Subject, budgets: Sequence[int]) -> list[Way]:
    """Returns all ways; the second is plain decoding with graphs, the third HF's `generate`."""
    plain = NoDrafter()
    found = [
        _ours("plain, eager", subject.eager, Candidate("none", plain, 1)),
        _ours("plain, graphs", subject.graphs, Candidate("none", plain, 1)),
        Way("HF generate", None, lambda prompt, params: _hf(subject, prompt, params)),
        Way(
            "HF assistant_model",
            None,
            lambda prompt, params: _hf(subject, prompt, params, assistant_model=subject.assistant),
        ),
        Way(
            "HF prompt lookup",
            None,
            lambda prompt, params: _hf(subject, prompt, params, prompt_lookup_num_tokens=10),
        ),
    ]
    for kind in ("ngram", "model"):
        drafter = subject.drafter(kind)
        for budget in budgets:
            candidate = Candidate(kind, drafter, budget)
            found.append(_ours(f"{kind} trees, graphs", subject.graphs, candidate))
    return found


def measure(
    subject: Subject, listed: Sequence[Way], params: SamplingParams, left: Callable[[], float]
) -> list[dict[str, Any]]:
    """Returns one row per way: medians over the prompts, with quartiles.

    Args:
        left: seconds that are left; no prompt is begun when the last one took longer.
    """
    short = SamplingParams(
        max_tokens=min(_WARM_UP_TOKENS, params.max_tokens), temperature=params.temperature
    )
    for way in listed:
        way.answer(subject.prompts[0], short)
    timed: list[list[Timed]] = [[] for _ in listed]
    taken = 0.0
    for turn, prompt in enumerate(subject.prompts):
        if turn and left() < taken:
            break
        start = perf_counter()
        order = [(i + turn) % len(listed) for i in range(len(listed))]
        for i in order:
            timed[i].append(listed[i].answer(prompt, params))
        taken = perf_counter() - start
    speeds = [[each.tokens / each.seconds for each in own] for own in timed]
    return [
        {
            "temperature": params.temperature,
            "way": way.name,
            "budget": way.budget,
            "prompts": len(own),
            "tokens": sum(each.tokens for each in own),
            "tokens_per_s": median(speed),
            "tokens_per_s_quartiles": quartiles(speed),
            "over_plain_graphs": median(a / b for a, b in zip(speed, speeds[1], strict=True)),
            "over_hf_generate": median(a / b for a, b in zip(speed, speeds[2], strict=True)),
            **_passes(own),
        }
        for way, own, speed in zip(listed, timed, speeds, strict=True)
    ]


def _passes(own: Sequence[Timed]) -> dict[str, Any]:
    """Tokens per target pass, and ms per pass by stage, where they are known."""
    counted = [each for each in own if each.passes and each.stages]
    passes = sum(each.passes or 0 for each in counted)
    if not passes:
        return {"tokens_per_pass": None, "ms_per_pass": None}
    stages = counted[0].stages or {}
    return {
        "tokens_per_pass": sum(each.tokens for each in counted) / passes,
        "ms_per_pass": {
            stage: 1e3 * sum((each.stages or {})[stage] for each in counted) / passes
            for stage in stages
            if stage != "prefill"
        },
    }


def _ours(name: str, engine: RowEngine, candidate: Candidate) -> Way:
    def timed(prompt: list[int], params: SamplingParams) -> Timed:
        stats = answer(engine, candidate, prompt, params).stats
        return Timed(
            stats.num_generated_tokens,
            stats.decode_seconds,
            stats.target_passes,
            dict(stats.seconds),
        )

    return Way(name, None if candidate.name == "none" else candidate.budget, timed)


def _hf(subject: Subject, prompt: list[int], params: SamplingParams, **how: Any) -> Timed:
    """Transformers' `generate`; the time of one token, plain, is taken off as prefill."""
    models = [subject.model, *(m for m in how.values() if isinstance(m, torch.nn.Module))]
    with stock(*models):
        _, first_s = _generate(subject, prompt, params, 1)
        tokens, all_s = _generate(subject, prompt, params, params.max_tokens, **how)
    if tokens == 1:
        return Timed(1, all_s)
    return Timed(tokens - 1, max(all_s - first_s, 1e-9))  # the first one came with prefill


def _generate(
    subject: Subject, prompt: list[int], params: SamplingParams, max_tokens: int, **how: Any
) -> tuple[int, float]:
    ids = torch.tensor([prompt], device=subject.model.device)
    chance: dict[str, Any] = {"do_sample": False}
    if params.temperature > 0.0:  # top_k: Transformers would cut at 50
        chance = {"do_sample": True, "temperature": params.temperature, "top_k": 0, "top_p": 1.0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _wait(ids)
        start = perf_counter()
        made = subject.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            eos_token_id=subject.ends or None,
            pad_token_id=subject.ends[0] if subject.ends else 1,
            **chance,
            **how,
        )
        _wait(ids)
    return made.shape[1] - len(prompt), perf_counter() - start


def _wait(tensor: torch.Tensor) -> None:
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)
