"""From logits to probabilities, per tree path. No model inside.

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
from torch import Tensor

from redwood._defaults import Sampling as defaults
from redwood.errors import ArgumentError, NumericalError
from redwood.sampling import kernels
from redwood.sampling.host_rows import HostRows
from redwood.sampling.host_rows import array_of as _array
from redwood.sampling.kernels import AnyRow, Row
from redwood.sampling.noise import GumbelNoise as GumbelNoise
from redwood.sampling.noise import coupled_choice, gumbel
from redwood.sampling.noise import draw as draw
from redwood.tree import TokenTree

_HUGE = 1e300
_NOT_FINITE = "the model returned NaN or infinite logits: try --dtype float32, or check its weights"
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
        prediction: token ids that the answer is expected to be; drafted as long as they fit.

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
        predicted = () if self.prediction is None else self.prediction
        _require(
            isinstance(predicted, Sequence) and all(_is_int(t) and t >= 0 for t in predicted),
            self,
            "prediction",
            "token ids",
        )
        object.__setattr__(self, "prediction", tuple(predicted))

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
        self._prompt = np.array(sorted(set(prompt)), np.int64)
        self._output: Counter[int] = Counter()

    def extend(self, tokens: Sequence[int]) -> None:
        """Appends generated tokens."""
        self.token_ids.extend(tokens)
        self._output.update(tokens)

    def penalise(self, row: Row, path: Sequence[int], params: SamplingParams) -> None:
        """Applies all penalties of a path below the committed text.

        Args:
            row: logits [V] float64, changed in place.
            path: drafted tokens between the committed text and the node.
        """
        counts = Counter(self._output)
        counts.update(path)
        ids = np.fromiter(counts.keys(), np.int64, len(counts))
        if params.repetition_penalty != 1.0:
            seen = np.concatenate([self._prompt, ids])  # twice seen, twice written: no harm
            values, factor = row[seen], params.repetition_penalty
            with np.errstate(over="ignore"):  # a factor near 0: large, but a number
                penalised = np.where(values > 0, values / factor, values * factor)
            row[seen] = np.clip(penalised, -_HUGE, _HUGE)
        if counts and (params.presence_penalty or params.frequency_penalty):
            times = np.fromiter(counts.values(), np.float64, len(counts))
            row[ids] -= params.presence_penalty + params.frequency_penalty * times


def scores(
    logits: Tensor, params: SamplingParams, history: History, path: Sequence[int] = ()
) -> Tensor:
    """Returns logits [V] as float64 on the CPU, penalties and bias applied, no temperature yet.

    Raises:
        NumericalError: NaN or infinite logits.
        ArgumentError: a logit_bias token outside the vocabulary, a logits_processor that returns
            something else than scores.
    """
    return _scores(_array(logits), params, history, path)


def _scores(row: AnyRow, params: SamplingParams, history: History, path: Sequence[int]) -> Tensor:
    if not kernels.row_range(row).finite:
        raise NumericalError(_NOT_FINITE)
    row = row.astype(np.float64)
    if params.needs_history:
        history.penalise(row, path, params)
    for token, bias in params.logit_bias.items():
        if token >= len(row):
            raise ArgumentError(f"logit_bias token {token} is outside the vocabulary of {len(row)}")
        row[token] += bias
    if params.logits_processor is not None:
        ids = torch.tensor([[*history.token_ids, *path]], dtype=torch.int64)
        given: object = params.logits_processor(ids, torch.from_numpy(row.astype(np.float32))[None])
        # A processor made for the target may widen the row of a drafter with fewer tokens.
        if not isinstance(given, Tensor) or given.ndim != 2 or given.shape[1] < len(row):
            raise ArgumentError(f"logits_processor must return scores of shape [1, {len(row)}]")
        row = _array(given[0, : len(row)]).astype(np.float64)
        if not float(row.max()) > -math.inf:
            raise NumericalError("logits_processor left no token to choose from")
    return torch.from_numpy(row)


def check_finite(logits: Tensor) -> None:
    """Raises NumericalError where logits [V] or [N, V] are NaN or infinite."""
    if logits.device.type == "cpu":
        rows = _array(logits.reshape(-1, logits.shape[-1]))
        fine = all(kernels.row_range(row).finite for row in rows)
    else:
        low, high = torch.aminmax(logits)
        fine = bool(torch.isfinite(low) & torch.isfinite(high))
    if not fine:
        raise NumericalError(_NOT_FINITE)


def probs_from_scores(row: Tensor, params: SamplingParams) -> Tensor:
    """Returns probabilities float64 [V]: temperature, top-k, top-p, min-p; one-hot at 0.

    Args:
        row: [V] float64 from `scores`. Ties at a border are kept, so the result does not depend on
            the order of a sort.

    Raises:
        NumericalError: NaN, +inf, or nothing above -inf.
    """
    if params.temperature == 0.0:
        return torch.nn.functional.one_hot(row.argmax(), len(row)).double()
    scored = _array(row)
    weights, mass = _weigh(scored, kernels.row_range(scored), params)
    return torch.from_numpy(weights / mass)


def _weigh(row: AnyRow, held: kernels.Range, params: SamplingParams) -> tuple[Row, float]:
    """Probabilities of a row, times the mass that is returned beside them."""
    if not math.isfinite(held.high):
        raise NumericalError(_NOT_FINITE)
    # NOTE: the maximum is taken off first: a temperature near 0 must not overflow.
    weights, mass = kernels.weigh(row, held.high, params.temperature)
    if params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0:
        mass = kernels.truncate(weights, mass, params.top_k, params.top_p, params.min_p)
    return weights, mass


def draft_law(
    row_scores: Tensor, params: SamplingParams, width: int, *, rest: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Returns (probs [W, M] float64, ids [W, M]), most probable first, M = min(width, V).

    The law a drafter draws from: the M best tokens, with the request's temperature and truncation.
    Exact whatever M is, since the law stored is the law drawn from.

    Args:
        row_scores: [W, V] from `scores` or plain logits, any float type, any device.
        rest: weight of the law without truncation beside the other. A small one puts the tokens
            that truncation leaves out behind all others, instead of nowhere.
    """
    values, ids = top(row_scores, min(width, row_scores.shape[-1]))
    values = values.to("cpu", torch.float64)
    whole = probs = torch.softmax((values - values[:, :1]) / params.temperature, -1)
    if 0 < params.top_k < probs.shape[1]:
        probs = torch.where(torch.arange(probs.shape[1]) < params.top_k, probs, 0.0)
        probs = probs / probs.sum(-1, keepdim=True)
    if params.top_p < 1.0:
        probs = torch.where(probs.cumsum(-1) - probs < params.top_p, probs, 0.0)
    if params.min_p > 0.0:
        probs = torch.where(probs >= params.min_p * probs[:, :1], probs, 0.0)
    probs = probs / probs.sum(-1, keepdim=True)
    return (probs + rest * whole) / (1.0 + rest), ids


