"""One request as drafters see it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from redwood.drafters.prediction import Prediction
from redwood.sampling import GumbelNoise, History, SamplingParams
from redwood.sampling.constraint import Constraint


@dataclass
class Context:
    """One request as drafters see it.

    Args:
        key: identifies the request.
        token_ids: prompt and output; the last one is the tree's root. Owned by the engine.
        params, history: of the request.
        vocab_size: of the target.
        rng: random numbers for drafting and verification, in turns.
        noise: shared noise of coupled requests, else None.
        prediction: the expected answer, or None.
    """

    key: int
    token_ids: list[int]
    params: SamplingParams
    history: History
    vocab_size: int
    rng: np.random.Generator = field(default_factory=np.random.default_rng)
    noise: GumbelNoise | None = None
    prediction: Prediction | None = None

    @cached_property
    def constraint(self) -> Constraint | None:
        """The request's logits processor, where that says what it allows and forces."""
        processor = self.params.logits_processor
        return processor if isinstance(processor, Constraint) else None

    @property
    def unsteered(self) -> bool:
        """Whether the shape of its trees may not depend on learned rates or measured times.

        With a seed and without coupling, the text depends on the trees, so these may depend on
        nothing but the seed.
        """
        params = self.params
        return params.temperature > 0.0 and params.seed is not None and not params.coupled
