"""From logits to tokens: parameters, probabilities along a tree path, noise shared by a seed.

Inside: `logits` (parameters, penalties and truncations, the rows of a tree), `host_rows` (their
way to the host), `noise` (draws and the Gumbel noise of coupled verification), `kernels` (passes
over one row of the vocabulary, native or NumPy). Not here: trees of several nodes are judged in
`redwood.verify`. May import: tree, errors.
"""

from redwood.sampling.logits import (
    VERIFIERS,
    GumbelNoise,
    History,
    PathRows,
    SamplingParams,
    check_finite,
    draft_law,
    draw,
    probs_from_scores,
    scores,
    top,
)

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
