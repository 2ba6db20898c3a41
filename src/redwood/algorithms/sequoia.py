"""Sequoia: the best tree to draft, its size on given hardware, and the draw of its tokens.

A node's k-th child is the accepted one with a chance that depends on k only, given that the node
is accepted (arXiv 2402.12374, Def. 3.1 and 3.2). From these acceptance rates follow the value of a
tree (`expected_tokens`), the best tree of a size (`optimal_tree`) and the best size for measured
times (`choose_tree`). `draw_without_replacement` draws the tokens of one node's children.
Verification is not here: it is shared by all schemes.

Words: a tree is a list of parents, node 0 the root (the last token known, part of the size).
`levels` counts the root, so a tree of one node has one level. Rank 0 is the first child drawn.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from heapq import heappop, heappush
from numbers import Real
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from redwood.algorithms import _sequoia_dp as program
from redwood.algorithms._sequoia_draw import draw_without_replacement
from redwood.errors import ArgumentError, check_count

__all__ = [
    "AcceptanceRates",
    "Plan",
    "best_first_tree",
    "choose_tree",
    "draw_without_replacement",
    "dynamic_program_tree",
    "expected_tokens",
    "optimal_tree",
]

AcceptanceRates = Sequence[float] | Sequence[Sequence[float]] | NDArray[np.float64]

_TIE = 1e-12  # relative; two sums over the same tree may differ by their roundings


class Plan(NamedTuple):
    """A tree and what to expect of it; times in the unit of the times it was chosen by."""

    parents: list[int]
    size: int
    levels: int
    expected_tokens: float
    time_per_token: float
    speedup: float


def expected_tokens(parents: Sequence[int], acceptance: AcceptanceRates) -> float:
    """Return the expected number of tokens per target pass, the bonus token included.

    Source: arXiv 2402.12374, Prop. 3.4.
    Args:
        parents: [N], parents[0] == -1 and 0 <= parents[i] < i; siblings in rank order.
        acceptance: [K] rates by rank, or [D, K] with row d for the children of nodes at depth d;
            in [0, 1]. Ranks and levels past the end count as 0.
    Returns: the sum over the nodes of the product of rates on the way from the root; root = 1.
    Raises: ArgumentError, when parents do not form a tree or a rate is not in [0, 1].
    """
    rates = _usable_rates(acceptance, 1, None, None)
    if len(parents) == 0 or parents[0] != -1:
        raise ArgumentError("parents must start with -1, the parent of the root")
    scores, depths, num_children = [1.0], [0], [0] * len(parents)
    for node, parent in enumerate(parents[1:], start=1):
        if not 0 <= parent < node:
            raise ArgumentError(f"parents[{node}] is {parent}: it must be in [0, {node - 1}]")
        row = rates.row(depths[parent])
        rank = num_children[parent]
        num_children[parent] += 1
        scores.append(scores[parent] * row[rank] if rank < len(row) else 0.0)
        depths.append(depths[parent] + 1)
    return math.fsum(scores)


def optimal_tree(
    acceptance: AcceptanceRates,
    size: int,
    *,
    max_levels: int | None = None,
    max_branch: int | None = None,
) -> list[int]:
    """Return a tree of `size` nodes with the most expected tokens per target pass.

    Source: arXiv 2402.12374, section 3.1 and Alg. 1 and 4. We search best-first instead where the
    rates never increase with the rank (within max_branch): same value, much less time.
    Args:
        acceptance: as for expected_tokens.
        size: number of nodes, root included.
        max_levels: bound on the levels, root included; None for no bound.
        max_branch: bound on the children of a node; None for no bound.
    Returns: parents, [size], parents[0] == -1, parents[i] < i; siblings in rank order.
    Raises: ArgumentError, on wrong arguments or when `size` nodes exceed the bounds.
    Guarantee: for rates that never increase with the rank the first n nodes are an optimal tree of
    n nodes; no such order exists in general.
    """
    if _usable_rates(acceptance, size, max_levels, max_branch).is_sorted():
        return best_first_tree(acceptance, size, max_levels=max_levels, max_branch=max_branch)
    return dynamic_program_tree(acceptance, size, max_levels=max_levels, max_branch=max_branch)


def best_first_tree(
    acceptance: AcceptanceRates,
    size: int,
    *,
    max_levels: int | None = None,
    max_branch: int | None = None,
) -> list[int]:
    """Return an optimal tree for rates that never increase with the rank, best nodes first.

    Source: ours; it solves the problem of arXiv 2402.12374, Alg. 1 and 4. No node scores more than
    its parent or the sibling before it, so the `size` best scores form a tree.
    Args, Returns: as for optimal_tree.
    Raises: ArgumentError as optimal_tree, and when rates increase with the rank.
    Guarantee: O(size log size); the first n nodes are an optimal tree of n nodes.
    """
    rates = _usable_rates(acceptance, size, max_levels, max_branch)
    if not rates.is_sorted():
        raise ArgumentError("acceptance rates increase with the rank: use optimal_tree")
    return _best_first(rates, size, max_levels, max_branch)[0]


def dynamic_program_tree(
    acceptance: AcceptanceRates,
    size: int,
    *,
    max_levels: int | None = None,
    max_branch: int | None = None,
) -> list[int]:
    """Return an optimal tree for any acceptance rates, in no particular order of value.

    Source: arXiv 2402.12374, Alg. 1 (no bound on the levels) and Alg. 4 (bound, or rates by
    level). We solve for "at most size nodes" over the ranks that have a rate and add the missing
    nodes where they gain nothing; equal in value to "exactly size", since no rate is negative.
    Args, Returns, Raises: as for optimal_tree.
    Guarantee: O(size^2 K L) for K ranks and L levels, O(size^2 K) without a bound on the levels.
    """
    rates = _usable_rates(acceptance, size, max_levels, max_branch)
    rows = [row[: size - 1] for row in rates.rows[: size - 1] or ((),)]
    if rates.by_level:
        table = program.stack(rows, size)
    elif max_levels is None or max_levels >= size:
        table = program.fill(rows[0], size, None)
    else:
        table = program.stack(rows * (max_levels - 1), size)
    return program.pad(program.unfold(table, size), size, max_branch)


def choose_tree(
    acceptance: AcceptanceRates,
    target_times: Mapping[int, float],
    draft_time: float,
    *,
    max_levels: int | None = None,
    max_branch: int | None = None,
) -> Plan:
    """Choose the size and the levels that take the least time per token on this hardware.

    Source: arXiv 2402.12374, section 4.1 and App. G.5: (t(n) + levels * draft_time) / F(n, levels).
    One pass serves all sizes and levels, except that rates by level need one per number of levels.
    Times keep their unit; the paper divides them by t(1). A lone root is plain decoding: it costs
    no draft pass.
    Args:
        acceptance: as for expected_tokens.
        target_times: time of one target pass by number of nodes, any unit; must have size 1.
        draft_time: time of one draft pass, one per level, same unit.
        max_levels, max_branch: as for optimal_tree; sizes that do not fit are left out.
    Returns: the Plan; ties (relative 1e-12) go to fewer nodes, then to fewer levels.
    Raises: ArgumentError, on wrong rates, bounds or times.
    """
    rates = _usable_rates(acceptance, 1, max_levels, max_branch)
    _check_times(target_times, draft_time)
    sizes = [n for n in sorted(target_times) if _capacity(max_levels, max_branch, n) >= n]
    ceiling = _ceiling(rates, sizes[-1], max_branch)
    candidates = [(1, 1, float(target_times[1]))]
    for levels, values in enumerate(_values_by_levels(rates, sizes[-1], max_branch), start=1):
        unsettled = []  # sizes that more levels may still improve
        for n in sizes[1:]:
            fits = _capacity(levels, max_branch, n) >= n
            if fits:
                cost = target_times[n] + levels * draft_time
                candidates.append((n, levels, cost / float(values[n])))
            if not fits or values[n] < ceiling[n] * (1.0 - _TIE):
                unsettled.append(n)
        fastest = min(time for _, _, time in candidates) * (1.0 + _TIE)
        drafting = (levels + 1) * draft_time
        bounds = ((target_times[n] + drafting) / ceiling[n] for n in unsettled)
        if levels == max_levels or not any(bound <= fastest for bound in bounds):
            break
    size, levels, _ = min(candidate for candidate in candidates if candidate[2] <= fastest)
    parents = optimal_tree(acceptance, size, max_levels=levels, max_branch=max_branch)
    tokens = expected_tokens(parents, acceptance)
    time = (float(target_times[size]) + (levels * draft_time if size > 1 else 0.0)) / tokens
    return Plan(parents, size, levels, tokens, time, target_times[1] / time)


class _Rates(NamedTuple):
    """Acceptance rates by rank: one row for every depth or, if `by_level`, a row per depth.

    Without trailing zeros and, by level, without trailing rows of zeros; what is past an end is 0.
    """

    rows: tuple[tuple[float, ...], ...]
    by_level: bool

    def row(self, depth: int) -> tuple[float, ...]:
        if not self.by_level:
            return self.rows[0]
        return self.rows[depth] if depth < len(self.rows) else ()

    def is_sorted(self) -> bool:
        return all(a >= b for row in self.rows for a, b in zip(row, row[1:], strict=False))


def _usable_rates(
    acceptance: AcceptanceRates, size: int, max_levels: int | None, max_branch: int | None
) -> _Rates:
    """Check the arguments that all trees share; return the rates within the bounds."""
    for name, count in (("size", size), ("max_levels", max_levels), ("max_branch", max_branch)):
        if count is not None or name == "size":
            check_count(name, count)
    capacity = _capacity(max_levels, max_branch, size)
    if capacity < size:
        raise ArgumentError(
            f"size {size} does not fit: a tree of max_levels={max_levels} and "
            f"max_branch={max_branch} has at most {capacity} nodes"
        )
    by_level, rows = _rows_of(acceptance)
    kept = [row[:max_branch] for row in rows]
    if by_level and max_levels is not None:
        kept = kept[: max_levels - 1]
    kept = [row[: max((i for i, rate in enumerate(row, 1) if rate), default=0)] for row in kept]
    while by_level and kept and not kept[-1]:
        kept.pop()
    return _Rates(tuple(kept), by_level)


def _rows_of(acceptance: AcceptanceRates) -> tuple[bool, list[tuple[float, ...]]]:
    """Tell a matrix from a vector; return its checked rows."""
    try:
        entries = list(acceptance)
        by_level = bool(entries) and not any(np.isscalar(entry) for entry in entries)
        rows = [tuple(float(rate) for rate in row) for row in (entries if by_level else [entries])]
    except (TypeError, ValueError) as error:
        raise ArgumentError(
            "acceptance must be a vector of rates or a matrix, one row per level"
        ) from error
    for rate in (rate for row in rows for rate in row):
        if not 0.0 <= rate <= 1.0:
            raise ArgumentError(f"acceptance rate {rate} is not in [0, 1]")
    return by_level, rows


def _capacity(max_levels: int | None, max_branch: int | None, enough: int) -> int:
    """Count the nodes that fit the bounds, or return `enough` if that many fit."""
    if max_levels == 1 or max_branch is None or max_levels is None:
        return 1 if max_levels == 1 else enough
    nodes = width = 1
    for _ in range(max_levels - 1):
        width *= max_branch
        nodes += width
        if nodes >= enough:
            return enough
    return nodes


def _best_first(
    rates: _Rates, size: int, max_levels: int | None, max_branch: int | None
) -> tuple[list[int], list[float]]:
    """Parents and scores, best score first; among equals the shallower node, then the older one."""
    levels, branch = max_levels or size, max_branch or size
    parents: list[int] = []
    scores: list[float] = []
    frontier = [(-1.0, 0, -1, 0)]  # -score, depth, parent, rank

    def offer(score: float, depth: int, parent: int, rank: int) -> None:
        row = rates.row(depth - 1)
        rate = row[rank] if rank < len(row) else 0.0
        heappush(frontier, (-score * rate, depth, parent, rank))

    while len(parents) < size:
        negative_score, depth, parent, rank = heappop(frontier)
        if depth + 1 < levels:
            offer(-negative_score, depth + 1, len(parents), 0)
        if depth > 0 and rank + 1 < branch:
            offer(scores[parent], depth, parent, rank + 1)
        parents.append(parent)
        scores.append(-negative_score)
    return parents, scores


def _ceiling(rates: _Rates, size: int, max_branch: int | None) -> NDArray[np.float64]:
    """Upper bounds on the expected tokens, [size + 1] by number of nodes, for any levels."""
    if rates.is_sorted():
        return _prefix_values(rates, size, None, max_branch)
    if rates.by_level:
        return program.stack(rates.rows, size).best
    return program.fill(rates.rows[0], size, None).best


def _values_by_levels(
    rates: _Rates, size: int, max_branch: int | None
) -> Iterator[NDArray[np.float64]]:
    """Yield the most expected tokens by number of nodes, for 1 level, then 2, and so on.

    An array ends where the levels cannot hold more nodes, or is an upper bound from there on.
    """
    table = program.fill((), size, None)
    for levels in range(1, size + 1):  # more levels than nodes change nothing
        if rates.is_sorted():
            yield _prefix_values(rates, _capacity(levels, max_branch, size), levels, max_branch)
        elif rates.by_level:
            if 1 < levels <= len(rates.rows) + 1:
                table = program.stack(rates.rows[: levels - 1], size)
            yield table.best
        else:
            yield table.best
            table = program.fill(rates.rows[0], size, table)


def _prefix_values(
    rates: _Rates, size: int, max_levels: int | None, max_branch: int | None
) -> NDArray[np.float64]:
    scores = _best_first(rates, size, max_levels, max_branch)[1]
    return np.concatenate(([0.0], np.cumsum(scores)))


def _check_times(target_times: Mapping[int, float], draft_time: float) -> None:
    if not isinstance(target_times, Mapping) or 1 not in target_times:
        raise ArgumentError("target_times has no time for size 1, the time of plain decoding")
    for size, time in target_times.items():
        check_count("size in target_times", size)
        if not (_is_real(time) and 0.0 < time < math.inf):
            raise ArgumentError(f"target_times[{size}] is {time}: it must be positive and finite")
    if not (_is_real(draft_time) and 0.0 <= draft_time < math.inf):
        raise ArgumentError(f"draft_time is {draft_time}: it must be finite and not negative")


def _is_real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
