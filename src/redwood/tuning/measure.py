"""How often drafters are right on held-out answers: each by rank, and all of them as one tree.

A union's candidates at a token are the models' own in turns: the first choice of each, then the
second of each, every token once. So its first n rates say what n children of a merged tree catch,
to be set beside the first n of a single model: the same work for the target. All at temperature 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from redwood.backends.base import Backend
from redwood.bench.acceptance import (
    RANKS,
    Text,
    clustered,
    paired,
    position_chances,
)
from redwood.bench.interleave import Candidate, run
from redwood.drafters.base import ModelDrafter, join_drafters
from redwood.engine.engine import RowEngine
from redwood.profiling.profile import MeasuredAcceptance
from redwood.sampling import SamplingParams, top


@dataclass(frozen=True)
class Rates:
    """Acceptance of one model along texts.

    Args:
        acceptance: by rank, as `redwood.bench.calibrate` measures it.
        ids: per text, [P, ranks], the model's best tokens at each position.
        wanted: per text, [P], the target's token.
    """

    acceptance: MeasuredAcceptance
    ids: list[NDArray[np.int64]]
    wanted: list[NDArray[np.int64]]


def measure(target: Backend, draft: Backend, texts: Sequence[Text], *, ranks: int = RANKS) -> Rates:
    """Returns how often a model's best tokens hold the target's arg-max, along texts."""
    chance = np.random.default_rng(0)  # not drawn from at temperature 0
    sums, counts = np.zeros((len(texts), ranks)), np.zeros(len(texts))
    ids, wanted = list[NDArray[np.int64]](), list[NDArray[np.int64]]()
    for number, text in enumerate(texts):
        best, tokens = list[NDArray[np.int64]](), list[int]()
        with closing(paired(target, draft, text)) as pairs:
            for ours, theirs in pairs:
                sums[number] += position_chances(ours, theirs, 0.0, ranks, chance)
                counts[number] += 1
                count = min(ranks, len(theirs))
                row = np.full(ranks, -1, np.int64)
                row[:count] = top(theirs[None], count)[1][0].numpy()
                best.append(row)
                tokens.append(int(ours.argmax()))
        ids.append(np.array(best, np.int64).reshape(-1, ranks))
        wanted.append(np.array(tokens, np.int64))
    return Rates(clustered(sums, counts, "teacher-forced"), ids, wanted)


def union_rates(models: Sequence[Rates], *, ranks: int = RANKS) -> MeasuredAcceptance:
    """Returns the rates of all models' candidates in one tree; see the top of this file.

    Args:
        models: measured on the same texts. A model with a shorter context than another one counts
            where it has been measured.
    """
    texts = len(models[0].ids)
    sums, counts = np.zeros((texts, ranks)), np.zeros(texts)
    for text in range(texts):
        longest = max(models, key=lambda model: len(model.wanted[text]))
        for at, token in enumerate(longest.wanted[text].tolist()):
            own = [model.ids[text][at] for model in models if at < len(model.ids[text])]
            turns = np.stack(own, 1).reshape(-1).tolist()
            order = [each for each in dict.fromkeys(turns) if each >= 0][:ranks]
            counts[text] += 1
            if token in order:
                sums[text, order.index(token)] += 1
    return clustered(sums, counts, "teacher-forced")


@dataclass(frozen=True)
class Decoding:
    """What a tree of one size brought in real decoding.

    Args:
        budget: nodes per step, the root included.
        mean_acceptance_length: tokens per target pass.
        identical: answers that are token for token those of the corpus.
        of: how many answers.
    """

    budget: int
    mean_acceptance_length: float
    identical: int
    of: int


def decode(
    engine: RowEngine,
    drafters: Sequence[ModelDrafter],
    texts: Sequence[Text],
    params: Sequence[SamplingParams],
    budget: int,
) -> Decoding:
    """Decodes prompts anew with drafters in one tree of `budget` nodes, and compares the answers.

    The engine must be idle; it is given back as it was.

    Args:
        params: of each text; with a seed, or at temperature 0, as the texts were made.
    """
    kept = engine.drafter, engine.budget, engine.planner
    candidate = Candidate("tuned", join_drafters(drafters), budget)
    try:
        runs = [run(engine, candidate, t.prompt, p) for t, p in zip(texts, params, strict=True)]
    finally:
        engine.drafter, engine.budget, engine.planner = kept
    tokens = sum(made.stats.num_generated_tokens for made in runs)
    passes = sum(made.stats.target_passes for made in runs)
    same = sum(made.token_ids == text.answer for made, text in zip(runs, texts, strict=True))
    return Decoding(budget, tokens / passes if passes else 0.0, same, len(texts))


def as_values(rates: MeasuredAcceptance, decoding: Decoding | None = None) -> Mapping[str, Any]:
    """Returns what was measured as plain values for JSON."""
    made = {**asdict(rates), "sums": np.cumsum(rates.rates).round(6).tolist()}
    return made if decoding is None else {**made, "decoding": asdict(decoding)}
