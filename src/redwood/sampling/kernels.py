"""Passes over whole rows of the vocabulary: compiled where that was built, else NumPy's.

A row is long (V = 152k), so each function reads it once or twice. None uses torch, whose threads
would wake for such a row and then spin beside those of the native backend. Weights are
probabilities times a common mass; the largest weight of a fresh row is 1.
"""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from redwood.sampling import _kernels_numpy as reference
from redwood.sampling._kernels_numpy import AnyRow as AnyRow
from redwood.sampling._kernels_numpy import Row as Row

try:
    from redwood import _native

    _native.best_few  # noqa: B018  # an extension built from older sources lacks these functions
    compiled = True
except (ImportError, AttributeError):
    compiled = False

_GROUP, _FEWEST_GROUPS = 128, 64  # of a row whose largest values are looked for
_MANY = 8  # times as many values as are looked for: too many to be sorted


class Range(NamedTuple):
    """The lowest and highest value of a row, NaN if any is NaN, and the highest's first place."""

    low: float
    high: float
    best: int

    @property
    def finite(self) -> bool:
        """Whether no value is NaN or infinite."""
        return math.isfinite(self.low) and math.isfinite(self.high)


def row_range(row: AnyRow) -> Range:
    """Returns what a row [V] of any strides holds."""
    if compiled and len(row):
        return Range(*_native.row_range(_contiguous(row)))
    best = int(row.argmax())
    low = float(row.min())
    return Range(low, low, 0) if math.isnan(low) else Range(low, float(row[best]), best)


def best_few(rows: AnyRow, count: int) -> tuple[NDArray[np.int32], NDArray[np.float32]] | None:
    """Returns the `count` best tokens of every row [N, V] of logits, and their probabilities.

    Probabilities have an error of some 0.001: they rate drafts.

    Args:
        count: at most V.

    Returns: ids and probabilities [N, count], best first, of equals the lower id; None where any
    value is NaN or infinite.
    """
    ids = np.empty((len(rows), count), np.int32)
    probs = np.empty((len(rows), count), np.float32)
    if compiled and rows.dtype == np.float32 and rows.strides[1] == rows.itemsize:
        finite = _native.best_few(cast(NDArray[np.float32], rows), ids, probs)
    else:
        finite = reference.best_few(rows, ids, probs)
    return (ids, probs) if finite else None


def _contiguous(row: AnyRow) -> AnyRow:
    return row if row.flags.c_contiguous else row.copy()


def weigh(row: AnyRow, high: float, temperature: float) -> tuple[Row, float]:
    """Returns weights exp((row - high) / temperature), float64 [V], and their sum.

    Args:
        row: [V], its largest value being `high`, a finite number; -inf has weight 0.
        temperature: above 0. What lies below exp(-708) has weight 0.
    """
    out = np.empty(len(row))
    if compiled:
        return out, _native.weigh(_contiguous(row), high, temperature, out)
    return out, reference.weigh(row, high, temperature, out)


def truncate(weights: Row, mass: float, top_k: int, top_p: float, min_p: float) -> float:
    """Sets weights to 0 in place by top-k, top-p, then min-p; returns the mass of the others.

    Args:
        weights: [V], the largest being 1; `mass` is their sum.
        top_k, top_p, min_p: as in `SamplingParams`; 0, 1.0 and 0.0 are off. Ties at a border stay.
    """
    if compiled:
        return _native.truncate(weights, mass, min(top_k, len(weights)), top_p, min_p)
    return reference.truncate(weights, mass, top_k, top_p, min_p)


def draw(weights: Row, uniform: float) -> int:
    """Returns the first token whose running sum exceeds `uniform` of the whole; V if none does."""
    if compiled and len(weights):
        return _native.draw(np.ascontiguousarray(weights), uniform)
    return reference.draw(weights, uniform)


def gumbel_candidates(weights: Row, key: int, position: int) -> tuple[NDArray[np.int64], Row]:
    """Returns the few tokens that may have the largest log(weight) + Gumbel noise, ascending.

    The choice among them is left to the caller's exact numbers, so the winner is that of all [V].

    Args:
        weights: [V], at least one above 0.
        key, position: of the noise, below 2^64.

    Returns: ids int64 [M], and their uniforms, float64 [M].
    """
    if compiled:
        tokens, uniforms = _native.race(weights, key, position)
        return np.array(tokens, np.int64), np.array(uniforms)
    return reference.gumbel_candidates(weights, key, position)


def uniforms_at(key: int, position: int, tokens: NDArray[np.int64]) -> Row:
    """Returns the uniforms in (0, 1) of these tokens at a position, float64 [M]."""
    if not compiled:
        return reference.uniforms_at(key, position, tokens)
    out = np.empty(len(tokens))
    _native.uniforms_at(key, position, np.ascontiguousarray(tokens, np.int64), out)
    return out


def log(values: Row) -> Row:
    """Returns the logarithms of numbers [M] that are 0 or positive and finite, float64.

    The same bits on every processor; those of `np.log` depend on it.
    """
    if not compiled:
        return reference.log(values)
    out = np.empty(len(values))
    _native.log(np.ascontiguousarray(values, np.float64), out)
    return out


def top(row: AnyRow, count: int) -> tuple[AnyRow, NDArray[np.int64]]:
    """Returns the `count` largest values of [V] and their ids, largest first, then lowest id.

    All of them where `count` is V or more.
    """
    count = min(count, len(row))
    if count <= 0:
        return row[:0], np.empty(0, np.int64)
    groups = len(row) // _GROUP
    some = row
    if groups >= max(count, _FEWEST_GROUPS):
        # A value per group, the largest: the `count`-th of these is no more than that of all.
        some = row[: groups * _GROUP].reshape(_GROUP, groups).max(axis=0)
    ids = np.flatnonzero(row >= _rank(some, count))
    if len(ids) > _MANY * count:
        ids = ids[row[ids] >= _rank(row[ids], count)]
    ids = ids[np.argsort(-row[ids], kind="stable")[:count]]
    return row[ids], ids


def _rank(values: AnyRow, count: int) -> float:
    """The `count`-th largest value."""
    return float(np.partition(values, len(values) - count)[len(values) - count])
