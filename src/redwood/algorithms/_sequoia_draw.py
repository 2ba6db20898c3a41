"""The draw of one node's children: without replacement, by inverse distribution function.

Used as `redwood.algorithms.sequoia.draw_without_replacement`. The care for small masses is here.
"""

import math
from bisect import insort
from typing import final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from redwood.errors import ArgumentError

_BLOCK = 256  # entries summed in one go; about the square root of a vocabulary


def draw_without_replacement(
    probs: NDArray[np.float64],
    uniforms: ArrayLike,
    *,
    ids: NDArray[np.integer] | None = None,
    vocab_size: int | None = None,
) -> list[int]:
    """Draw as many distinct tokens as there are uniforms, the first child of a node first.

    Source: arXiv 2402.12374, section 3.2 and Alg. 2, with its uniform fallback. We invert the
    distribution function, so that each draw has a uniform of its own.
    Args:
        probs: [V] float64, finite and not negative; the sum need not be 1.
        uniforms: [k] in [0, 1); number i decides draw i.
        ids: [V] distinct token ids of the entries of probs; None for 0, 1, ..., V - 1.
        vocab_size: number of tokens there are, for the fallback; None for V.
    Returns: [k] token ids in draw order. Draw i follows probs without the earlier draws,
        renormalised; once no drawable token has positive probability, it is uniform over the
        vocabulary without the earlier draws (from the first draw on if probs are all 0).
    Raises: ArgumentError, on wrong arguments or more draws than tokens.
    Guarantee: for given earlier draws, uniform -> token is a step function with one interval per
    token, in the order of the row (in the order of the ids in the fallback); its lengths are right
    within 1e-13. O(V + k^2), and one more pass over V whenever 7/8 of the mass has been drawn.
    """
    chances = np.asarray(uniforms, dtype=np.float64)
    if chances.ndim != 1 or not ((chances >= 0.0) & (chances < 1.0)).all():
        raise ArgumentError("uniforms must be [k], all in [0, 1)")
    vocab_size = len(probs) if vocab_size is None else vocab_size
    _check_row(probs, ids, vocab_size)
    if len(chances) > vocab_size:
        raise ArgumentError(f"{len(chances)} draws from a vocabulary of {vocab_size} tokens")
    entries: list[int] = []
    row = _Row.over(probs, entries)
    for chance in chances.tolist():
        if row is not None and row.is_imprecise():
            row = _Row.over(probs, entries)
        if row is None:
            break
        entries.append(row.take(chance))
    tokens = entries if ids is None else [int(ids[entry]) for entry in entries]
    for chance in chances[len(entries) :].tolist():
        token = int(chance * (vocab_size - len(tokens)))
        for earlier in sorted(tokens):
            token += token >= earlier
        tokens.append(token)
    return tokens


def _check_row(
    probs: NDArray[np.float64], ids: NDArray[np.integer] | None, vocab_size: int
) -> None:
    if probs.ndim != 1 or probs.dtype != np.float64:
        raise ArgumentError(f"probs must be [V] float64, not {probs.shape} {probs.dtype}")
    if len(probs) == 0 or not (probs.min() >= 0.0 and probs.max() < math.inf):
        raise ArgumentError("probs must have entries, all finite and not negative")
    if ids is None:
        if len(probs) > vocab_size:
            raise ArgumentError(f"{len(probs)} probabilities for {vocab_size} tokens")
        return
    if ids.shape != probs.shape or len(np.unique(ids)) != len(ids):
        raise ArgumentError("ids must be distinct, one for each entry of probs")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise ArgumentError(f"ids must be in [0, {vocab_size}): pass the right vocab_size")


@final
class _Row:
    """Owns the intervals of one row's tokens on the line, and which of them are taken.

    Entry j has [ends[j - 1], ends[j]), empty if its probability is 0, as it is for the entries that
    pad the last block. Taken intervals stay in place and are stepped over. Their mass costs
    precision: the free mass is known to about 1e-16 * total / free. Hence `is_imprecise`, and a new
    row without the taken entries.
    """

    def __init__(self, ends: NDArray[np.float64]) -> None:
        self._ends = ends
        self._taken: list[tuple[float, float]] = []  # (start, end), ascending
        self._free = float(self._ends[-1])

    @classmethod
    def over(cls, probs: NDArray[np.float64], drawn: list[int]) -> "_Row | None":
        """Return a row of the entries not drawn; None if all of those have probability 0."""
        weights = np.zeros(-(-len(probs) // _BLOCK) * _BLOCK)
        weights[: len(probs)] = probs
        weights[drawn] = 0.0
        largest = float(weights.max())
        if largest == 0.0:
            return None
        # A power of two scales exactly; the product with a uniform must not be subnormal.
        weights *= math.ldexp(1.0, min(1023, -math.frexp(largest)[1]))
        _accumulate(weights)
        return cls(weights)

    def is_imprecise(self) -> bool:
        """Tell whether so much is taken that the free entries need a new row."""
        return self._free < float(self._ends[-1]) / 8

    def take(self, uniform: float) -> int:
        """Return the free entry at this share of the free mass, and take it."""
        place = uniform * self._free
        for start, end in self._taken:
            if place < start:
                break
            # NOTE: the rounded sum may fall short of `end`, inside the taken interval.
            place = max(place + (end - start), end)
        entry = int(np.searchsorted(self._ends, place, side="right"))
        if entry == len(self._ends):  # rounding went past the last free interval: take that one
            entry = self._last_free()
        start, end = float(self._ends[entry - 1]) if entry else 0.0, float(self._ends[entry])
        insort(self._taken, (start, end))
        self._free = float(self._ends[-1]) - math.fsum(end - start for start, end in self._taken)
        return entry

    def _last_free(self) -> int:
        edge = float(self._ends[-1])
        for start, end in reversed(self._taken):
            if end < edge:
                break
            edge = start
        return int(np.searchsorted(self._ends, edge, side="left"))


def _accumulate(weights: NDArray[np.float64]) -> None:
    """Replace weights by their running sum; roundings add up over blocks, not over entries.

    An entry of 0 repeats the sum before it exactly, also as the first of a block.
    """
    sums = weights.reshape(-1, _BLOCK)
    np.cumsum(sums, axis=1, out=sums)
    sums[1:] += np.cumsum(sums[:-1, -1])[:, None]
