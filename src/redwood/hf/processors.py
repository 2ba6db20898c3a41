"""Transformers' logits processors on the paths of a token tree: which may be, and how.

Plain `generate` calls a processor once per token with the whole batch. A tree calls it per path,
several times per token, one row at a time and in no fixed order; so it must be a pure function of
(input_ids, scores), and what it holds per row of the batch is cut to the row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers.generation import PrefixConstrainedLogitsProcessor

from redwood.errors import UnsupportedError

# Read in their source (5.10 and 5.23) to be pure. Left out: those that keep state (SynthID), run a
# model (guidance), are made for audio models, or hide NaN logits.
_PURE = frozenset(
    {
        "EncoderNoRepeatNGramLogitsProcessor",
        "EncoderRepetitionPenaltyLogitsProcessor",
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "ExponentialDecayLengthPenalty",
        "ForcedBOSTokenLogitsProcessor",
        "ForcedEOSTokenLogitsProcessor",
        "LogitNormalization",
        "MinLengthLogitsProcessor",
        "MinNewTokensLengthLogitsProcessor",
        "MinPLogitsWarper",
        "NoBadWordsLogitsProcessor",
        "NoRepeatNGramLogitsProcessor",
        "PrefixConstrainedLogitsProcessor",
        "RepetitionPenaltyLogitsProcessor",
        "SequenceBiasLogitsProcessor",
        "SuppressTokensAtBeginLogitsProcessor",
        "SuppressTokensLogitsProcessor",
        "TemperatureLogitsWarper",
        "TopHLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "TypicalLogitsWarper",
        "WatermarkLogitsProcessor",
    }
)
_HELD_PER_ROW = {
    "EncoderNoRepeatNGramLogitsProcessor": "generated_ngrams",
    "EncoderRepetitionPenaltyLogitsProcessor": "encoder_input_ids",
    "RepetitionPenaltyLogitsProcessor": "prompt_ignore_length",
}


def check_processors(processors: Sequence[Any], *, trusted: bool) -> None:
    """Refuses processors that are not known to be pure, unless `trusted`.

    Raises:
        UnsupportedError: names the processor; also one that wants more than (input_ids, scores),
            trusted or not.
    """
    for processor in processors:
        name = getattr(processor, "__qualname__", type(processor).__qualname__)
        if _known_name(processor) is None and not trusted:
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
    own = [_for_row(processor, row, len(input_ids)) for processor in processors]
    before = input_ids[row : row + 1, :padding]

    def apply(token_ids: Tensor, scores: Tensor) -> Tensor:
        text = torch.cat([before, token_ids.to(before.device)], dim=-1)
        narrow = vocab_size - scores.shape[-1]
        scores = torch.nn.functional.pad(scores.to(before.device), (0, narrow), value=-torch.inf)
        for processor in own:
            scores = processor(text, scores)
        return scores.cpu()

    return apply


def _known_name(processor: Any) -> str | None:
    kind = type(processor)
    known = kind.__module__ == "transformers.generation.logits_process" and kind.__name__ in _PURE
    return kind.__name__ if known else None


def _for_row(processor: Any, row: int, batch: int) -> Any:
    """The processor as it is for one row of the batch alone."""
    name = _known_name(processor)
    if name == "PrefixConstrainedLogitsProcessor":
        allowed = processor._prefix_allowed_tokens_fn
        return PrefixConstrainedLogitsProcessor(lambda _, text: allowed(row, text), 1)
    held = getattr(processor, _HELD_PER_ROW.get(name or "", ""), None)
    if not isinstance(held, Tensor | list):
        return processor
    # Fewer entries than rows: each prompt was repeated for num_return_sequences.
    index = row * len(held) // batch
    made = copy(processor)
    setattr(made, _HELD_PER_ROW[name or ""], held[index : index + 1])
    if isinstance(held, list):
        made.batch_size = 1
    return made
