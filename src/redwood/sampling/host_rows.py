"""The target's rows for one tree, on the host: where the logits are elsewhere, a few at a time.

Every copy from a device waits for it, and costs about as much as a few megabytes do on the way. So
the row that is asked for comes with others that the rules are likely to read next: the nodes below
it, first children first, and, where nodes were drawn, those that follow.
"""

from __future__ import annotations

import torch
from torch import Tensor

from redwood.sampling.kernels import AnyRow
from redwood.tree import TokenTree

_COPY_BYTES = 4 << 20


class HostRows:
    """Rows of logits [N, V] as arrays [V], float32 or float64, with the values that they have.

    Args:
        logits: row i after node i, of any float type, on any device.
        tree: that was scored.
    """

    def __init__(self, logits: Tensor, tree: TokenTree) -> None:
        self._logits, self._tree = logits.detach(), tree
        self.all: AnyRow | None = None
        """Every row [N, V], where the logits are on the host."""
        if on_host(logits):
            self.all = array_of(logits)
        row_bytes = logits.shape[-1] * logits.element_size()
        self._at_once = max(1, _COPY_BYTES // max(1, row_bytes))
        self._copied: dict[int, AnyRow] = {}

    def __getitem__(self, node: int) -> AnyRow:
        """Returns the row after `node` [V]."""
        if self.all is not None:
            row: AnyRow = self.all[node]
            return row
        if node not in self._copied:
            self._copy(self._next_to(node))
        return self._copied[node]

    def _next_to(self, node: int) -> list[int]:
        """This node, and those likely to be read next whose rows are not here."""
        wanted = dict[int, None]()
        rest = [node]
        if any(self._tree.law_list[1:]):  # after a child that was drawn and refused, its siblings
            rest = [*range(len(self._tree) - 1, node, -1), node]
        while rest and len(wanted) < self._at_once:
            at = rest.pop()
            if at in wanted:
                continue
            if at not in self._copied:
                wanted[at] = None
            rest.extend(reversed(self._tree.children[at]))
        return sorted(wanted)

    def _copy(self, nodes: list[int]) -> None:
        every = len(nodes) == len(self._logits)
        rows = self._logits if every else self._logits[_run_or_index(nodes)]
        for node, row in zip(nodes, array_of(to_host(rows)), strict=True):
            self._copied[node] = row


def _run_or_index(nodes: list[int]) -> slice | list[int]:
    """A slice where that will do: a list of numbers goes to the device first."""
    first, last = nodes[0], nodes[-1]
    return slice(first, last + 1) if last - first + 1 == len(nodes) else nodes


def on_host(rows: Tensor) -> bool:
    """Returns whether these can be read without waiting for a device."""
    return rows.device.type == "cpu"


def to_host(rows: Tensor) -> Tensor:
    """Copies rows to the host: one wait."""
    return rows.cpu()


def array_of(rows: Tensor) -> AnyRow:
    """Returns rows on the CPU, as they are or widened to float32."""
    rows = rows.detach()
    if rows.dtype not in (torch.float32, torch.float64):
        rows = rows.float()
    array: AnyRow = rows.cpu().numpy()
    return array
