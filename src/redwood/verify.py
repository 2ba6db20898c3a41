"""Verification: which path of a drafted tree is kept, and the one more token. Pure functions.

One building block serves every law. At a node with target row p and weight r, child x with
proposal row q is kept with chance min(1, r p(x)/q(x)). If it is refused, p becomes max(r p - q, 0)
normalised and r becomes S / (S + 1 - r), S being the mass of max(r p - q, 0). Rules differ in r:

* `traversal`, leaf to root (arXiv 2505.12398; on a chain it is block verification, 2403.10444): a
  child's weight is its chance to be kept, and a node is judged after all its children.
* `recursive`, root to leaf with r = 1: Sequoia's (2402.12374, algorithm 2) and SpecInfer's
  multi-step speculative sampling (2305.09781, algorithm 2), each for the law of its own drafts.

`coupled` and `greedy` keep a node if it equals the target's own choice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from redwood.errors import ArgumentError, NumericalError
from redwood.sampling import PathRows
from redwood.sampling.noise import coupled_choice as coupled_choice
from redwood.sampling.noise import draw
from redwood.tree import Law, TokenTree

Row = NDArray[np.float64]
Noise = Callable[[int], Row]

_SHORT = 4096  # rows so short are always added up


class Acceptance(NamedTuple):
    """The accepted path, root first, and one more token from the target."""

    nodes: list[int]
    next_token: int


class TargetProbs(Protocol):
    """Gives row i, the target's law [V] after node i; a tensor [N, V] is one."""

    def __getitem__(self, node: int, /) -> Tensor | Row:
        """Returns probabilities [V] after `node`."""
        ...


@runtime_checkable
class Chance(Protocol):
    """Where a rule's chance comes from: uniforms in use, a script in `redwood.testing`."""

    def coin(self, node: int, probability: float) -> bool:
        """Returns whether the coin of `node` falls below `probability`."""
        ...

    def draw(self, probs: Row) -> int:
        """Returns the extra token, drawn from `probs` [V] (unnormalised)."""
        ...


class Uniforms:
    """Chance from uniforms [N] in [0, 1): [i] judges node i, [0] draws the extra token."""

    def __init__(self, values: ArrayLike | Tensor, size: int) -> None:
        try:
            self._values = _numbers(values)
        except (TypeError, ValueError) as error:
            raise ArgumentError(f"uniforms must be numbers: {error}") from error
        if self._values.ndim != 1 or len(self._values) < size:
            raise ArgumentError(
                f"uniforms of shape {self._values.shape} must hold a number per node: {size}"
            )
        if not ((self._values >= 0.0) & (self._values <= 1.0)).all():  # 1: a rounded float32
            raise ArgumentError("uniforms must be in [0, 1)")

    def coin(self, node: int, probability: float) -> bool:
        """Returns whether uniform `node` is below `probability`."""
        return bool(self._values[node] < probability)

    def draw(self, probs: Row) -> int:
        """Returns the token at uniform 0 of the cumulative `probs`."""
        return draw(probs, float(self._values[0]))


def traversal(
    tree: TokenTree, target_probs: TargetProbs, uniforms: ArrayLike | Tensor | Chance
) -> Acceptance:
    """Returns the path kept by leaf-to-root verification; the default rule.

    Source: traversal verification (arXiv 2505.12398). For trees of POINT nodes alone it keeps as
    much as `recursive` does, which then runs instead because it reads fewer rows.

    Args:
        tree: any mix of laws but COUPLED.
        target_probs: [N, V], or an object giving row i on demand; only visited rows are read.
        uniforms: float [N] in [0, 1); [i] judges node i, [0] draws `next_token`. Or a `Chance`.

    Guarantee: the kept tokens and `next_token` have the target's law, whatever the tree.

    Raises:
        ArgumentError: COUPLED nodes, too few uniforms, uniforms out of range, a token or draft row
            that does not fit the target's vocabulary.
        NumericalError: a row without mass, with negative numbers or with NaN.
    """
    chance = _chance(tree, uniforms)
    if not any(tree.law_list[1:]):
        return _descend(tree, target_probs, chance)
    stack = [_Residual(tree, target_probs, 0, 1.0)]
    while True:
        top = stack[-1]
        child = top.next_child()
        if child is not None:
            kept = top.chance_of(child)
            if kept > 0.0:
                stack.append(_Residual(tree, target_probs, child, kept))
            else:
                top.refuse(child)
        elif top.node == 0 or chance.coin(top.node, top.weight):
            return Acceptance([r.node for r in stack], chance.draw(top.row()))
        else:
            stack.pop()
            stack[-1].refuse(top.node)


def recursive(
    tree: TokenTree, target_probs: TargetProbs, uniforms: ArrayLike | Tensor | Chance
) -> Acceptance:
    """Returns the path kept by root-to-leaf verification, as Sequoia and SpecInfer published it.

    Arguments, guarantee and errors are those of `traversal`.
    """
    return _descend(tree, target_probs, _chance(tree, uniforms))


