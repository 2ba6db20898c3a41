"""Acceptance of one level: k children of one node, by the law they are drawn with. Pure.

Rates are per rank: the chance that child i is the accepted one; their sum is that of any child.
Coins are integrated out, and so is the draw of the child that is judged; what was refused before
it matters for draws without replacement alone and is sampled there. The rule is
`verify.recursive`; on one level `verify.traversal` is the same.

Letters: p is the target's law and q the drafter's, float64 [P, M], P positions at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
_BLOCK = 1 << 21  # numbers worked on at once


class Draws(NamedTuple):
    """How histories of refused tokens are drawn: ranks, histories per position, chance."""

    children: int
    count: int
    rng: np.random.Generator
    vocab_size: int

    def uniforms(self) -> Iterator[Array]:
        """Yields [count] uniforms, one in each share of the interval: less noise than free ones."""
        while True:
            yield (self.rng.permutation(self.count) + self.rng.random()) / self.count


def point(p: Array, order: NDArray[np.int64], children: int) -> Array:
    """Returns rates [P, children] of the drafter's best tokens, taken without chance.

    Args:
        order: [P, >= children], columns of p, the drafter's best token first.
    """
    return np.take_along_axis(p, order[:, :children], 1)


def with_replacement(p: Array, q: Array, children: int) -> Array:
    """Returns rates [P, children] of i.i.d. draws (SpecInfer).

    What is left of p after a refusal does not depend on the refused token, so this is exact.
    """
    rates = np.zeros((len(p), children))
    reach = np.ones(len(p))
    for rank in range(children):
        taken = np.minimum(p, q).sum(1)
        rates[:, rank] = reach * taken
        reach = reach * np.maximum(1.0 - taken, 0.0)
        p = _normal(np.maximum(p - q, 0.0), p)
    return rates


def without_replacement(p: Array, q: Array, draws: Draws) -> Array:
    """Returns rates [P, children] of draws without replacement (Sequoia).

    Histories of refused tokens are drawn from their own law; for one child nothing is drawn. Once q
    is used up draws are uniform over the vocabulary; of the tokens that stand in no column none is
    counted as accepted.
    """
    return _in_blocks(draws, p, q, lambda kept, start: kept.sum(2))


def without_replacement_of(p: Array, q: Array, columns: NDArray[np.int64], draws: Draws) -> Array:
    """Returns the chance [P, children] that a rank's child is accepted and is `columns` [P]."""

    def of_column(kept: Array, start: int) -> Array:
        own = columns[start : start + len(kept), None, None]
        return np.take_along_axis(kept, np.broadcast_to(own, (*kept.shape[:2], 1)), 2)[..., 0]

    return _in_blocks(draws, p, q, of_column)


def _in_blocks(draws: Draws, p: Array, q: Array, what: Callable[[Array, int], Array]) -> Array:
    """Rates [P, children]: the mean over histories of reach x `what` of the kept mass."""
    block = max(1, _BLOCK // (draws.count * p.shape[1]))
    rates = np.zeros((len(p), draws.children))
    for start in range(0, len(p), block):
        own = slice(start, start + block)
        for rank, (reach, kept) in enumerate(_ranks(p[own], q[own], draws)):
            rates[own, rank] = (reach * what(kept, start)).mean(1)
    return rates


def _ranks(p: Array, q: Array, draws: Draws) -> Iterator[tuple[Array, Array]]:
    """Yields, rank by rank, the chance [P, draws] that a history leads there, and the mass that
    the child of this rank keeps, [P, draws, M]; both with one history for the first rank.
    """
    reach, left, law = np.ones((len(p), 1)), p[:, None], q[:, None]
    yield reach, np.minimum(left, law)
    shape = (len(p), draws.count, p.shape[1])
    left, law, reach = (np.broadcast_to(x, shape[: x.ndim]) for x in (left, law, reach))
    drawn = np.zeros(shape, dtype=bool)
    for rank, uniforms in zip(range(1, draws.children), draws.uniforms(), strict=False):
        reach = reach * np.maximum(1.0 - np.minimum(left, law).sum(2), 0.0)
        refused = _pick(np.maximum(law - left, 0.0), uniforms)
        left = _normal(np.maximum(left - law, 0.0), left)
        np.put_along_axis(drawn, refused[..., None], True, 2)
        law = _without(law, drawn, rank, draws.vocab_size)
        yield reach, np.minimum(left, law)


def _pick(weights: Array, uniforms: Array) -> NDArray[np.int64]:
    """Draws a column by weights [P, draws, M]; the first one where there are none."""
    sums = weights.cumsum(2)
    return (sums > uniforms[:, None] * sums[..., -1:]).argmax(2)


def _without(law: Array, drawn: NDArray[np.bool_], count: int, size: int) -> Array:
    """The law of the next draw: without the drawn tokens, uniform once nothing is left."""
    law = np.where(drawn, 0.0, law)
    mass = law.sum(2, keepdims=True)
    uniform = np.where(drawn, 0.0, 1.0 / max(1, size - count))
    return np.where(mass > 0.0, law / np.where(mass > 0.0, mass, 1.0), uniform)


def _normal(rest: Array, before: Array) -> Array:
    """The rest normalised; what was before where no rest is left, which no refusal reaches."""
    mass = rest.sum(-1, keepdims=True)
    return np.where(mass > 0.0, rest / np.where(mass > 0.0, mass, 1.0), before)
