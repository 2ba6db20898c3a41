"""A small drafting situation, and every tree that can be drawn in it, with its probability.

The drawing laws are written out here a second time, on purpose: the kit shares no code with what
it tests. No rule is run here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from redwood.errors import ArgumentError
from redwood.tree import Law, TokenTree

Path = tuple[int, ...]
Row = NDArray[np.float64]


def _no_draft(source: int, path: Path) -> Row:
    raise ArgumentError(f"the case has drawn nodes but no draft row (source {source}, {path})")


def _lowest_new(node: int, path: Path, siblings: Path) -> int:
    """The lowest token that no earlier sibling carries."""
    return min(set(range(len(siblings) + 1)) - set(siblings))


@dataclass(frozen=True, eq=False, kw_only=True)
class Case:
    """One drafting situation: a tree's shape and laws, and all rows as functions of the path.

    A path is the tuple of tokens below the root, `()` at the root itself.

    Args:
        vocab_size: V; 2 to 4 keeps the enumeration small.
        parents: [N], parents[0] == -1, parents[i] < i; siblings in draw order.
        laws: [N] values of `Law`; laws[0] is unused.
        target: path -> probabilities [V] after it.
        draft: (source, path) -> probabilities [V] that `source` draws from after it.
        sources: [N], which source draws a node; default 0 everywhere. Siblings of one source share
            a draft row.
        choose: (node, path of its parent, tokens of its earlier siblings) -> token of a POINT node;
            default the lowest that no sibling carries.
        sparse: whether trees carry `draft_ids`: only the tokens of positive probability, padded.
        name: how errors call the case.

    Raises:
        ArgumentError: lengths that disagree, or (when used) a row that is no probability row.
    """

    vocab_size: int
    parents: Sequence[int]
    laws: Sequence[int]
    target: Callable[[Path], ArrayLike]
    draft: Callable[[int, Path], ArrayLike] = _no_draft
    sources: Sequence[int] = ()
    choose: Callable[[int, Path, Path], int] = _lowest_new
    sparse: bool = False
    name: str = "case"
    _rows: dict[tuple[int, Path], Row] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        size = len(self.parents)
        if not self.sources:
            object.__setattr__(self, "sources", (0,) * size)
        if size == 0 or len(self.laws) != size or len(self.sources) != size:
            raise ArgumentError(f"{self.name}: parents, laws and sources need one entry per node")
        if self.parents[0] != -1 or any(not 0 <= p < i for i, p in enumerate(self.parents) if i):
            raise ArgumentError(f"{self.name}: parents must precede their children")

    @cached_property
    def levels(self) -> int:
        """Levels of the tree, the root's included: the most tokens that one step can give."""
        nodes = range(len(self.parents))
        return 1 + max(len(path_to(self.parents, node, nodes)) for node in nodes)

    def target_row(self, path: Path) -> Row:
        """Returns the target's row [V] after `path`, normalised. Computed once per path."""
        return self._row(-1, path)

    def draft_row(self, source: int, path: Path) -> Row:
        """Returns the row [V] of `source` after `path`, normalised. Computed once per path."""
        return self._row(source, path)

    def _row(self, source: int, path: Path) -> Row:
        row = self._rows.get((source, path))
        if row is None:
            given = self.target(path) if source < 0 else self.draft(source, path)
            row = np.array(given, dtype=np.float64)
            whose = "the target" if source < 0 else f"source {source}"
            if row.shape != (self.vocab_size,) or not (row >= 0).all():
                raise ArgumentError(f"{self.name}: bad row {row} of {whose} after {path}")
            if not abs(row.sum() - 1.0) < 1e-6:
                raise ArgumentError(f"{self.name}: row of {whose} after {path} sums to {row.sum()}")
            row /= row.sum()
            self._rows[source, path] = row
        return row


class Draft(NamedTuple):
    """One tree that may be drawn: its probability, the tree, and the target's rows [N, V]."""

    probability: float
    tree: TokenTree
    target_probs: NDArray[np.float64]


