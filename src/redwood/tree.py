"""The drafted token tree: values only, no model, no chance.

A tree says for each node which token it carries, who its parent is and *how it was drawn* (its
law). Verification reads the tree and nothing else, so only drawing code writes laws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from operator import lt
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from redwood.errors import ArgumentError, NumericalError


class Law(IntEnum):
    """How a node was drawn; it decides how the node may be verified.

    POINT: not at random (top-k, n-gram). WITHOUT_REPLACEMENT: from its draft row with the earlier
    siblings of the same row zeroed, renormalised; uniform over tokens not yet drawn once that row
    is used up. WITH_REPLACEMENT: from its draft row. COUPLED: with the noise the target will use.
    """

    POINT = 0
    WITHOUT_REPLACEMENT = 1
    WITH_REPLACEMENT = 2
    COUPLED = 3


class DraftRow(NamedTuple):
    """One draft row: `probs` [M] float64 over the tokens `ids` [M] (None: token i is index i)."""

    probs: NDArray[np.float64]
    ids: NDArray[np.int64] | None


@dataclass(frozen=True, eq=False)
class TokenTree:
    """A drafted token tree; node 0, the root, is the last committed token.

    Args:
        token_ids: int64 [N].
        parents: int64 [N]; parents[0] == -1, parents[i] < i; siblings stand in draw order.
        laws: int8 [N], values of `Law`; laws[0] is unused.
        draft_rows: int64 [N], row of `draft_probs` that a node was drawn from, -1 for POINT.
        draft_probs: float [R, V], or [R, M] together with `draft_ids`; None if nothing was drawn.
        draft_ids: int64 [R, M], the tokens that the columns of each row stand for; None: all of V.
            Columns of zero probability may repeat a token (padding).
        estimates: [N], estimated probability that a node is accepted; the root's is 1 and no
            child's exceeds its parent's. None: unknown. Verification does not use them.
        sources: [N], bits of `algorithms.sources.Source`; 0, or None for all: unknown. Nor these.

    Lists and arrays are accepted, too. A tree of lists of integers is kept as lists, and its
    tensors are made when they are asked for: they take longer than all else about a small tree.

    Raises:
        ArgumentError: shapes that disagree, numbers that are not whole, a parent that does not
            precede its child, a drafted token below 0, a law without its draft row.
    """

    token_ids: Tensor
    parents: Tensor
    laws: Tensor
    draft_rows: Tensor
    draft_probs: Tensor | None = None
    draft_ids: Tensor | None = None
    estimates: Sequence[float] | None = None
    sources: Sequence[int] | None = None

    def __post_init__(self) -> None:
        held = self.__dict__
        for name, (listed, dtype) in _FIELDS.items():
            value = held[name]
            whole = type(value) is list and set(map(type, value)) == {int}
            if whole and _LEAST[dtype] <= min(value) and max(value) <= _MOST[dtype]:
                held[listed] = list(value)
                del held[name]
            else:
                held[name] = made = _whole_numbers(name, value, dtype)
                if made.ndim != 1:
                    raise ArgumentError(f"{name} must be a list of tokens or of numbers")
        if self.draft_ids is not None:
            held["draft_ids"] = _whole_numbers("draft_ids", self.draft_ids, torch.int64)
        if self.draft_probs is not None:
            held["draft_probs"] = _floats(self.draft_probs)
        self._check()

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Tensor:
            listed, dtype = _FIELDS.get(name, ("", None))
            if listed not in self.__dict__:
                raise AttributeError(f"a TokenTree has no {name}")
            made = self.__dict__[name] = torch.tensor(self.__dict__[listed], dtype=dtype)
            return made

    def _check(self) -> None:
        size = len(self.token_list)
        if size == 0:
            raise ArgumentError("a token tree needs a list of tokens, at least its root")
        for name, (listed, _) in _FIELDS.items():
            if len(getattr(self, listed)) != size:
                raise ArgumentError(f"{name} must have {size} entries, one per node")
        for name in ("estimates", "sources"):
            if getattr(self, name) is not None and len(getattr(self, name)) != size:
                raise ArgumentError(f"{name} must have {size} entries, one per node")
        parents = self.parent_list
        if parents[0] != -1 or min(parents[1:], default=0) < 0:
            raise ArgumentError("parents must start with -1 and precede their children")
        if not all(map(lt, parents, range(size))):
            raise ArgumentError("parents must start with -1 and precede their children")
        if self.draft_probs is not None and self.draft_probs.ndim != 2:
            raise ArgumentError("draft_probs must be a table, one row per draft law")
        num_rows = 0 if self.draft_probs is None else len(self.draft_probs)
        if self.draft_ids is not None and (
            self.draft_probs is None or self.draft_ids.shape != self.draft_probs.shape
        ):
            raise ArgumentError("draft_ids must have the shape of draft_probs")
        tokens, laws = self.token_list[1:], self.law_list[1:]  # the root was not drafted
        if min(tokens, default=0) >= 0 and _UNDRAWN.issuperset(laws):
            return
        for node, (token, law) in enumerate(zip(tokens, laws, strict=True), start=1):
            if token < 0:
                raise ArgumentError(f"node {node} has token {token}, below 0")
            if law not in _LAWS:
                raise ArgumentError(f"node {node} has unknown law {law}")
            if law not in _UNDRAWN and not 0 <= self.draft_row_list[node] < num_rows:
                raise ArgumentError(
                    f"node {node} was drawn from draft row {self.draft_row_list[node]}, "
                    f"but draft_probs has {num_rows} rows"
                )

    def __len__(self) -> int:
        return len(self.token_list)

    @classmethod
    def chain(cls, token_ids: Sequence[int]) -> Self:
        """Returns a tree that is one path of POINT nodes; the first token is the root."""
        size = len(token_ids)
        return cls.point(token_ids, range(-1, size - 1))

    @classmethod
    def point(
        cls,
        token_ids: Sequence[int],
        parents: Sequence[int],
        estimates: Sequence[float] | None = None,
        sources: Sequence[int] | None = None,
    ) -> Self:
        """Returns a tree whose nodes were all chosen without chance."""
        size = len(token_ids)
        return cls.of_lists(
            list(token_ids),
            list(parents),
            [int(Law.POINT)] * size,
            [-1] * size,
            None,
            None,
            estimates,
            sources,
        )

    @classmethod
    def of_lists(
        cls,
        token_list: list[int],
        parent_list: list[int],
        law_list: list[int],
        draft_row_list: list[int],
        draft_probs: Tensor | None,
        draft_ids: Tensor | None,
        estimates: Sequence[float] | None,
        sources: Sequence[int] | None = None,
    ) -> Self:
        """Returns a tree of lists; see the class."""
        make: Any = cls
        drawn = draft_row_list, draft_probs, draft_ids
        made: Self = make(token_list, parent_list, law_list, *drawn, estimates, sources)
        return made

    def kept(self, nodes: Sequence[int]) -> TokenTree:
        """Returns the tree of these nodes alone: in order, the root first, parents with children.

        NOTE: only nodes chosen without chance of their own (POINT, COUPLED) may be left out: to
        drop a drawn node after its draw changes the law of the text.

        Raises:
            ArgumentError: nodes out of order, a child without its parent, a drawn node left out.
        """
        if not nodes or nodes[0] != 0 or not all(map(lt, nodes, nodes[1:])):
            raise ArgumentError("nodes to keep must be in order, the root first")
        if len(nodes) == len(self):
            return self
        if nodes[-1] == len(nodes) - 1 and _UNDRAWN.issuperset(self.law_list[len(nodes) :]):
            return self._first(len(nodes))
        place = {node: i for i, node in enumerate(nodes)}
        if not _UNDRAWN.issuperset(self.law_list[1:]):
            for node, law in enumerate(self.law_list):
                if node and node not in place and law not in _UNDRAWN:
                    raise ArgumentError(f"node {node} was drawn: it cannot be left out")
        above = self.parent_list
        parents = [place.get(above[node], -1) for node in nodes]
        if -1 in parents[1:]:
            raise ArgumentError("a node to keep has no parent among them")
        return TokenTree.of_lists(
            [self.token_list[node] for node in nodes],
            parents,
            [self.law_list[node] for node in nodes],
            [self.draft_row_list[node] for node in nodes],
            self.draft_probs,
            self.draft_ids,
            None if self.estimates is None else [self.estimates[node] for node in nodes],
            None if self.sources is None else [self.sources[node] for node in nodes],
        )

    def _first(self, count: int) -> TokenTree:
        """The tree of the first nodes, which is valid as this one is, so nothing is checked."""
        made = object.__new__(type(self))
        for listed, _ in _FIELDS.values():
            made.__dict__[listed] = getattr(self, listed)[:count]
        made.__dict__["draft_probs"], made.__dict__["draft_ids"] = self.draft_probs, self.draft_ids
        for name in ("estimates", "sources"):
            noted = getattr(self, name)
            made.__dict__[name] = None if noted is None else noted[:count]
        return made

    @cached_property
    def token_list(self) -> list[int]:
        """Token ids as Python integers."""
        return _int_list(self.token_ids)

    @cached_property
    def parent_list(self) -> list[int]:
        """Parents as Python integers."""
        return _int_list(self.parents)

    @cached_property
    def law_list(self) -> list[int]:
        """Laws as Python integers."""
        return _int_list(self.laws)

    @cached_property
    def draft_row_list(self) -> list[int]:
        """Draft rows as Python integers."""
        return _int_list(self.draft_rows)

    @cached_property
    def children(self) -> list[list[int]]:
        """Children of every node, in draw order."""
        return children_of(self.parent_list)

    @cached_property
    def depths(self) -> list[int]:
        """Depth of every node; the root has 0."""
        return depths_of(self.parent_list)

    @property
    def levels(self) -> int:
        """Levels, the root's included: a chain of 3 drafted tokens has 4."""
        return max(self.depths) + 1

    def path(self, node: int) -> list[int]:
        """Returns the nodes from the root to `node`, both included."""
        nodes = []
        while node >= 0:
            nodes.append(node)
            node = self.parent_list[node]
        return nodes[::-1]

    def draft_row(self, index: int) -> DraftRow:
        """Returns draft row `index` as float64 on the CPU. O(M log M) once per row.

        Raises:
            NumericalError: a probability that is negative, NaN or infinite.
            ArgumentError: a token of the row that is below 0 or stands there twice.
        """
        row = self._draft_cache.get(index)
        if row is None:
            assert self.draft_probs is not None
            probs = self.draft_probs[index].to("cpu", torch.float64).numpy()
            if len(probs) and not 0.0 <= probs.min() <= probs.max() < np.inf:
                raise NumericalError(f"draft row {index} has negative, NaN or infinite entries")
            ids = None if self.draft_ids is None else self.draft_ids[index].numpy()
            if ids is not None:
                used = np.sort(ids[probs > 0.0])
                if (used[:1] < 0).any() or (used[1:] == used[:-1]).any():
                    raise ArgumentError(f"draft row {index} has a token twice, or one below 0")
            row = self._draft_cache[index] = DraftRow(probs, ids)
        return row

    @cached_property
    def _draft_cache(self) -> dict[int, DraftRow]:
        return {}


