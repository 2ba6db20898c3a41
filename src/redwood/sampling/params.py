"""How one request is answered: the parameters of sampling, checked."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields

from torch import Tensor

from redwood._defaults import Sampling as defaults
from redwood.errors import ArgumentError

VERIFIERS = ("auto", "traversal", "recursive", "coupled")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is answered. Temperature 0 is arg-max.

    Args:
        max_tokens: most tokens to generate, at least 1.
        temperature: 0 or more.
        top_k: keep the k most probable tokens (and ties); 0 keeps all.
        top_p: keep the smallest set of most probable tokens with this mass, in (0, 1].
        min_p: keep tokens with at least this share of the top one's probability, in [0, 1].
        repetition_penalty: > 0; divides positive and multiplies negative logits of tokens seen in
            prompt or output.
        presence_penalty, frequency_penalty: [-2, 2]; subtracted once, or per occurrence, from the
            logits of tokens in the output.
        logit_bias: token id -> value added to its logit.
        seed: makes the text a function of prompt, parameters and seed.
        stop: strings that end the text; they are not part of it.
        ignore_eos: go on after an end-of-sequence token.
        logits_processor: for callers with their own rule: (token ids int64 [1, L], scores float32
            [1, V]) -> scores [1, V], as in Transformers; called once per path, after the
            penalties and the bias. It may set scores to -inf.
        verifier: "traversal", "recursive", "coupled", or "auto": coupled with a seed, else
            traversal.
        logprobs: None, or how many of the most probable tokens to report at every token beside its
            own log-probability, 0 to 20.
        speculate: False: plain decoding for this request.
        cache_salt: only requests with the same one share keys and values of what they begin with:
            that a text was read before shows in its time.
        prediction: token ids that the answer is expected to be; drafted as long as they fit.
        visible_tokens: special tokens whose text is part of the answer's, which others' is not.

    Raises:
        ArgumentError: a value out of range; the message names it.
    """

    max_tokens: int = defaults.max_tokens
    temperature: float = defaults.temperature
    top_k: int = defaults.top_k
    top_p: float = defaults.top_p
    min_p: float = defaults.min_p
    repetition_penalty: float = defaults.repetition_penalty
    presence_penalty: float = defaults.presence_penalty
    frequency_penalty: float = defaults.frequency_penalty
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: Sequence[str] = ()
    ignore_eos: bool = False
    logits_processor: Callable[[Tensor, Tensor], Tensor] | None = None
    verifier: str = defaults.verifier
    logprobs: int | None = None
    speculate: bool = True
    prediction: Sequence[int] = ()
    cache_salt: str = ""
    visible_tokens: Sequence[int] = ()

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        _require(stop is None or isinstance(stop, Sequence), self, "stop", "a string or a list")
        object.__setattr__(self, "stop", tuple(stop or ()))
        biases = {} if self.logit_bias is None else self.logit_bias
        _require(isinstance(biases, Mapping), self, "logit_bias", "a map from token ids to numbers")
        object.__setattr__(self, "logit_bias", dict(biases))
        _require(isinstance(self.ignore_eos, bool), self, "ignore_eos", "True or False")
        processor = self.logits_processor
        _require(processor is None or callable(processor), self, "logits_processor", "a function")
        _require(_is_int(self.max_tokens) and self.max_tokens >= 1, self, "max_tokens", ">= 1")
        _require(_in(self.temperature, 0.0, math.inf), self, "temperature", "finite and >= 0")
        _require(_is_int(self.top_k) and self.top_k >= 0, self, "top_k", "0 (off) or more")
        _require(_in(self.top_p, 0.0, 1.0) and self.top_p > 0, self, "top_p", "in (0, 1]")
        _require(_in(self.min_p, 0.0, 1.0), self, "min_p", "in [0, 1]")
        _require(
            _in(self.repetition_penalty, 0.0, math.inf) and self.repetition_penalty > 0,
            self,
            "repetition_penalty",
            "finite and > 0",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            _require(_in(getattr(self, name), -2.0, 2.0), self, name, "in [-2, 2]")
        for token, bias in self.logit_bias.items():
            if not _is_int(token) or token < 0 or not _in(bias, -math.inf, math.inf):
                raise ArgumentError(
                    f"logit_bias {{{token!r}: {bias!r}}} must map token ids to numbers"
                )
        if self.seed is not None:
            _require(
                _is_int(self.seed) and abs(self.seed) < 2**64, self, "seed", "a 64-bit integer"
            )
        if any(not isinstance(s, str) or not s for s in self.stop):
            raise ArgumentError(f"stop {list(self.stop)!r} must hold non-empty strings")
        _require(self.verifier in VERIFIERS, self, "verifier", f"one of {', '.join(VERIFIERS)}")
        count = self.logprobs
        _require(count is None or _is_int(count) and 0 <= count <= 20, self, "logprobs", "0 to 20")
        _require(isinstance(self.speculate, bool), self, "speculate", "True or False")
        for name in ("prediction", "visible_tokens"):
            tokens = () if getattr(self, name) is None else getattr(self, name)
            _require(
                isinstance(tokens, Sequence) and all(_is_int(t) and t >= 0 for t in tokens),
                self,
                name,
                "token ids",
            )
            object.__setattr__(self, name, tuple(tokens))
        _require(isinstance(self.cache_salt, str), self, "cache_salt", "a string")

    @property
    def coupled(self) -> bool:
        """Whether the text is that of plain seeded decoding (shared noise)."""
        if self.verifier == "auto":
            return self.seed is not None
        return self.verifier == "coupled"

    @property
    def needs_history(self) -> bool:
        """Whether a row of probabilities depends on more than the logits."""
        return (
            self.logits_processor is not None
            or self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    @classmethod
    def names(cls) -> list[str]:
        """Returns the names of all parameters."""
        return [f.name for f in fields(cls)]


def _require(ok: bool, params: SamplingParams, name: str, rule: str) -> None:
    if not ok:
        raise ArgumentError(f"{name} {getattr(params, name)!r} must be {rule}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _in(value: object, low: float, high: float) -> bool:
    """NaN and infinities are in no range."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return low <= value <= high and abs(value) <= sys.float_info.max
