"""The exactness kit: proves that a verification rule changes nothing, without sampling noise.

Every tree that could be drawn and every outcome of every coin are enumerated with their
probabilities, so the law of a rule's output is computed, not estimated, and compared with the
target's own. Nothing of the shipped drawing or verification code takes part: a rule is a function,
yours or one of `redwood.verify`.

    from redwood import testing, verify

    testing.check_exact(verify.traversal, testing.random_cases(seed=0, count=50))

A rule takes `(tree, target_probs [N, V], chance)`, asks `chance.coin(node, probability)` at most
once per node and `chance.draw(probs)` at most once, and returns an `Acceptance`. One that reads
plain `uniforms [N]` instead is wrapped in `bisected`; one that carries something from step to step,
in `Stateful`; one that shares noise with the target is checked by `check_coupled`.

Drafters and engines are tried on a `TableBackend`, which is a model of a few tokens by table:

    target = testing.TableBackend(vocab_size=12, seed=0)
    engine = redwood.Engine(target, MyDrafter(), budget=8)
    plain = redwood.Engine(target, budget=1)
    assert engine.generate([1, 2]).token_ids == plain.generate([1, 2]).token_ids

Guarantee: a rule that passes is exact on these cases, up to the tolerance. Mistakes known from
published code show up as a total variation of 0.01 to 0.4.
"""

from redwood.testing.cases import Case, Draft, drafts
from redwood.testing.enumeration import ExactnessError, bisected, outcomes
from redwood.testing.exactness import (
    Stateful,
    check_coupled,
    check_exact,
    expected_kept,
    law,
    target_law,
    total_variation,
)
from redwood.testing.generation import random_cases
from redwood.testing.toy import TableBackend

__all__ = [
    "Case",
    "Draft",
    "ExactnessError",
    "Stateful",
    "TableBackend",
    "bisected",
    "check_coupled",
    "check_exact",
    "drafts",
    "expected_kept",
    "law",
    "outcomes",
    "random_cases",
    "target_law",
    "total_variation",
]
