"""Training one small model on the target's answers: AdamW over a stock Transformers module.

The loss at a token is the cross-entropy of the target's own token; or, where the samples hold the
target's most probable tokens, that of the target's law over these and "any other". Models train in
eval mode, without dropout, so the order of the samples is the only chance there is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from redwood._defaults import Tuning as defaults
from redwood.errors import ArgumentError, NumericalError, check_count
from redwood.tuning.checkpoint import (
    State,
    TrainingHistory,
    put_back,
    restore_state,
    save_state,
    snapshot,
)
from redwood.tuning.corpus import Sample
from redwood.tuning.packing import Row, Weights, agreement, context_of, pack, row_logits

_LEAST = 1e-9  # of the mass that is left for other tokens


@dataclass(frozen=True)
class Settings:
    """How a model is trained.

    Args:
        epochs: passes over the samples, at most.
        learning_rate: the highest one; it rises over the first `warm_up` of all steps, then falls
            to 0 as a cosine.
        batch_tokens: tokens of a packed row, prompts included; one row is one step.
        warm_up: share of all steps, in [0, 1).
        weight_decay: of AdamW.
        clip: the gradient's norm is cut to this.
        patience: epochs without a better acceptance on the validation samples before it ends.
        distill: learn the law over the tokens that the samples hold, not the answer's token alone.
        seed: of the order of the samples.

    Raises:
        ArgumentError: a value out of range; the message names it.
    """

    epochs: int = defaults.epochs
    learning_rate: float = defaults.learning_rate
    batch_tokens: int = defaults.batch_tokens
    warm_up: float = 0.1
    weight_decay: float = 0.01
    clip: float = 1.0
    patience: int = defaults.patience
    distill: bool = False
    seed: int = defaults.seed

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_tokens", "patience"):
            check_count(name, getattr(self, name))
        check_count("seed", self.seed, least=0)
        for name in ("learning_rate", "clip"):
            value = getattr(self, name)
            if not 0.0 < value < math.inf:
                raise ArgumentError(f"{name} {value} must be above 0 and finite")
        for name, most in (("warm_up", 1.0), ("weight_decay", math.inf)):
            value = getattr(self, name)
            if not 0.0 <= value < most:
                raise ArgumentError(f"{name} {value} must be in [0, {most})")


def tune(
    model: Any,
    samples: Sequence[Sample],
    weights: Weights,
    validation: Sequence[Sample],
    validation_weights: Weights,
    settings: Settings,
    *,
    checkpoint: Path | None = None,
    key: str = "",
    on_progress: Callable[[str, int, int], None] | None = None,
) -> TrainingHistory:
    """Trains a model in place; in the end it has the weights that were best in validation.

    Args:
        model: a stock causal Transformers model, float32, on any device.
        samples, weights: to learn from, and how much each token of each answer counts; 0: it is
            only read.
        validation, validation_weights: to choose the epoch by, and to stop early.
        checkpoint: file for the state after each epoch; what it holds is gone on with.
        key: names everything the result depends on; a checkpoint of another key is refused.
        on_progress: called at every step.

    Returns:
        scores and losses, those of an earlier, interrupted call included.

    Raises:
        ArgumentError: no token to learn from, distillation without probabilities, a checkpoint that
            is damaged or of another run.
        NumericalError: a loss or gradient that is NaN or infinite.
        OSError: a checkpoint that cannot be written.

    Guarantee: the same weights for the same arguments on the same device with as many threads.
    """
    _check(model, samples, weights, settings)
    tell = on_progress or (lambda what, done, of: None)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    state = restore_state(checkpoint, key, model, optimizer) if checkpoint is not None else None
    if state is None:
        first = _score(model, validation, validation_weights)
        state = State(TrainingHistory([first]), snapshot(model))
    history = state.history
    for epoch in range(len(history.losses), settings.epochs):
        if epoch - history.best >= settings.patience:
            break
        history.losses.append(_epoch(model, optimizer, samples, weights, epoch, settings, tell))
        history.scores.append(_score(model, validation, validation_weights))
        if history.scores[-1] > history.scores[history.best]:
            history.best, state.best = epoch + 1, snapshot(model)
        if checkpoint is not None:
            save_state(checkpoint, key, model, optimizer, state)
    put_back(model, state.best)
    return history


def learning_rate(settings: Settings, progress: float) -> float:
    """Returns the rate after a share of all steps: a straight rise, then half a cosine."""
    if progress < settings.warm_up:
        return settings.learning_rate * progress / settings.warm_up
    rest = (progress - settings.warm_up) / (1.0 - settings.warm_up)
    return settings.learning_rate * 0.5 * (1.0 + math.cos(math.pi * rest))


def row_loss(
    logits: Tensor, row: Row, samples: Sequence[Sample], weights: Weights, distill: bool
) -> tuple[Tensor, float]:
    """Returns the sum of weighted losses over a row, and the sum of the weights.

    Args:
        logits: [P, V] at the row's places. Tokens past V cannot be learned: they weigh nothing.
    """
    size, device = logits.shape[-1], logits.device
    token = [samples[place.sample].answer[place.position] for place in row.places]
    weight = [float(weights[place.sample][place.position]) for place in row.places]
    wanted = torch.tensor(token, device=device)
    counts = torch.tensor(weight, device=device) * (wanted < size)
    law = logits.log_softmax(-1)
    if distill:
        ids = np.stack([samples[at.sample].top_ids[at.position] for at in row.places])
        logprobs = np.stack([samples[at.sample].top_logprobs[at.position] for at in row.places])
        losses = _against_law(law, torch.from_numpy(ids), torch.from_numpy(logprobs))
    else:
        losses = -law.gather(1, wanted.clamp_max(size - 1)[:, None])[:, 0]
    return (losses * counts).sum(), float(counts.sum())


def _against_law(law: Tensor, ids: Tensor, logprobs: Tensor) -> Tensor:
    """Cross-entropy with the target's law over some tokens and "any other", [P]."""
    ids, probs = ids.to(law.device), logprobs.to(law.device).exp()
    known = (ids < law.shape[-1]) & (probs > 0.0)
    probs = probs * known
    ours = law.gather(1, ids.clamp_max(law.shape[-1] - 1))
    inside = (probs * torch.where(known, ours, 0.0)).sum(1)
    rest = (1.0 - probs.sum(1)).clamp_min(0.0)
    our_rest = (1.0 - (ours.exp() * known).sum(1)).clamp_min(_LEAST).log()
    return -(inside + rest * our_rest)


