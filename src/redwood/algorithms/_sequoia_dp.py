"""The dynamic program behind Sequoia's trees, for acceptance rates of any order.

Inside: tables of the best value for every (number of nodes, number of children), and the way back
from a table to a tree. Not inside: limits, validation and the choice of a size; see sequoia.py.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

import numpy as np
from numpy.typing import NDArray

Row = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Table:
    """Best expected tokens of the subtrees that hang from a node of one depth.

    `row`: [B] rates of the node's children by rank. `exact`: [N + 1, B + 1], entry (n, b) for at
    most n nodes and exactly b children of the top, -inf where impossible. `best`: [N + 1], the
    maximum over b. `below`: table of the children; None means that it is this table again.
    """

    row: Row
    exact: NDArray[np.float64]
    best: NDArray[np.float64]
    below: "Table | None"


def fill(row: Sequence[float], size: int, below: Table | None) -> Table:
    """Tabulate the best subtrees of up to `size` nodes whose top has children with rates `row`.

    Source: arXiv 2402.12374, Alg. 1 (below is None: depth unbounded) and one level of Alg. 4. Both
    count exactly n nodes; here n is an upper bound, so that a subtree may leave nodes unused.
    Guarantee: O(size^2 len(row)) time, O(size len(row)) memory.
    """
    rates = np.asarray(row, dtype=np.float64)
    exact = np.full((size + 1, len(rates) + 1), -np.inf)
    exact[1:, 0] = 1.0
    best = np.ones(size + 1)
    gains = np.multiply.outer(best if below is None else below.best, rates)
    for n in range(2, size + 1) if len(rates) else ():
        # Row m - 1 of the sum gives m nodes to the last child and n - m to what stands before it.
        np.max(exact[n - 1 : 0 : -1, :-1] + gains[1:n], axis=0, out=exact[n, 1:])
        best[n] = exact[n].max()
        if below is None:
            gains[n] = best[n] * rates
    return Table(rates, exact, best, below)


def stack(rows: Iterable[Sequence[float]], size: int) -> Table:
    """Tabulate a tree whose nodes at depth d have child rates rows[d], leaves below the last row.

    Source: arXiv 2402.12374, Alg. 4 with a row per level. A row belongs to an absolute depth, so
    the tables are filled from the deepest level up and serve this number of levels only.
    """
    table = fill((), size, None)
    for row in reversed(list(rows)):
        table = fill(row, size, table)
    return table


def unfold(table: Table, size: int) -> list[int]:
    """Build a best tree of at most `size` nodes from its table, in breadth-first order.

    Returns: parents, parents[0] == -1, parents[i] < i; siblings stand in rank order.
    """
    parents: list[int] = []
    waiting = deque([(-1, table, size)])
    while waiting:
        parent, top, nodes = waiting.popleft()
        node = len(parents)
        parents.append(parent)
        below = top if top.below is None else top.below
        waiting.extend((node, below, share) for share in _shares(top, below, nodes))
    return parents


def _shares(top: Table, below: Table, nodes: int) -> list[int]:
    """Node budgets of the children in rank order; ties go to fewer children and smaller shares."""
    shares = []
    for rank in range(int(np.argmax(top.exact[nodes])) - 1, -1, -1):
        # Same expression as in `fill`, thus the same roundings and the same maximum.
        last_child = below.best[1:nodes] * top.row[rank]
        share = 1 + int(np.argmax(top.exact[nodes - 1 : 0 : -1, rank] + last_child))
        shares.append(share)
        nodes -= share
    return shares[::-1]


def pad(parents: Sequence[int], size: int, max_branch: int | None) -> list[int]:
    """Add last children, each as near to the root as it fits, until there are `size` nodes.

    A bound on the levels is kept, if `size` nodes and `parents` fit it.
    """
    padded = list(parents)
    depths = [0] * len(padded)
    num_children = [0] * size
    for node, parent in enumerate(padded[1:], start=1):
        depths[node] = depths[parent] + 1
        num_children[parent] += 1
    slots = [(depth, node) for node, depth in enumerate(depths)]
    heapify(slots)
    while len(padded) < size:
        depth, node = slots[0]
        if max_branch is not None and num_children[node] >= max_branch:
            heappop(slots)
            continue
        num_children[node] += 1
        heappush(slots, (depth + 1, len(padded)))
        padded.append(node)
    return padded