def top(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Returns the `count` largest of each row of [W, V] and their ids, on the CPU, best first."""
    if rows.device.type != "cpu":
        best = rows.topk(count, dim=-1)
        return best.values.cpu(), best.indices.cpu()
    found = [kernels.top(row, count) for row in _array(rows)]
    values, ids = (np.stack(part) for part in zip(*found, strict=True))
    return torch.from_numpy(values), torch.from_numpy(ids)


def _best_of_rows(logits: Tensor, arrays: AnyRow | None) -> list[int]:
    """Returns the arg-max of every row [N, V]; arrays: the same on the CPU, None elsewhere.

    Raises: NumericalError where any entry is NaN or infinite.
    """
    if arrays is None:
        low, high = torch.aminmax(logits)
        fine = torch.isfinite(low) & torch.isfinite(high)
        # For all rows and the check: the device is waited for once.
        all_fine, *best = torch.cat([fine[None].long(), logits.argmax(-1)]).tolist()
        if not all_fine:
            raise NumericalError(_NOT_FINITE)
        return best
    held = [kernels.row_range(row) for row in arrays]
    if not all(row.finite for row in held):
        raise NumericalError(_NOT_FINITE)
    return [row.best for row in held]


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
        self._tree, self._params, self._history = tree, params, history
        self._best: list[int] | None = None
        self._bare = not (params.needs_history or params.logit_bias)
        self._plain = self._bare and params.temperature > 0.0
        self._rows = HostRows(logits, tree)
        if self._bare and params.temperature == 0.0:
            self._best = _best_of_rows(logits, self._rows.all)

    def scores(self, node: int) -> Tensor:
        """Returns float64 [V]: the logits after `node` with everything but temperature applied."""
        path: list[int] = []
        if self._params.needs_history:
            path = [self._tree.token_list[i] for i in self._tree.path(node)[1:]]
        return _scores(self._rows[node], self._params, self._history, path)

    def weights(self, node: int) -> tuple[Row, float]:
        """Returns the probabilities after `node` times their mass, float64 [V], and that mass.

        Guarantee: no weight is negative or NaN, the mass is positive; the array is the caller's.
        """
        if self._params.temperature == 0.0:
            return probs_from_scores(self.scores(node), self._params).numpy(), 1.0
        row = self._rows[node] if self._plain else self.scores(node).numpy()
        held = kernels.row_range(row)
        if self._plain and not held.finite:
            raise NumericalError(_NOT_FINITE)
        return _weigh(row, held, self._params)

    def __getitem__(self, node: int) -> Row:
        """Returns the probabilities after `node`, float64 [V]."""
        weights, mass = self.weights(node)
        return weights / mass

    def best(self, node: int) -> int:
        """Returns the arg-max after `node`; the lowest id among equals."""
        if self._best is not None:
            return self._best[node]
        row = self._rows[node] if self._bare else self.scores(node).numpy()
        return int(row.argmax())

    def choice(self, node: int, noise: GumbelNoise, position: int) -> int:
        """Returns the arg-max of log p + noise(position) after `node`, as `coupled_choice` would.

        The noise is made for the few tokens that may win.
        """
        weights, mass = self.weights(node)
        ids, uniforms = kernels.race(weights, noise.key, position)
        return int(ids[coupled_choice(weights[ids] / mass, gumbel(uniforms))])
