"""What the tests of this subject share."""

import math
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import pytest

from redwood.algorithms.sequoia import (
    expected_tokens,
)

Rates = list[float] | list[list[float]]

# Published acceptance vectors: counts of 667 trials in float32, and arXiv 2402.12374, App. E.
COUNTS = [423, 72, 38, 15, 13, 10, 3, 2, 8, 3, 5, 3, 4, 2, 1, 2, 1, 2, 0, 2, 2, 2, 0, 1, 0, 1]
SHIPPED = [float(np.float32(count / 667)) for count in [*COUNTS, 0, 0, 0, 1, 1, 1]]
APPENDIX_E = [
    *(0.7732, 0.1039, 0.0402, 0.0206, 0.0128, 0.0081, 0.0064, 0.0043, 0.0035, 0.0026, 0.0025),
    *(0.0021, 0.0016, 0.0014, 0.0010, 0.0010, 0.0010, 0.0007, 0.0007, 0.0006, 0.0007, 0.0006),
    *(0.0004, 0.0004, 0.0005, 0.0006, 0.0004, 0.0003, 0.0002, 0.0004, 0.0001),
]
DEMO_TIMES = {1: 10.0, 2: 10.0, 4: 10.0, 8: 12.0, 16: 14.0, 32: 18.0}
JUST_BELOW_ONE = math.nextafter(1.0, 0.0)


def is_matrix(rates: Rates) -> bool:
    return bool(rates) and isinstance(rates[0], list)


def depths_of(parents: Sequence[int]) -> list[int]:
    depths = [0]
    for parent in parents[1:]:
        depths.append(depths[parent] + 1)
    return depths


def levels_of(parents: Sequence[int]) -> int:
    return max(depths_of(parents)) + 1


def branch_of(parents: Sequence[int]) -> int:
    return max((parents.count(node) for node in range(len(parents))), default=0)


# ---------------------------------------------------------------- every ordered tree

Tree = tuple["Tree", ...]  # the subtrees of the children, by rank


@cache
def forests(size: int) -> list[Tree]:
    """All ordered forests of `size` nodes; as children of a root, all trees of size + 1 nodes."""
    if size == 0:
        return [()]
    return [
        (first, *rest)
        for share in range(1, size + 1)
        for first in forests(share - 1)
        for rest in forests(size - share)
    ]


def height(tree: Tree) -> int:
    return 1 + max(map(height, tree), default=0)


def width(tree: Tree) -> int:
    return max(len(tree), *map(width, tree)) if tree else 0


def value(tree: Tree, row: Callable[[int], Sequence[float]], depth: int = 0) -> float:
    rates = row(depth)
    return 1.0 + sum(
        rates[rank] * value(child, row, depth + 1)
        for rank, child in enumerate(tree)
        if rank < len(rates)
    )


def best_value(rates: Rates, size: int, levels: int | None, branch: int | None) -> float | None:
    """The most expected tokens over every tree within the bounds; None if there is none."""

    def row(depth: int) -> Sequence[float]:
        if not is_matrix(rates):
            return rates  # type: ignore[return-value]
        return rates[depth] if depth < len(rates) else []  # type: ignore[return-value]

    fitting = [
        tree
        for tree in forests(size - 1)
        if (levels is None or height(tree) <= levels) and (branch is None or width(tree) <= branch)
    ]
    return max((value(tree, row) for tree in fitting), default=None)


def check_tree(
    parents: list[int], rates: Rates, size: int, levels: int | None, branch: int | None
) -> None:
    assert len(parents) == size
    assert levels is None or levels_of(parents) <= levels
    assert branch is None or branch_of(parents) <= branch
    expected = best_value(rates, size, levels, branch)
    assert expected is not None
    assert expected_tokens(parents, rates) == pytest.approx(expected, rel=1e-13)


def random_rates(rng: np.random.Generator, *, ordered: bool, by_level: bool) -> Rates:
    def vector() -> list[float]:
        length = int(rng.integers(0, 7))
        row = rng.random(length) * rng.choice([0.4, 1.0])
        row[rng.random(length) < 0.3] = 0.0
        return [float(rate) for rate in (sorted(row, reverse=True) if ordered else row)]

    return [vector() for _ in range(int(rng.integers(1, 6)))] if by_level else vector()
