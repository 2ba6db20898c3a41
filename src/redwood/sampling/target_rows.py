"""The target's probabilities after each node of a scored tree, computed when asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from redwood.errors import NumericalError
from redwood.sampling import kernels
from redwood.sampling.host_rows import HostRows
from redwood.sampling.kernels import AnyRow, Row
from redwood.sampling.logits import NOT_FINITE, History, probs_from_scores, scores_of, weigh
from redwood.sampling.noise import GumbelNoise, coupled_choice, gumbel
from redwood.sampling.params import SamplingParams
from redwood.tree import TokenTree


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
            raise NumericalError(NOT_FINITE)
        return best
    held = [kernels.row_range(row) for row in arrays]
    if not all(row.finite for row in held):
        raise NumericalError(NOT_FINITE)
    return [row.best for row in held]


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
        if self._bare and params.temperature == 0.0:
            self._best = _best_of_rows(logits, self._rows.all)

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
