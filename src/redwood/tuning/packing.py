"""Samples through a stock model: several in one packed row, and what it says of each position.

In a packed row every token sees its own sample only, at positions counted from that sample's
beginning, so the logits are those of the samples alone. Logits are asked for where they are needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from redwood.models._transformers import plain_logits
from redwood.tuning.corpus import Sample

Marks = list[NDArray[np.bool_]]
"""Per sample, a value for every token of the answer."""
Weights = list[NDArray[np.float32]]
"""The same: how much each token of an answer counts."""


class Place(NamedTuple):
    """An answer's token that is scored: `position` of the answer of `samples[sample]`."""

    sample: int
    position: int


class Row(NamedTuple):
    """Samples packed into one row of L tokens, with the P places that are scored.

    Args:
        tokens, positions, owners: [L]; the token, its place in its sample, the sample's number.
        scored: [P] indices into the row: their logits are for the token behind each.
        places: [P].
    """

    tokens: list[int]
    positions: list[int]
    owners: list[int]
    scored: list[int]
    places: list[Place]


def pack(
    samples: Sequence[Sample],
    order: Sequence[int],
    most_tokens: int,
    context: int,
    weights: Weights | None = None,
) -> Iterator[Row]:
    """Yields rows of at most `most_tokens`; a longer sample gets one of its own.

    Args:
        order: samples to use, one after another.
        context: tokens of a sample that the model can hold; what is past it is left out.
        weights: places with a weight of 0 are not scored; None: all are.
    """
    row = Row([], [], [], [], [])
    for number in order:
        sample = samples[number]
        first = len(sample.prompt) - 1  # its logits are for the first token of the answer
        text = [*sample.prompt, *sample.answer[:-1]][:context]
        wanted = [
            position
            for position in range(len(text) - first)
            if weights is None or weights[number][position] > 0.0
        ]
        if not wanted:
            continue
        text = text[: first + wanted[-1] + 1]
        if row.tokens and len(row.tokens) + len(text) > most_tokens:
            yield row
            row = Row([], [], [], [], [])
        start = len(row.tokens)
        row.tokens.extend(text)
        row.positions.extend(range(len(text)))
        row.owners.extend([number] * len(text))
        row.scored.extend(start + first + position for position in wanted)
        row.places.extend(Place(number, position) for position in wanted)
    if row.tokens:
        yield row


def row_logits(model: Any, row: Row) -> Tensor:
    """Returns float32 logits [P, V] at the scored places."""
    device = model.device
    owners = torch.tensor(row.owners, device=device)
    length = len(row.tokens)
    seen = (owners[:, None] == owners[None]).tril()
    mask = torch.zeros((length, length), dtype=model.dtype, device=device)
    mask.masked_fill_(~seen, torch.finfo(model.dtype).min)
    known = model.get_input_embeddings().num_embeddings
    tokens = torch.tensor([token if token < known else 0 for token in row.tokens], device=device)
    logits = plain_logits(
        model,
        tokens[None],
        position_ids=torch.tensor(row.positions, device=device)[None],
        attention_mask=mask[None, None],
        logits_to_keep=torch.tensor(row.scored, device=device),
    )
    return logits[0].float()


def agreement(model: Any, samples: Sequence[Sample], most_tokens: int = 2048) -> Marks:
    """Returns where the model's best token is the one that the answer has.

    The text before each token is the target's own (teacher forcing). Past the model's context it
    agrees nowhere.
    """
    marks = [np.zeros(len(sample.answer), np.bool_) for sample in samples]
    with torch.no_grad():
        for row in pack(samples, range(len(samples)), most_tokens, context_of(model)):
            best = row_logits(model, row).argmax(-1).tolist()
            for place, token in zip(row.places, best, strict=True):
                sample = samples[place.sample]
                marks[place.sample][place.position] = token == sample.answer[place.position]
    return marks


def context_of(model: Any) -> int:
    """Returns how many tokens a model can hold."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 4096)