_FIELDS = {
    "token_ids": ("token_list", torch.int64),
    "parents": ("parent_list", torch.int64),
    "laws": ("law_list", torch.int8),
    "draft_rows": ("draft_row_list", torch.int64),
}
_LEAST = {dtype: torch.iinfo(dtype).min for dtype in (torch.int64, torch.int8)}
_MOST = {dtype: torch.iinfo(dtype).max for dtype in (torch.int64, torch.int8)}
_LAWS = frozenset(int(law) for law in Law)
_UNDRAWN = frozenset((int(Law.POINT), int(Law.COUPLED)))


def _whole_numbers(name: str, values: Any, dtype: torch.dtype) -> Tensor:
    """A tensor of `dtype` on the CPU with exactly these values."""
    if isinstance(values, Tensor) and values.dtype == dtype and values.device.type == "cpu":
        return values
    try:
        given = torch.as_tensor(values, device="cpu")
        wide = given.to(torch.int64)
        made = wide.to(dtype)
        exact = torch.equal(made.to(torch.int64), wide)
        if given.is_floating_point():
            exact = exact and torch.equal(wide.to(given.dtype), given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"{name} must hold whole numbers: {error}") from error
    if not exact:
        raise ArgumentError(f"{name} must hold whole numbers that fit {dtype}")
    return made


