"""The reference of `redwood.sampling.kernels`, and what runs where nothing was compiled.

`src/native/sampling.cpp` does the same operations on float64 in the same order, so that a text does
not depend on whether the extension is there.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Row = NDArray[np.float64]
AnyRow = NDArray[np.float32] | NDArray[np.float64]

_SUMS = 64  # partial sums: entry i goes to sum i % 64
_BLOCK = 1 << 13  # entries whose temporaries stay in the cache
_SHIFT = 6755399441055744.0  # 1.5 * 2^52: adding it rounds to whole numbers
_FACTORIALS = (
    *(6227020800, 479001600, 39916800, 3628800, 362880, 40320, 5040, 720, 120, 24, 6, 2, 1, 1),
)
_LOG2_HIGH, _LOG2_LOW = float.fromhex("0x1.62e42fefa38p-1"), float.fromhex("0x1.ef35793c7673p-45")
_ROOT_HALF = float.fromhex("0x1.6a09e667f3bcdp-1")
_LOOKS = (*(2.0**-n for n in (7, 11, 15, 20, 25, 30, 40)), float(np.nextafter(0.0, 1.0)))


def weigh(row: AnyRow, high: float, temperature: float, out: Row) -> float:
    """Writes exp((row - high) / temperature), 0 below exp(-708), to `out`; returns the sum."""
    with np.errstate(over="ignore"):
        for start in range(0, len(row), _BLOCK):
            part = slice(start, start + _BLOCK)
            out[part] = _exp((row[part].astype(np.float64) - high) / temperature)
    return _sum(out)


def best_few(rows: AnyRow, ids: NDArray[np.int32], probs: NDArray[np.float32]) -> bool:
    """Writes the best tokens of every row and their probabilities; False: a value is not finite."""
    if not np.isfinite(rows).all():
        return False
    ids[:] = np.argsort(-rows, axis=1, kind="stable")[:, : ids.shape[1]]
    best = np.take_along_axis(rows, ids, axis=1).astype(np.float64)
    deep = rows.astype(np.float64) - best[:, :1]
    sums = np.exp(deep).sum(axis=1, keepdims=True)
    probs[:] = np.exp(best - best[:, :1]) / sums
    return True


def _exp(x: Row) -> Row:
    """exp of x <= 0: x = k ln 2 + r with a whole k, and the series of exp(r)."""
    at = np.maximum(x, -708.0)
    shifted = at * 1.4426950408889634 + _SHIFT
    k = shifted - _SHIFT
    r = at - k * 6.93147180369123816490e-01
    r -= k * 1.90821492927058770002e-10
    series = np.full_like(r, 1.0 / _FACTORIALS[0])
    for factorial in _FACTORIALS[1:]:
        series *= r
        series += 1.0 / factorial
    power = (shifted.view(np.int64) - np.float64(_SHIFT).view(np.int64) + 1023) << 52
    series *= power.view(np.float64)
    series[x < -708.0] = 0.0
    return series


def log(values: Row) -> Row:
    """Returns logarithms of numbers that are 0 or positive and finite: 2 artanh(f / (2 + f))."""
    part, exponent = np.frexp(values)
    small = part < _ROOT_HALF
    f = np.where(small, part + part, part) - 1.0
    power = (exponent - small).astype(np.float64)
    s = f / (2.0 + f)
    z = s * s
    half = 0.5 * f * f
    series = np.full_like(z, 2.0 / 23.0)
    for odd in range(21, 1, -2):
        series *= z
        series += 2.0 / odd
    low = s * (half + series * z) + power * _LOG2_LOW
    return np.where(values == 0.0, -np.inf, power * _LOG2_HIGH + (f - (half - low)))


def _sum(row: Row) -> float:
    padded = np.zeros((-(-len(row) // _SUMS), _SUMS))
    padded.reshape(-1)[: len(row)] = row
    sums = np.add.reduce(padded, axis=0)
    half = _SUMS // 2
    while half:
        sums[:half] += sums[half : 2 * half]
        half //= 2
    return float(sums[0])


def truncate(weights: Row, mass: float, top_k: int, top_p: float, min_p: float) -> float:
    """Sets weights outside top-k, top-p and min-p to 0; returns the sum of the others."""
    low = 0.0
    some = 0 < top_k < len(weights)
    if some or top_p < 1.0:
        best = _largest(weights, top_k if some else 0, top_p * mass)
        if some:
            if len(best) >= top_k:
                low = float(best[top_k - 1])
                best = best[best >= low]
            mass = float(np.cumsum(best)[-1])
        if top_p < 1.0:
            reached = np.flatnonzero(np.cumsum(best) >= top_p * mass)
            low = float(best[reached[0] if len(reached) else -1])
    weights[~(weights >= max(low, min_p))] = 0.0
    return _sum(weights)


def _largest(weights: Row, count: int, goal: float) -> Row:
    """Positive weights, largest first: `count` of them, or a sum of `goal`; or all."""
    best = weights[:0]
    for low in _LOOKS:
        best = weights[weights >= low]
        if len(best) >= count if count else best.sum() >= goal * (1 + 5e-7):
            break
    return np.sort(best)[::-1]


def draw(weights: Row, uniform: float) -> int:
    """Returns the token at share `uniform` of the running sum; V where rounding leaves none."""
    running = np.cumsum(weights)
    return int(np.searchsorted(running, uniform * running[-1], side="right"))


def uniforms(key: int, position: int, size: int) -> Row:
    """Returns the uniforms of tokens 0 .. size - 1 in (0, 1), float64 [size]."""
    raw = np.random.Philox(key=key, counter=[0, 0, 0, position]).random_raw(size)
    # Midpoints of 2^52 cells: never 0 or 1 (those of 2^53 would round to 1), so both logarithms of
    # the noise are finite.
    return np.asarray(((raw >> np.uint64(12)) + 0.5) * 2.0**-52, dtype=np.float64)


def gumbel_candidates(weights: Row, key: int, position: int) -> tuple[NDArray[np.int64], Row]:
    """Returns the tokens that may have the largest log(weight) + Gumbel noise, and their uniforms.

    As an exponential race: token i arrives at -log(u) / weight >= (1 - u) / weight, and the first
    one wins. The bound spares the logarithms.
    """
    row = uniforms(key, position, len(weights))
    with np.errstate(divide="ignore", over="ignore"):
        least = (1.0 - row) / weights
    near = int(least.argmin())
    # The margin covers all rounding: the winner of the exact comparison is among the tokens.
    limit = -float(log(row[near : near + 1])[0]) / float(weights[near]) * (1 + 1e-9)
    tokens = np.flatnonzero(least <= limit)
    return tokens, row[tokens]


def uniforms_at(key: int, position: int, tokens: NDArray[np.int64]) -> Row:
    """Returns the uniforms of these tokens, float64 [M]."""
    return uniforms(key, position, int(tokens.max(initial=0)) + 1)[tokens]