def coupled(tree: TokenTree, target_probs: TargetProbs, noise: Noise) -> Acceptance:
    """Returns the path that plain decoding with the same noise would have taken.

    The target's choice after a node at depth t is the arg-max of log p + noise(t); a child is kept
    if it is that choice. Source: shared-noise coupling (arXiv 2408.07978, 2506.05632).

    Args:
        tree: POINT and COUPLED nodes only.
        target_probs: as for `traversal`.
        noise: depth in the tree (the root has 0) -> Gumbel row [V] float64.

    Guarantee: the text equals plain decoding with this noise, for any tree and any pruning.

    Raises:
        ArgumentError: nodes drawn with other laws, too short a row of noise.
        NumericalError: a row without mass, with negative numbers or with NaN.
    """

    def choose(node: int) -> int:
        probs, gumbel = _read(target_probs, node), _numbers(noise(tree.depths[node]))
        if gumbel.ndim != 1 or len(gumbel) < len(probs):
            raise ArgumentError(f"noise of shape {gumbel.shape} for {len(probs)} tokens")
        return coupled_choice(probs, gumbel)

    return coupled_by(tree, choose)


def coupled_by(tree: TokenTree, choose: Callable[[int], int]) -> Acceptance:
    """Returns what `coupled` does, for a caller who makes the target's choices.

    Args:
        tree: POINT and COUPLED nodes only.
        choose: node -> the arg-max of log p + noise after it.

    Raises:
        ArgumentError: nodes drawn with other laws.
    """
    if any(law not in (Law.POINT, Law.COUPLED) for law in tree.law_list[1:]):
        raise ArgumentError("coupled verification takes POINT and COUPLED nodes only")
    return _follow(tree, choose)


def greedy(tree: TokenTree, best: Callable[[int], int]) -> Acceptance:
    """Returns the path of arg-max decoding; equals every other rule at temperature 0.

    Args:
        tree: any laws: temperature 0 has no chance in it.
        best: node -> the target's arg-max after it.
    """
    return _follow(tree, best)


def _follow(tree: TokenTree, choose: Callable[[int], int]) -> Acceptance:
    """Walks down while some child carries the chosen token."""
    nodes = [0]
    while True:
        token = choose(nodes[-1])
        match = [c for c in tree.children[nodes[-1]] if tree.token_list[c] == token]
        if not match:
            return Acceptance(nodes, token)
        nodes.append(match[0])


def _descend(tree: TokenTree, target_probs: TargetProbs, chance: Chance) -> Acceptance:
    nodes = [0]
    while True:
        state = _Residual(tree, target_probs, nodes[-1], 1.0)
        while (child := state.next_child()) is not None:
            if chance.coin(child, state.chance_of(child)):
                nodes.append(child)
                break
            state.refuse(child)
        else:
            return Acceptance(nodes, chance.draw(state.row()))


def _chance(tree: TokenTree, uniforms: ArrayLike | Tensor | Chance) -> Chance:
    if Law.COUPLED in tree.law_list[1:]:
        raise ArgumentError(
            "COUPLED nodes share the target's noise and would be wrong under the ratio rule: "
            "use coupled verification"
        )
    return uniforms if isinstance(uniforms, Chance) else Uniforms(uniforms, len(tree))


def _read(target_probs: TargetProbs, node: int) -> Row:
    """Row `node` as float64 [V] of mass 1, a copy."""
    try:
        row = _numbers(target_probs[node])
    except IndexError as error:
        raise ArgumentError(f"target_probs has no row for node {node}") from error
    mass = float(row.sum())
    if not 0.0 < mass < np.inf:
        raise NumericalError(f"the target's probabilities after node {node} have mass {mass}")
    if row.min() < 0.0:
        raise NumericalError(f"the target's probabilities after node {node} fall below 0")
    return row / mass


def _numbers(values: ArrayLike | Tensor) -> Row:
    """The values as float64 on the CPU."""
    if isinstance(values, Tensor):
        values = values.detach().to("cpu", torch.float64).numpy()
    return np.asarray(values, dtype=np.float64)


