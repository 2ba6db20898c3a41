"""Counters and seconds of one request, and the clock of the stages of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter

STAGES = ("prefill", "draft", "target", "verify", "other")


@dataclass
class Stats:
    """Statistics of one request. Names follow vLLM where it has them.

    `num_drafts` counts steps that had something drafted, `target_passes` all decoding steps,
    prefill apart. `mean_acceptance_length` is tokens per target pass, the extra one included. In a
    batch, `seconds` are those of the steps that the request took part in. `num_prediction_tokens`
    is the length of what the caller predicted, the next one how much of it the answer said.
    `num_cached_tokens` of the prompt were taken from earlier requests, not read.
    """

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    target_passes: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_prediction_tokens: int = 0
    num_prediction_tokens_accepted: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens per target pass; 0 before the first."""
        return self.num_generated_tokens / self.target_passes if self.target_passes else 0.0

    @property
    def num_prediction_tokens_rejected(self) -> int:
        """Tokens of the prediction that did not occur in the answer."""
        return self.num_prediction_tokens - self.num_prediction_tokens_accepted

    @property
    def decode_seconds(self) -> float:
        """Seconds of decoding, prefill apart."""
        return sum(s for stage, s in self.seconds.items() if stage != "prefill")

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens per second of decoding, prefill apart."""
        return self.num_generated_tokens / self.decode_seconds if self.decode_seconds else 0.0

    def to_dict(self) -> dict[str, object]:
        """Returns everything as plain values for JSON."""
        return {
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_cached_tokens": self.num_cached_tokens,
            "num_generated_tokens": self.num_generated_tokens,
            "target_passes": self.target_passes,
            "num_drafts": self.num_drafts,
            "num_draft_tokens": self.num_draft_tokens,
            "num_accepted_tokens": self.num_accepted_tokens,
            "num_prediction_tokens": self.num_prediction_tokens,
            "num_prediction_tokens_accepted": self.num_prediction_tokens_accepted,
            "mean_acceptance_length": self.mean_acceptance_length,
            "tokens_per_s": self.tokens_per_s,
            "seconds": dict(self.seconds),
        }


class Clock:
    """Measures the stages of a step for the statistics of several requests.

    Args:
        wait: waits until the device has finished, before a stage ends.
    """

    def __init__(self, stats: Sequence[Stats], wait: Callable[[], None]) -> None:
        self._stats, self._wait, self._last = stats, wait, perf_counter()

    def record_stage(self, stage: str) -> float:
        """Ends a stage; returns its seconds."""
        self._wait()
        now = perf_counter()
        taken, self._last = now - self._last, now
        for stats in self._stats:
            stats.seconds[stage] += taken
        return taken
