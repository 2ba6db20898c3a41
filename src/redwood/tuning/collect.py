"""Prompts -> the target's own answers, through the engine: with any backend and any drafter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from redwood.engine.request import TokenLogprobs
from redwood.engine.text import Engine
from redwood.errors import ArgumentError, check_count
from redwood.sampling import SamplingParams
from redwood.tuning.corpus import Sample, read_samples, write_samples

TOGETHER = 8
"""Prompts that are answered at once, and whose answers one file holds."""

Progress = Callable[[str, int, int], None]
"""Told what is done, how much of it, and of how much."""


def collect(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    folder: Path,
    *,
    key: str,
    max_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    top: int = 0,
    on_progress: Progress | None = None,
) -> list[Sample]:
    """Returns a sample per prompt; what an earlier, interrupted call left in `folder` is kept.

    Args:
        engine: of the target; answers are exact whatever drafts.
        prompts: token ids.
        folder: made if need be; see `redwood.tuning.corpus`.
        key: names everything that the answers depend on; files of another key are refused.
        max_tokens: of each answer; an end-of-sequence token is part of it.
        temperature: of the answers; the seed of prompt i is `seed` + i.
        top: most probable tokens to keep at each position, for distillation; 0 to 20.

    Raises:
        ArgumentError: no prompts, a number out of range, a file that is damaged or of another run.
        CapacityError: a prompt that fills the whole context.
        OSError: a folder that cannot be written.
    """
    if not prompts:
        raise ArgumentError("there are no prompts to answer")
    check_count("top", top, least=0)
    tell = on_progress or (lambda what, done, of: None)
    folder.mkdir(parents=True, exist_ok=True)
    made: list[Sample] = []
    for start in range(0, len(prompts), TOGETHER):
        tell("Answering", start, len(prompts))
        group = prompts[start : start + TOGETHER]
        path = folder / f"{start // TOGETHER:06d}.safetensors"
        if path.exists():
            known = read_samples(path, key)
            if [sample.prompt for sample in known] != [list(prompt) for prompt in group]:
                raise ArgumentError(f"{path} holds other prompts: choose another folder")
        else:
            numbers = range(start, start + len(group))
            params = answer_params(numbers, max_tokens, temperature, seed, top)
            known = _answers(engine, group, params)
            write_samples(path, key, known)
        made += known
    tell("Answering", len(prompts), len(prompts))
    return made


def answer_params(
    numbers: Sequence[int], max_tokens: int, temperature: float, seed: int, top: int = 0
) -> list[SamplingParams]:
    """Returns the parameters with which prompts of these numbers are answered."""
    sampled = temperature != 0.0
    return [
        SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed + number if sampled else None,
            logprobs=top or None,
        )
        for number in numbers
    ]


def _answers(
    engine: Engine, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
) -> list[Sample]:
    """Decodes all of them at once, each with its own seed. The engine must be idle."""
    keys = [engine.add(list(p), each) for p, each in zip(prompts, params, strict=True)]
    tokens = {key: list[int]() for key in keys}
    entries = {key: list[TokenLogprobs]() for key in keys}
    try:
        while engine.busy:
            for step in engine.step():
                if step.error is not None:
                    raise step.error
                tokens[step.request] += step.token_ids
                entries[step.request] += step.logprobs or ()
    finally:
        for key in keys:
            engine.cancel(key)
    return [
        _sample(prompt, tokens[key], entries[key], each.logprobs or 0)
        for prompt, key, each in zip(prompts, keys, params, strict=True)
    ]


def _sample(
    prompt: Sequence[int], answer: list[int], entries: Sequence[TokenLogprobs], top: int
) -> Sample:
    ids = np.zeros((len(answer), top), np.int64)
    logprobs = np.full((len(answer), top), -np.inf, np.float32)
    for row, entry in enumerate(entries):
        for column, (token, logprob) in enumerate(entry.top):
            ids[row, column], logprobs[row, column] = token, logprob
    return Sample(list(prompt), answer, ids, logprobs)