def drafts(case: Case, committed: Path = ()) -> list[Draft]:
    """Returns every tree that can be drawn in `case`; the probabilities sum to 1.

    POINT: as `case.choose` says. WITH_REPLACEMENT: from the source's row (drafts of SpecInfer,
    arXiv 2305.09781). WITHOUT_REPLACEMENT: from that row with the tokens of earlier siblings of the
    same row zeroed, renormalised; once nothing is left, uniform over what was not drawn (drafts of
    Sequoia, arXiv 2402.12374).

    Args:
        committed: tokens of earlier steps; all paths start with them.

    Raises:
        ArgumentError: COUPLED nodes, which `check_coupled` is for; more siblings than tokens.
    """
    root = committed[-1] if committed else 0
    drawn: list[tuple[float, Path]] = [(1.0, (root,))]
    for node in range(1, len(case.parents)):
        drawn = [
            (probability * share, (*tokens, token))
            for probability, tokens in drawn
            for token, share in _proposals(case, node, committed, tokens)
        ]
    return [
        Draft(
            probability,
            _tree(case, committed, tokens),
            target_table(case, case.parents, tokens, committed),
        )
        for probability, tokens in drawn
    ]


def path_to(parents: Sequence[int], node: int, tokens: Sequence[int], committed: Path = ()) -> Path:
    """Returns the path that ends at `node` of a tree with these parents and tokens [N]."""
    below: list[int] = []
    while node > 0:
        below.append(tokens[node])
        node = parents[node]
    return (*committed, *reversed(below))


def earlier_siblings(case: Case, node: int, same_row: bool = False) -> list[int]:
    """Returns the siblings before `node`; with `same_row` those drawn from its draft row."""
    return [
        i
        for i in range(1, node)
        if case.parents[i] == case.parents[node]
        and not (same_row and (case.laws[i] == Law.POINT or case.sources[i] != case.sources[node]))
    ]


def target_table(
    case: Case, parents: Sequence[int], tokens: Sequence[int], committed: Path = ()
) -> NDArray[np.float64]:
    """Returns the target's rows [N, V] for a tree with these parents and tokens [N]."""
    paths = [path_to(parents, node, tokens, committed) for node in range(len(tokens))]
    return np.array([case.target_row(path) for path in paths])


def _proposals(case: Case, node: int, committed: Path, tokens: Path) -> list[tuple[int, float]]:
    """The tokens `node` may carry, given those of the nodes before it, with their chances."""
    law, path = case.laws[node], path_to(case.parents, case.parents[node], tokens, committed)
    if law == Law.POINT:
        siblings = tuple(tokens[i] for i in earlier_siblings(case, node))
        return [(case.choose(node, path, siblings), 1.0)]
    if law == Law.COUPLED:
        raise ArgumentError(f"{case.name}: COUPLED nodes are checked by check_coupled")
    row = case.draft_row(case.sources[node], path).tolist()
    if law == Law.WITHOUT_REPLACEMENT:
        gone = {tokens[i] for i in earlier_siblings(case, node, same_row=True)}
        row = [0.0 if token in gone else share for token, share in enumerate(row)]
        if sum(row) == 0.0:
            row = [float(token not in gone) for token in range(case.vocab_size)]
    mass = sum(row)
    if mass == 0.0:
        raise ArgumentError(f"{case.name}: node {node} has no token left to draw")
    return [(token, share / mass) for token, share in enumerate(row) if share > 0.0]


def _tree(case: Case, committed: Path, tokens: Path) -> TokenTree:
    index: dict[tuple[int, int], int] = {}
    rows: list[Row] = []
    row_of = [-1] * len(tokens)
    for node in range(1, len(tokens)):
        if case.laws[node] == Law.POINT:
            continue
        parent, source = case.parents[node], case.sources[node]
        if (parent, source) not in index:
            index[parent, source] = len(rows)
            rows.append(case.draft_row(source, path_to(case.parents, parent, tokens, committed)))
        row_of[node] = index[parent, source]
    probs, ids = _table(rows, case.sparse) if rows else (None, None)
    nodes, parents = torch.tensor(tokens), torch.tensor(list(case.parents))
    laws = torch.tensor(list(case.laws))
    return TokenTree(nodes, parents, laws, torch.tensor(row_of), probs, ids)


def _table(rows: list[Row], sparse: bool) -> tuple[Tensor, Tensor | None]:
    """Draft rows as `draft_probs` and, in the sparse form, `draft_ids`."""
    probs = np.array(rows)
    if not sparse:
        return torch.from_numpy(probs), None
    # One column more than needed, so that padding (a repeated token of no mass) is always met.
    width = int((probs > 0.0).sum(1).max())
    ids = np.argsort(-probs, axis=1, kind="stable")[:, :width]
    probs = np.pad(np.take_along_axis(probs, ids, axis=1), ((0, 0), (0, 1)))
    ids = np.where(probs > 0.0, np.pad(ids, ((0, 0), (0, 1))), ids[:, :1])
    return torch.from_numpy(probs), torch.from_numpy(ids)
