"""Where a token comes from chance: shared noise, the choice by it, and the draw by a uniform."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from redwood.sampling import kernels
from redwood.sampling._kernels_numpy import uniforms
from redwood.sampling.kernels import Row


class GumbelNoise:
    """Gumbel noise keyed by (seed, absolute position): a counter-based generator (Philox).

    Calling it with a position gives a float64 row [V] that depends on nothing else, so drafter and
    target see the same noise, and so does plain decoding. Source: shared-noise coupling of
    Daliri et al. (arXiv 2408.07978) and GLS (2506.05632).
    """

    def __init__(self, seed: int, vocab_size: int) -> None:
        self.key, self._size = seed % 2**64, vocab_size

    def at(self, position: int, ids: NDArray[np.int64]) -> Row:
        """Returns the noise of these tokens [M] at a position, without making the row."""
        return gumbel(kernels.uniforms_at(self.key, position, ids))

    def __call__(self, position: int) -> Row:
        return gumbel(uniforms(self.key, position, self._size))


def gumbel(values: Row) -> Row:
    """Returns Gumbel noise from uniforms in (0, 1)."""
    # NOTE: a token's noise must have the same bits in any row and on any processor.
    return -kernels.log(-kernels.log(values))


def draw(probs: Row, uniform: float) -> int:
    """Returns the token at `uniform` in [0, 1) of cumulative `probs` [V], which need not sum to 1.

    Never a token of zero probability. Monotone: each token owns one interval of uniforms, in order.
    """
    token = kernels.draw(probs, uniform)
    if token >= len(probs) or probs[token] <= 0.0:  # rounding at the upper end
        token = int(np.flatnonzero(probs > 0.0)[-1])
    return token


def coupled_choice(probs: Row, noise: Row) -> int:
    """Returns the arg-max of log probs + noise, both float64 [V]; lowest id among equals."""
    ids = np.flatnonzero(probs > 0.0)
    return int(ids[np.argmax(kernels.log(probs[ids]) + noise[ids])])