def _floats(table: Any) -> Tensor:
    """A table of floats; lists become float64 by way of NumPy: float32 would round the law."""
    try:
        made = table.detach() if isinstance(table, Tensor) else torch.as_tensor(np.asarray(table))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"draft_probs must hold numbers: {error}") from error
    return made if made.is_floating_point() else made.double()


def _int_list(values: Tensor) -> list[int]:
    listed: Any = values.tolist()
    return list(listed)


def children_of(parents: Sequence[int]) -> list[list[int]]:
    """Returns the children of every node, in index order. `parents`: [N], -1 first. O(N)."""
    children: list[list[int]] = [[] for _ in parents]
    for node, parent in enumerate(parents):
        if parent >= 0:
            children[parent].append(node)
    return children


def depths_of(parents: Sequence[int]) -> list[int]:
    """Returns the depth of every node, the root's being 0. `parents`: [N], -1 first. O(N)."""
    depths: list[int] = []
    for parent in parents:
        depths.append(0 if parent < 0 else depths[parent] + 1)
    return depths


def ancestor_mask(parents: Sequence[int], last: int | None = None) -> NDArray[np.bool_]:
    """Returns bool [last, N]: entry [i, j] tells whether j is, or is above, the i-th of the nodes.

    The topology-aware causal mask of SpecInfer (arXiv 2305.09781, section 4.2). Nodes with parent
    -1 are roots; several are allowed. In preorder the nodes below j stand in one interval behind
    it, so that two comparisons per entry tell: O(N) beside them.

    Args:
        parents: [N], parents[i] < i.
        last: rows, for this many of the last nodes; None: for all.
    """
    size = len(parents)
    sizes = [1] * size
    for node in range(size - 1, 0, -1):
        if (parent := parents[node]) >= 0:
            sizes[parent] += sizes[node]
    starts: list[int] = []  # places in preorder
    free: list[int] = []  # where the nodes of the next child will begin
    top = 0
    for node, parent in enumerate(parents):
        if parent >= 0:
            start = free[parent]
            free[parent] += sizes[node]
        else:
            start = top
            top += sizes[node]
        starts.append(start)
        free.append(start + 1)
    first = np.array(starts, np.int32)
    seen = first if last is None else first[size - last :]
    below = first <= seen[:, None]
    below &= seen[:, None] < first + np.array(sizes, np.int32)
    return below
