"""From logits to probabilities, per tree path. No model inside.

Order of the processors (that of Transformers): repetition, presence and frequency penalties, logit
bias, temperature, top-k, top-p, min-p. All of them are computed for the path of a node, so that a
drafted token is judged by the very row that plain decoding would have used.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from redwood.errors import ArgumentError, NumericalError
from redwood.sampling import kernels
from redwood.sampling.host_rows import array_of
from redwood.sampling.kernels import AnyRow, Row
from redwood.sampling.params import SamplingParams

NOT_FINITE = "the model returned NaN or infinite logits: try --dtype float32, or check its weights"
_HUGE = 1e300


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
    return scores_of(array_of(logits), params, history, path)


def scores_of(row: AnyRow, params: SamplingParams, history: History, path: Sequence[int]) -> Tensor:
    """As `scores`, of a row [V] on the host."""
    if not kernels.row_range(row).finite:
        raise NumericalError(NOT_FINITE)
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
        row = array_of(given[0, : len(row)]).astype(np.float64)
        if not float(row.max()) > -math.inf:
            raise NumericalError("logits_processor left no token to choose from")
    return torch.from_numpy(row)


def check_finite(logits: Tensor) -> None:
    """Raises NumericalError where logits [V] or [N, V] are NaN or infinite."""
    if logits.device.type == "cpu":
        rows = array_of(logits.reshape(-1, logits.shape[-1]))
        fine = all(kernels.row_range(row).finite for row in rows)
    else:
        low, high = torch.aminmax(logits)
        fine = bool(torch.isfinite(low) & torch.isfinite(high))
    if not fine:
        raise NumericalError(NOT_FINITE)


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
    scored = array_of(row)
    weights, mass = weigh(scored, kernels.row_range(scored), params)
    return torch.from_numpy(weights / mass)


def weigh(row: AnyRow, held: kernels.Range, params: SamplingParams) -> tuple[Row, float]:
    """Returns the probabilities of a row, float64 [V], times a mass, and that mass.

    Args:
        row: [V] scores, and their range.

    Raises:
        NumericalError: NaN, +inf, or nothing above -inf.
    """
    if not math.isfinite(held.high):
        raise NumericalError(NOT_FINITE)
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
    found = [kernels.top(row, count) for row in array_of(rows)]
    values, ids = (np.stack(part) for part in zip(*found, strict=True))
    return torch.from_numpy(values), torch.from_numpy(ids)
