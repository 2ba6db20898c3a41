"""From logits to probabilities, per tree path, and the noise of seeded decoding. No model inside.

Order of the processors (that of Transformers): repetition, presence and frequency penalties, logit
bias, temperature, top-k, top-p, min-p. All of them are computed for the path of a node, so that a
drafted token is judged by the very row that plain decoding would have used.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from redwood.errors import ArgumentError, NumericalError
from redwood.tree import TokenTree

VERIFIERS = ("auto", "traversal", "recursive", "coupled")
_FIRST_LOOK = 512  # top-p sorts this many candidates before it sorts the whole vocabulary


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

    Raises:
        ArgumentError: a value out of range; the message names it.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: Sequence[str] = ()
    ignore_eos: bool = False
    logits_processor: Callable[[Tensor, Tensor], Tensor] | None = None
    verifier: str = "auto"

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


class History:
    """The tokens of one row: all of them in order, and the generated ones counted for penalties."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self.token_ids = list(prompt)
        self._prompt = frozenset(prompt)
        self._output: Counter[int] = Counter()

    def extend(self, tokens: Sequence[int]) -> None:
        """Appends generated tokens."""
        self.token_ids.extend(tokens)
        self._output.update(tokens)

    def penalise(self, logits: Tensor, path: Sequence[int], params: SamplingParams) -> Tensor:
        """Returns logits [V] float64 with all penalties of a path below the committed text.

        Args:
            logits: [V] float64, changed in place.
            path: drafted tokens between the committed text and the node.
        """
        counts = self._output + Counter(path)
        if params.repetition_penalty != 1.0:
            seen = torch.tensor(sorted(self._prompt | counts.keys()), dtype=torch.int64)
            values = logits[seen]
            factor = params.repetition_penalty
            logits[seen] = torch.where(values > 0, values / factor, values * factor)
        if counts and (params.presence_penalty or params.frequency_penalty):
            ids = torch.tensor(list(counts.keys()), dtype=torch.int64)
            times = torch.tensor(list(counts.values()), dtype=torch.float64)
            logits[ids] -= params.presence_penalty + params.frequency_penalty * times
        return logits


def scores(
    logits: Tensor, params: SamplingParams, history: History, path: Sequence[int] = ()
) -> Tensor:
    """Returns logits [V] as float64 on the CPU, penalties and bias applied, no temperature yet.

    Raises:
        NumericalError: NaN or infinite logits.
        ArgumentError: a logit_bias token outside the vocabulary, a logits_processor that returns
            something else than scores.
    """
    row = logits.to("cpu", torch.float64, copy=True)
    check_finite(row)
    if params.needs_history:
        row = history.penalise(row, path, params)
    for token, bias in params.logit_bias.items():
        if token >= len(row):
            raise ArgumentError(f"logit_bias token {token} is outside the vocabulary of {len(row)}")
        row[token] += bias
    if params.logits_processor is not None:
        ids = torch.tensor([[*history.token_ids, *path]], dtype=torch.int64)
        given: object = params.logits_processor(ids, row.float()[None])
        # A processor made for the target may widen the row of a drafter with fewer tokens.
        if not isinstance(given, Tensor) or given.ndim != 2 or given.shape[1] < len(row):
            raise ArgumentError(f"logits_processor must return scores of shape [1, {len(row)}]")
        row = given[0, : len(row)].double()
        if not float(row.max()) > -math.inf:
            raise NumericalError("logits_processor left no token to choose from")
    return row


def check_finite(logits: Tensor) -> None:
    """Raises NumericalError where logits are NaN or infinite."""
    low, high = torch.aminmax(logits)
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        raise NumericalError(
            "the model returned NaN or infinite logits: try --dtype float32, or check its weights"
        )


def probs_from_scores(row: Tensor, params: SamplingParams) -> Tensor:
    """Returns probabilities float64 [V]: temperature, top-k, top-p, min-p; one-hot at 0.

    Args:
        row: [V] float64 from `scores`. Ties at a border are kept, so the result does not depend on
            the order of a sort.
    """
    if params.temperature == 0.0:
        return torch.nn.functional.one_hot(row.argmax(), len(row)).double()
    # NOTE: the maximum is taken off first: a temperature near 0 must not overflow.
    probs = torch.softmax((row - row.max()) / params.temperature, -1)
    if 0 < params.top_k < len(probs):
        probs = _keep(probs, probs.topk(params.top_k).values[-1])
    if params.top_p < 1.0:
        probs = _keep(probs, _top_p_border(probs, params.top_p))
    if params.min_p > 0.0:
        probs = _keep(probs, params.min_p * probs.max())
    return probs


def _keep(probs: Tensor, border: Tensor) -> Tensor:
    probs = torch.where(probs >= border, probs, 0.0)
    return probs / probs.sum()


