"""Timing wrappers of drafters and backends: a drafter's own time, without its model's forwards."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from time import perf_counter
from typing import Any

from torch import Tensor

from redwood.backends.base import Backend, Nodes
from redwood.drafters.base import Drafter, prefill
from redwood.drafters.context import Context
from redwood.profiling.measure import wait_for
from redwood.tree import TokenTree


class ClockedBackend:
    """A backend that sums the seconds of its forwards; everything else is delegated."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def extend(self, rows: Sequence[Nodes]) -> list[Tensor]:
        """As the backend's."""
        start = perf_counter()
        try:
            logits = self._backend.extend(rows)
            wait_for(self._backend.device)
            return logits
        finally:
            self.seconds += perf_counter() - start


class ClockedDrafter:
    """A drafter that measures its time per proposed node, without the forwards of its model."""

    def __init__(self, drafter: Drafter, forwards: ClockedBackend | None = None) -> None:
        self.name, self.draws = drafter.name, drafter.draws
        self._drafter, self._forwards = drafter, forwards
        self._ms_per_node: list[float] = []

    def propose(self, contexts: Sequence[Context], budgets: Sequence[int]) -> list[TokenTree]:
        """As the drafter's."""
        before = self._model_seconds
        start = perf_counter()
        trees = self._drafter.propose(contexts, budgets)
        took = perf_counter() - start - (self._model_seconds - before)
        nodes = sum(len(tree) - 1 for tree in trees)
        if nodes:
            self._ms_per_node.append(1000.0 * max(took, 0.0) / nodes)
        return trees

    def prefill(self, contexts: Sequence[Context]) -> None:
        """As the drafter's, if it has one."""
        prefill(self._drafter, contexts)

    def release(self, key: int) -> None:
        """As the drafter's."""
        self._drafter.release(key)

    @property
    def ms_per_node(self) -> float:
        """Median over the proposals; 0 before the first one with a node."""
        return median(self._ms_per_node) if self._ms_per_node else 0.0

    @property
    def _model_seconds(self) -> float:
        return 0.0 if self._forwards is None else self._forwards.seconds
