"""Transformers' logits processors on the paths of a token tree: which may be, and how.

Plain `generate` calls a processor once per token with the whole batch. A tree calls it per path,
several times per token, one row at a time and in no fixed order; so it must be a pure function of
(input_ids, scores), and what it holds per row of the batch is cut to the row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from redwood.errors import UnsupportedError
from redwood.models._pure_processors import pure_processor
from redwood.models._transformers import processor_of_row


def check_processors(processors: Sequence[Any], *, trusted: bool) -> None:
    """Refuses processors that are not known to be pure, unless `trusted`.

    Raises:
        UnsupportedError: names the processor; also one that wants more than (input_ids, scores),
            trusted or not.
    """
    for processor in processors:
        name = getattr(processor, "__qualname__", type(processor).__qualname__)
        if pure_processor(processor) is None and not trusted:
            raise UnsupportedError(
                f"logits processor {name} is not known to depend on (input_ids, scores) alone, as "
                "a token tree needs: remove it, or pass trust_processors=True if it does"
            )
        if len(signature(processor).parameters) != 2:
            raise UnsupportedError(f"logits processor {name} wants more than (input_ids, scores)")


def path_processor(
    processors: Sequence[Any], input_ids: Tensor, row: int, padding: int, vocab_size: int
) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Returns what `SamplingParams.logits_processor` takes for one row; None for no processors.

    Args:
        processors: of the batch, checked.
        input_ids: int64 [batch, length], padded on the left; processors see the padding, since some
            count positions.
        row, padding: which row, and its number of padding tokens.
        vocab_size: of the target. A draft model's scores may be narrower; they are widened with
            -inf, since processors hold token ids and remember the width.
    """
    if not processors:
        return None
    own = [processor_of_row(processor, row, len(input_ids)) for processor in processors]
    before = input_ids[row : row + 1, :padding]

    def apply(token_ids: Tensor, scores: Tensor) -> Tensor:
        text = torch.cat([before, token_ids.to(before.device)], dim=-1)
        narrow = vocab_size - scores.shape[-1]
        scores = torch.nn.functional.pad(scores.to(before.device), (0, narrow), value=-torch.inf)
        for processor in own:
            scores = processor(text, scores)
        return scores.cpu()

    return apply