class _Residual:
    """What is left to be produced at one node while its children are judged, in draw order.

    The target row is read when first needed. It is kept unnormalised beside its mass, so that
    refusing a POINT child costs O(1), and one drawn from a row of M tokens O(M).
    """

    def __init__(
        self, tree: TokenTree, target_probs: TargetProbs, node: int, weight: float
    ) -> None:
        self.node, self.weight = node, weight
        self._tree, self._target_probs = tree, target_probs
        self._children = iter(tree.children[node])
        self._probs: Row | None = None
        self._mass = self._summed = 1.0  # now, and when all entries were last added up
        self._drawn: dict[int, set[int]] = {}  # draft row -> tokens drawn from it so far
        self._proposal: tuple[Row, NDArray[np.int64] | None] | None = None

    def next_child(self) -> int | None:
        return next(self._children, None)

    def row(self) -> Row:
        """The residual [V], unnormalised."""
        if self._probs is None:
            if isinstance(self._target_probs, PathRows):
                self._probs, self._mass = self._target_probs.weights(self.node)
            else:
                self._probs = _read(self._target_probs, self.node)
            self._summed = self._mass
        return self._probs

    def chance_of(self, child: int) -> float:
        """Chance that `child` is kept, min(1, r p(x) / q(x))."""
        token, row = self._tree.token_list[child], self.row()
        if token >= len(row):
            raise ArgumentError(f"node {child} has token {token} of a vocabulary of {len(row)}")
        wanted = self.weight * float(row[token]) / self._mass
        if self._tree.law_list[child] == Law.POINT:
            self._proposal = None
            return min(1.0, wanted)
        self._proposal = probs, ids = self._law_of(child)
        given = float(probs[token] if ids is None else probs[ids == token].sum())
        return min(1.0, wanted / given) if given > 0.0 else float(wanted > 0.0)

    def refuse(self, child: int) -> None:
        """Takes the refused child's share off; `chance_of(child)` was the last question asked."""
        token = self._tree.token_list[child]
        if self._tree.law_list[child] == Law.POINT:
            left = self._refuse_point(token)
        else:
            left = self._refuse_drawn()
            self._drawn.setdefault(self._tree.draft_row_list[child], set()).add(token)
        # With nothing left a node of weight 1 cannot have been refused, but for rounding.
        if left > 0.0:  # 1 - weight first: a weight of 1 stays 1, whatever is left
            self.weight = left / (left + (1.0 - self.weight))
        elif self.weight < 1.0:
            self.weight = 0.0

    def _refuse_point(self, token: int) -> float:
        """Removes all of p(token); returns the mass of max(r p - q, 0), q being one-hot."""
        row = self.row()
        share = float(row[token])
        row[token] = 0.0
        others = self._mass - share
        if others < 1e-3 * self._mass:  # the difference has lost digits
            others = float(row.sum())
        left = self.weight * others / self._mass
        if others > 0.0:
            self._mass = others
        else:  # only rounding can refuse a token of probability 1
            row[token] = share
        return left

    def _refuse_drawn(self) -> float:
        """Takes the proposal off; returns the mass of max(r p - q, 0)."""
        assert self._proposal is not None
        probs, ids = self._proposal
        if self.weight == 0.0:
            return 0.0
        if ids is not None:
            return self._refuse_some(probs, ids)
        rest = self.row() * (self.weight / self._mass)
        rest -= probs
        np.maximum(rest, 0.0, out=rest)
        left = float(rest.sum())
        if left > 0.0:
            self._probs, self._mass, self._summed = rest, left, left
        return left

    def _refuse_some(self, probs: Row, ids: NDArray[np.int64]) -> float:
        """The same for a proposal of a few tokens: the others' entries are not touched."""
        row, used = self.row(), probs > 0.0  # padding may repeat a token
        places = ids[used]
        before = row[places]
        row[places] = after = np.maximum(before - probs[used] * (self._mass / self.weight), 0.0)
        others = self._mass - float((before - after).sum())
        summed = self._summed
        if len(row) <= _SHORT or others < 1e-3 * summed:  # differences lose digits
            others = summed = float(row.sum())
        if others <= 0.0:
            row[places] = before
            return 0.0
        left = self.weight * others / self._mass
        self._mass, self._summed = others, summed
        return left

    def _law_of(self, child: int) -> tuple[Row, NDArray[np.int64] | None]:
        """The row q that `child` was drawn from (normalised), and its tokens."""
        index = self._tree.draft_row_list[child]
        probs, ids = self._tree.draft_row(index)
        vocab_size = len(self.row())
        if len(probs) != vocab_size if ids is None else (ids[probs > 0.0] >= vocab_size).any():
            raise ArgumentError(f"draft row {index} does not fit a vocabulary of {vocab_size}")
        drawn = list(self._drawn.get(index, ()))
        if drawn and self._tree.law_list[child] == Law.WITHOUT_REPLACEMENT:
            probs = probs.copy()
            for token in drawn:
                probs[token if ids is None else ids == token] = 0.0
        mass = float(probs.sum())
        if mass > 0.0:
            return probs / mass, ids
        if not drawn or len(drawn) >= vocab_size:
            raise NumericalError(f"draft row {index} of node {child} has no mass")
        probs = np.full(vocab_size, 1.0)  # used up: uniform over what was not drawn (section 3.2)
        probs[drawn] = 0.0
        return probs / probs.sum(), None
