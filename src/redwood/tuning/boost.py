"""Boosting: every further model learns what those before it get wrong.

Source: arXiv 2305.09781, section 3, collective boost-tuning. There a sample, that is a prompt with
the target's whole continuation, is dropped once a model continues it alike. Here a sample is a
token of an answer, read with the target's own text before it: long answers are hardly ever alike as
a whole, and a token tree gains by every single token that one of its sources knows. And what is
marked may keep a small weight instead of none: a model that never sees what is easy drafts badly
below its first token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from redwood.errors import ArgumentError
from redwood.tuning.checkpoint import TrainingHistory
from redwood.tuning.corpus import Sample
from redwood.tuning.packing import Marks, Weights, agreement


class Round(NamedTuple):
    """What one model was given, and what became of it.

    Args:
        left, of: tokens to learn from that no earlier model knew, of how many.
        history: of its training; see there.
    """

    left: int
    of: int
    history: TrainingHistory


Train = Callable[[int, Weights, Weights], tuple[Any, TrainingHistory]]
"""Trains model i with weights for samples and validation; returns it with its history."""


def boost(
    count: int,
    samples: Sequence[Sample],
    validation: Sequence[Sample],
    train: Train,
    *,
    marked_weight: float = 0.0,
) -> list[Round]:
    """Trains `count` models one after another; ends early where nothing is left to learn.

    Args:
        count: models, at least one.
        samples, validation: to learn from, and to choose epochs by.
        train: see `Train`; the model that it returns is asked for its marks and then forgotten.
        marked_weight: of tokens that an earlier model knows, in [0, 1); 0 is the published rule.

    Raises:
        ArgumentError: a weight out of range.
    """
    if not 0.0 <= marked_weight < 1.0:
        raise ArgumentError(f"marked_weight {marked_weight} must be in [0, 1)")
    rounds: list[Round] = []
    known, known_validation = _none(samples), _none(validation)
    for number in range(count):
        left = sum(int((~marks).sum()) for marks in known)
        if left == 0:
            break
        weights = _weights(known, marked_weight)
        model, history = train(number, weights, _weights(known_validation, marked_weight))
        rounds.append(Round(left, sum(map(len, known)), history))
        if number + 1 < count:
            known = _join(known, agreement(model, samples))
            known_validation = _join(known_validation, agreement(model, validation))
        del model
    return rounds


def _none(samples: Sequence[Sample]) -> Marks:
    return [np.zeros(len(sample.answer), np.bool_) for sample in samples]


def _join(marks: Marks, more: Marks) -> Marks:
    return [a | b for a, b in zip(marks, more, strict=True)]


def _weights(marks: Marks, marked_weight: float) -> Weights:
    return [np.where(known, marked_weight, 1.0).astype(np.float32) for known in marks]
