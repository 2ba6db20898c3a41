"""Models by table that agree with `TableBackend` more often than not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from redwood.testing import TableBackend


class NoisyTable(TableBackend):
    """The table of a target with noise on its logits: often right, often wrong.

    Args:
        noise: standard deviation of what is added; 0: it is the target itself.
        noise_seed: two of the same are the same model.
    """

    def __init__(
        self,
        vocab_size: int = 300,
        *,
        capacity: int = 256,
        noise: float = 0.3,
        noise_seed: int = 7,
        **options: Any,
    ) -> None:
        super().__init__(vocab_size, capacity=capacity, **options)
        self._noise = None
        if noise:
            self._noise = TableBackend(vocab_size, seed=noise_seed, spread=noise)

    def logits(self, text: Sequence[int]) -> Tensor:
        """Returns the logits after a text, float32 [V]."""
        right = super().logits(text)
        return right if self._noise is None else right + self._noise.logits(text)