def _top_p_border(probs: Tensor, top_p: float) -> Tensor:
    """The probability of the last token of the smallest set with mass `top_p`."""
    for size in (min(_FIRST_LOOK, len(probs)), len(probs)):
        best = probs.topk(size).values
        reached = torch.nonzero(best.cumsum(0) >= top_p)
        if len(reached):
            return best[reached[0, 0]]
    return best[-1]


def draft_law(row_scores: Tensor, params: SamplingParams, width: int) -> tuple[Tensor, Tensor]:
    """Returns (probs [W, M] float64, ids [W, M]), most probable first, M = min(width, V).

    The law a drafter draws from: the M best tokens, with the request's temperature and truncation.
    Exact whatever M is, since the law stored is the law drawn from.

    Args:
        row_scores: [W, V] from `scores` or plain logits, any float type, any device.
    """
    best = row_scores.topk(min(width, row_scores.shape[-1]), dim=-1)
    values, ids = best.values.to("cpu", torch.float64), best.indices.cpu()
    probs = torch.softmax((values - values[:, :1]) / params.temperature, -1)
    if 0 < params.top_k < probs.shape[1]:
        probs[:, params.top_k :] = 0.0
        probs /= probs.sum(-1, keepdim=True)
    if params.top_p < 1.0:
        probs = torch.where(probs.cumsum(-1) - probs < params.top_p, probs, 0.0)
    if params.min_p > 0.0:
        probs = torch.where(probs >= params.min_p * probs[:, :1], probs, 0.0)
    return probs / probs.sum(-1, keepdim=True), ids


class PathRows:
    """The target's rows for one tree, computed when asked for: rows are dear at V = 152k.

    Args:
        logits: [N, V], row i after node i.
        tree: the tree that was scored.
        params, history: of the request, before this tree.
    """

    def __init__(
        self, logits: Tensor, tree: TokenTree, params: SamplingParams, history: History
    ) -> None:
        self._logits, self._tree, self._params, self._history = logits, tree, params, history
        self._best: list[int] | None = None
        if params.temperature == 0.0 and not params.needs_history and not params.logit_bias:
            check_finite(logits)
            self._best = logits.argmax(-1).tolist()

    def scores(self, node: int) -> Tensor:
        """Returns float64 [V]: the logits after `node` with everything but temperature applied."""
        path: list[int] = []
        if self._params.needs_history:
            path = [self._tree.token_list[i] for i in self._tree.path(node)[1:]]
        return scores(self._logits[node], self._params, self._history, path)

    def __getitem__(self, node: int) -> NDArray[np.float64]:
        """Returns the probabilities after `node`, float64 [V]."""
        return probs_from_scores(self.scores(node), self._params).numpy()

    def best(self, node: int) -> int:
        """Returns the arg-max after `node`; the lowest id among equals."""
        if self._best is not None:
            return self._best[node]
        return int(self.scores(node).argmax())


class GumbelNoise:
    """Gumbel noise keyed by (seed, absolute position): a counter-based generator (Philox).

    Calling it with a position gives a float64 row [V] that depends on nothing else, so drafter and
    target see the same noise, and so does plain decoding. Source: shared-noise coupling of
    Daliri et al. (arXiv 2408.07978) and GLS (2506.05632). The latest rows are kept.
    """

    def __init__(self, seed: int, vocab_size: int, kept_rows: int = 16) -> None:
        self._key, self._size, self._kept = seed % 2**64, vocab_size, kept_rows
        self._rows: dict[int, NDArray[np.float64]] = {}

    def __call__(self, position: int) -> NDArray[np.float64]:
        row = self._rows.get(position)
        if row is None:
            raw = np.random.Philox(key=self._key, counter=[0, 0, 0, position]).random_raw(
                self._size
            )
            # Midpoints of 2^52 cells: never 0 or 1 (those of 2^53 would round to 1), so both
            # logarithms are finite.
            uniforms = torch.from_numpy(((raw >> np.uint64(12)) + 0.5) * 2.0**-52)
            row = uniforms.log_().neg_().log_().neg_().numpy()
            while len(self._rows) >= self._kept:
                del self._rows[next(iter(self._rows))]
            self._rows[position] = row
        return row


def draw(probs: NDArray[np.float64], uniform: float) -> int:
    """Returns the token at `uniform` in [0, 1) of cumulative `probs` [V], which need not sum to 1.

    Never a token of zero probability. Monotone: each token owns one interval of uniforms, in order.
    """
    cumulative = np.cumsum(probs)
    token = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    if token >= len(probs) or probs[token] <= 0.0:  # rounding at the upper end
        token = int(np.flatnonzero(probs > 0.0)[-1])
    return token