def _epoch(
    model: Any,
    optimizer: torch.optim.Optimizer,
    samples: Sequence[Sample],
    weights: Weights,
    epoch: int,
    settings: Settings,
    tell: Callable[[str, int, int], None],
) -> float:
    order = np.random.default_rng([settings.seed, epoch]).permutation(len(samples)).tolist()
    rows = list(pack(samples, order, settings.batch_tokens, context_of(model), weights))
    total, mass, what = 0.0, 0.0, f"Epoch {epoch + 1} of {settings.epochs}"
    for step, row in enumerate(rows):
        progress = (epoch + (step + 0.5) / len(rows)) / settings.epochs
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, progress)
        loss, count = row_loss(row_logits(model, row), row, samples, weights, settings.distill)
        optimizer.zero_grad(set_to_none=True)
        if count > 0.0:
            (loss / count).backward()  # type: ignore[no-untyped-call]
            norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip))
            value = float(loss.detach())
            if not math.isfinite(value) or not math.isfinite(norm):
                raise NumericalError(
                    f"epoch {epoch + 1}, step {step + 1}: the loss is {value / count:g}, its "
                    f"gradient {norm:g}: lower the learning rate of {settings.learning_rate:g}"
                )
            optimizer.step()
            total, mass = total + value, mass + count
        tell(what, step + 1, len(rows))
    return total / mass if mass else 0.0


def _score(model: Any, samples: Sequence[Sample], weights: Weights) -> float:
    marks = agreement(model, samples)
    mass = sum(float(weight.sum()) for weight in weights)
    hits = sum(float(w[m].sum()) for m, w in zip(marks, weights, strict=True))
    return hits / mass if mass else 0.0


def _check(model: Any, samples: Sequence[Sample], weights: Weights, settings: Settings) -> None:
    rows = pack(samples, range(len(samples)), settings.batch_tokens, context_of(model), weights)
    if next(rows, None) is None:
        raise ArgumentError("there is no token to learn from: more or longer answers are needed")
    if settings.distill and any(sample.top_ids.shape[1] == 0 for sample in samples):
        raise ArgumentError("distillation needs the target's probabilities: collect them with top")
