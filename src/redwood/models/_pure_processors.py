"""Which logits processors of Transformers are pure functions of text and logits."""

from __future__ import annotations

from typing import Any

# Read in their source (5.10, 5.23 and 5.24) to be pure. Left out: those that keep state (SynthID),
# run a model (guidance), are made for audio models, or hide NaN logits.
_PURE_PROCESSORS = frozenset(
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


def pure_processor(processor: Any) -> str | None:
    """Returns the name of a processor of Transformers that is known to be a pure function."""
    from transformers.generation import LogitsProcessor

    kind = type(processor)
    known = kind.__module__ == LogitsProcessor.__module__ and kind.__name__ in _PURE_PROCESSORS
    return kind.__name__ if known else None
