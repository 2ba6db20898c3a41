"""The target's probabilities after each node of a scored tree, computed when asked for."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from redwood.errors import NumericalError
from redwood.sampling import kernels
from redwood.sampling.host_rows import HostRows
from redwood.sampling.kernels import AnyRow, Row
from redwood.sampling.logits import NOT_FINITE, History, probs_from_scores, scores_of, weigh
from redwood.sampling.noise import GumbelNoise, coupled_choice, gumbel
from redwood.sampling.params import SamplingParams
from redwood.tree import TokenTree

BestFew: TypeAlias = tuple[NDArray[np.int32], NDArray[np.float32]]


def _best_of_rows(logits: Tensor, arrays: AnyRow | None) -> list[int]:
    """Returns the arg-max of every row [N, V]; arrays: the same on the CPU, None elsewhere.

    Raises: NumericalError where any entry is NaN or infinite.
    """
    if arrays is None:
        best, _ = _best_few_on_device(logits, 0)
    else:
        held = [kernels.row_range(row) for row in arrays]
        best = [row.best for row in held] if all(row.finite for row in held) else None
    if best is None:
        raise NumericalError(NOT_FINITE)
    return best


def _best_few_on_device(logits: Tensor, count: int) -> tuple[list[int] | None, BestFew]:
    """The arg-max of every row, None where any value is not finite; and `PathRows.best_few`."""
    low, high = torch.aminmax(logits)
    fine = (torch.isfinite(low) & torch.isfinite(high)).double().reshape(1)
    rows = logits if logits.dtype == torch.float64 else logits.float()
    values, ids = rows.topk(count, -1)
    probs = torch.exp(values - rows.logsumexp(-1, keepdim=True)) if count else values
    # For all rows and the check: the device is waited for once.
    parts = (fine, logits.argmax(-1).double(), ids.double().flatten(), probs.double().flatten())
    all_fine, *numbers = torch.cat(parts).tolist()
    n = len(logits)
    best = [int(token) for token in numbers[:n]]
    few = np.array(numbers[n:]).reshape(2, n, count)
    return best if all_fine else None, (few[0].astype(np.int32), few[1].astype(np.float32))


class PathRows:
    """The target's rows for one tree, computed when asked for: rows are expensive at V = 152k.

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
        self._logits = logits

    def best_few(self, count: int) -> BestFew | None:
        """Returns the best tokens after every node in the model's own rows, before any penalty.

        Args:
            count: tokens of a row, V at most.

        Returns: ids and probabilities [N, count], best first; None where a row is not finite.
        """
        count, arrays = min(count, self._logits.shape[-1]), self._rows.all
        if arrays is None:
            best, few = _best_few_on_device(self._logits, count)
            self._best = best
            return None if best is None else few
        found = kernels.best_few(arrays, count)
        if found is not None:
            self._best = found[0][:, 0].tolist()
        return found

    def scores(self, node: int) -> Tensor:
        """Returns float64 [V]: the logits after `node` with everything but temperature applied."""
        path: list[int] = []
        if self._params.needs_history:
            path = [self._tree.token_list[i] for i in self._tree.path(node)[1:]]
        return scores_of(self._rows[node], self._params, self._history, path)

    def weights(self, node: int) -> tuple[Row, float]:
        """Returns the probabilities after `node` times their mass, float64 [V], and that mass.

        Guarantee: no weight is negative or NaN, the mass is positive; the array is the caller's.
        """
        if self._params.temperature == 0.0:
            return probs_from_scores(self.scores(node), self._params).numpy(), 1.0
        row = self._rows[node] if self._plain else self.scores(node).numpy()
        held = kernels.row_range(row)
        if self._plain and not held.finite:
            raise NumericalError(NOT_FINITE)
        return weigh(row, held, self._params)

    def __getitem__(self, node: int) -> Row:
        """Returns the probabilities after `node`, float64 [V]."""
        weights, mass = self.weights(node)
        return weights / mass

    def best(self, node: int) -> int:
        """Returns the arg-max after `node`; the lowest id among equals."""
        if self._bare and self._params.temperature == 0.0:
            if self._best is None:
                self._best = _best_of_rows(self._logits, self._rows.all)
            return self._best[node]
        row = self._rows[node] if self._bare else self.scores(node).numpy()
        return int(row.argmax())

    def choice(self, node: int, noise: GumbelNoise, position: int) -> int:
        """Returns the arg-max of log p + noise(position) after `node`, as `coupled_choice` would.

        The noise is made for the few tokens that may win.
        """
        weights, mass = self.weights(node)
        ids, uniforms = kernels.gumbel_candidates(weights, noise.key, position)
        return int(ids[coupled_choice(weights[ids] / mass, gumbel(uniforms))])
