"""From logits to tokens: parameters, probabilities along a tree path, noise shared by a seed.

Inside: `params` (of a request), `logits` (penalties, truncations, the law of a drafter),
`target_rows` (the target's rows for a tree), `host_rows` (their way to the host), `noise` (draws
and the Gumbel noise of coupled verification), `kernels` (passes over one row of the vocabulary,
native or NumPy). Not here: trees of several nodes are judged in `redwood.verify`. May import:
tree, errors.
"""

from redwood.sampling.logits import (
    History,
    check_finite,
    draft_law,
    probs_from_scores,
    scores,
    top,
)
from redwood.sampling.noise import GumbelNoise, draw
from redwood.sampling.params import VERIFIERS, SamplingParams
from redwood.sampling.target_rows import PathRows

__all__ = [
    "VERIFIERS",
    "GumbelNoise",
    "History",
    "PathRows",
    "SamplingParams",
    "check_finite",
    "draft_law",
    "draw",
    "probs_from_scores",
    "scores",
    "top",
]
