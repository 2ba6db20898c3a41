"""Random cases that meet the corners where verification rules break. No enumeration here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import numpy as np

from redwood.errors import ArgumentError
from redwood.testing.cases import Case, Path, Row
from redwood.tree import Law

# What a pair of rows (target's, draft's) is like.
ROWS = (
    "random",
    "equal",
    "nearly equal",
    "disjoint",
    "one-hot target",
    "one-hot draft",
    "both one-hot",
    "zeros in the target",
    "zeros in the draft",
    "ties",
    "short draft",
    "truncated target",
    "tiny",
)
# Trees to start from; nodes are taken off the end until the case is cheap enough.
SHAPES = (
    (-1, 0, 1, 2, 3, 4),
    (-1, 0, 0, 0, 0, 0),
    (-1, 0, 0, 1, 1, 2, 2),
    (-1, 0, 0, 1, 2, 3, 4),
    (-1, 0, 0, 0, 1, 1, 4),
    (-1, 0, 1, 1, 1, 2, 3),
    (-1, 0, 0, 2, 2, 4, 1),
)


def random_cases(
    seed: int,
    count: int,
    *,
    laws: Sequence[Law] = (Law.POINT, Law.WITHOUT_REPLACEMENT, Law.WITH_REPLACEMENT),
    vocab_sizes: Sequence[int] = (2, 3, 4),
    max_nodes: int = 6,
    max_runs: int = 400,
) -> Iterator[Case]:
    """Yields cases made from (seed, index): what one case is does not depend on `count`.

    Every 13 cases go through all kinds of rows at the root: p = q (also up to rounding), disjoint
    supports, one-hot rows, zeros on either side, equal ratios, draft rows with fewer tokens than
    siblings (then without replacement goes on uniformly), top-p truncated targets, probabilities of
    1e-300. Below the root kinds are mixed. Shapes: the root alone, chains, stars, forks, lopsided
    trees. With several `laws` given they meet at one node in any order, also on one draft row;
    some nodes have two draft rows, some POINT nodes repeat a sibling, some cases have an
    end-of-sequence token after which rows are anything, and a third of the trees are sparse.

    Args:
        seed: not negative.
        count: number of cases.
        laws: the laws to draw each node's law from.
        vocab_sizes: sizes of vocabulary, 2 or more.
        max_nodes: most drafted nodes.
        max_runs: bound on drawable trees x outcomes of a rule on each; 1,000 runs of the shipped
            rules take about a tenth of a second.

    Raises:
        ArgumentError: a seed or vocabulary that cannot be.
    """
    if seed < 0 or min(vocab_sizes) < 2 or max_nodes < 0:
        raise ArgumentError("random_cases needs seed >= 0, vocab_sizes >= 2 and max_nodes >= 0")
    for index in range(count):
        yield _case((seed, index), laws, vocab_sizes, max_nodes, max_runs)


def _case(
    key: tuple[int, int],
    laws: Sequence[Law],
    vocab_sizes: Sequence[int],
    max_nodes: int,
    max_runs: int,
) -> Case:
    rng = np.random.default_rng(key)
    kind = ROWS[key[1] % len(ROWS)]
    vocab_size = int(rng.choice(vocab_sizes))
    parents = list(SHAPES[int(rng.integers(len(SHAPES)))])
    if kind == "short draft" and rng.random() < 0.7:
        parents = list(SHAPES[1])
    most = 0 if rng.random() < 0.02 else max_nodes
    parents = parents[: 1 + min(most, int(rng.integers(2, max_nodes + 2)))]
    node_laws = [int(rng.choice(laws)) for _ in parents]
    sources = [0] + [int(rng.random() < 0.25) for _ in parents[1:]]
    _separate(parents, node_laws, sources, vocab_size)
    while _cost(parents, node_laws, vocab_size) > max_runs:
        del parents[-1], node_laws[-1], sources[-1]
    rows = _Rows(key, kind, vocab_size, end_token=0 if rng.random() < 0.25 else None)
    habits = [int(rng.integers(3)) for _ in parents]
    return Case(
        vocab_size=vocab_size,
        parents=tuple(parents),
        laws=tuple(node_laws),
        sources=tuple(sources),
        target=rows.target,
        draft=rows.draft,
        choose=lambda node, path, siblings: rows.choose(habits[node], path, siblings),
        sparse=bool(rng.random() < 1 / 3),
        name=(
            f"random case {key[1]} of seed {key[0]}: {kind} rows, V = {vocab_size}, "
            f"parents {parents}, laws {node_laws}, sources {sources}"
        ),
    )


def _separate(parents: list[int], laws: list[int], sources: list[int], vocab_size: int) -> None:
    """Gives a node another draft row where the one it has may have no token left."""
    for node in range(1, len(parents)):
        while laws[node] == Law.WITHOUT_REPLACEMENT and vocab_size <= sum(
            (parents[i], sources[i]) == (parents[node], sources[node]) and laws[i] != Law.POINT
            for i in range(1, node)
        ):
            sources[node] += 1


def _cost(parents: list[int], laws: list[int], vocab_size: int) -> int:
    """Trees that can be drawn, times the places where a walk may end, times its extra tokens."""
    drawn = prod(1 if law == Law.POINT else vocab_size for law in laws[1:])
    return drawn * len(parents) * vocab_size


class _Rows:
    """Rows as functions of the path, each from a generator keyed by it."""

    def __init__(
        self, key: tuple[int, int], kind: str, vocab_size: int, end_token: int | None
    ) -> None:
        self._key, self._kind, self._size, self._end = key, kind, vocab_size, end_token

    def target(self, path: Path) -> Row:
        return _target_row(self._kind_at(path), self._rng(1, path), self._size)

    def draft(self, source: int, path: Path) -> Row:
        kind = self._kind_at(path)
        return _draft_row(kind, self._rng(2 + source, path), self.target(path))

    def choose(self, habit: int, path: Path, siblings: Path) -> int:
        """A POINT node's token: the draft's best new one, any one, or a sibling's once more."""
        if habit == 1:
            return int(self._rng(0, (*path, *siblings)).integers(self._size))
        if habit == 2 and siblings:
            return siblings[-1]
        best = np.argsort(-self.draft(0, path), kind="stable").tolist()
        return next((token for token in best if token not in siblings), int(best[0]))

    def _rng(self, stream: int, path: Path) -> np.random.Generator:
        return np.random.default_rng([*self._key, stream, *path])

    def _kind_at(self, path: Path) -> str:
        rng = self._rng(0, path)
        if self._end in path:
            return str(rng.choice(("one-hot target", "one-hot draft", "disjoint")))
        return self._kind if not path or rng.random() < 0.4 else str(rng.choice(ROWS))


def _target_row(kind: str, rng: np.random.Generator, size: int) -> Row:
    row = rng.dirichlet(np.ones(size))
    if kind in ("one-hot target", "both one-hot"):
        row = np.eye(size)[rng.integers(size)]
    elif kind == "zeros in the target":
        row[rng.integers(size)] = 0.0
    elif kind == "disjoint":
        row[rng.permutation(size)[: rng.integers(1, size)]] = 0.0
    elif kind == "ties":
        row = rng.integers(1, 4, size).astype(np.float64)
    elif kind == "truncated target":
        best = np.argsort(-row)
        row[best[1 + int(np.searchsorted(row[best].cumsum(), 0.7)) :]] = 0.0
    elif kind == "tiny":
        row[rng.permutation(size)[: rng.integers(1, size)]] *= 1e-300
    return np.asarray(row / row.sum())


def _draft_row(kind: str, rng: np.random.Generator, target: Row) -> Row:
    size = len(target)
    row = rng.dirichlet(np.ones(size))
    if kind == "equal":
        row = target.copy()
    elif kind == "nearly equal":
        row = target * (1.0 + 10.0 ** rng.integers(-16, -9) * rng.normal(size=size))
    elif kind == "disjoint":
        row[target > 0.0] = 0.0
    elif kind in ("one-hot draft", "both one-hot"):
        row = np.eye(size)[rng.integers(size)]
    elif kind == "zeros in the draft":
        row[rng.integers(size)] = 0.0
    elif kind == "ties":
        row = rng.integers(1, 4, size).astype(np.float64)
    elif kind == "short draft":
        row[rng.permutation(size)[: rng.integers(max(1, size - 2), size)]] = 0.0
    elif kind == "tiny":
        row[rng.permutation(size)[: rng.integers(1, size)]] *= 1e-300
    return np.asarray(row / row.sum())
