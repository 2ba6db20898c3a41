"""The tree that Sequoia's program chooses for measured times, and how fast it then is.

    time per token = (t(n) + levels x draft time) / expected tokens

t(n) is the measured time of one target pass, the draft time is measured per level in the engine,
and the expected tokens follow from measured acceptance rates. What the engine does beside is not in
the prediction: it is the difference that this part shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from subjects import Subject

from redwood.algorithms.sequoia import choose_tree, optimal_tree
from redwood.bench.interleave import PLAIN, Candidate, Run, alternate, run
from redwood.bench.report import quartiles
from redwood.engine.engine import Step
from redwood.sampling import SamplingParams
from redwood.tree import children_of, depths_of

_WIDE = (0.6, 0.2, 0.1, 0.05)  # rates of the tree that acceptance is measured with
_MAX_LEVELS = 8


def plan(
    subject: Subject, times: Mapping[int, float], params: SamplingParams, size: int
) -> dict[str, Any]:
    """Returns the planned tree for the model drafter, with predicted and measured speed.

    Args:
        times: ms of one target pass by number of nodes; must have 1.
        size: nodes of the tree that acceptance and draft time are measured with.
    """
    parents = optimal_tree(_WIDE, size, max_levels=_MAX_LEVELS)
    rates, draft_ms = acceptance(subject, parents, params)
    chosen = choose_tree(rates, times, draft_ms, max_levels=_MAX_LEVELS)
    subject.prepare([1, 2, 4, 8, chosen.size], params.max_tokens)
    drafter = subject.drafter("model", chosen.parents)
    candidates = [PLAIN, Candidate("model", drafter, chosen.size)]
    plain, ours = alternate(subject.graphs, candidates, subject.prompts, params)
    speeds = [[each[0].stats.tokens_per_s for each in own] for own in (plain, ours)]
    ratios = [b / a for a, b in zip(*speeds, strict=True)]
    return {
        "temperature": params.temperature,
        "acceptance": rates,
        "draft_ms_per_level": draft_ms,
        "plain_ms": times[1],
        "size": chosen.size,
        "levels": chosen.levels,
        "parents": chosen.parents,
        "predicted_tokens_per_pass": chosen.expected_tokens,
        "measured_tokens_per_pass": _tokens_per_pass([each[0] for each in ours]),
        "predicted_tokens_per_s": 1e3 / chosen.time_per_token,
        "measured_tokens_per_s": median(speeds[1]),
        "predicted_over_plain": chosen.speedup,
        "measured_over_plain": median(ratios),
        "measured_over_plain_quartiles": quartiles(ratios),
        "measured_plain_tokens_per_s": median(speeds[0]),
    }


def acceptance(
    subject: Subject, parents: Sequence[int], params: SamplingParams
) -> tuple[list[float], float]:
    """Returns how often the k-th child is the accepted one, and draft ms per level.

    Counted at every node of an accepted path that has a k-th child.
    """
    candidate = Candidate("model", subject.drafter("model", parents), len(parents))
    reached, taken = [0] * len(parents), [0] * len(parents)

    def count(step: Step) -> None:
        children = children_of(step.tree.parent_list)
        for node, after in zip(step.nodes, [*step.nodes[1:], -1], strict=True):
            for rank, child in enumerate(children[node]):
                reached[rank] += 1
                taken[rank] += child == after

    runs = [run(subject.graphs, candidate, prompt, params, count) for prompt in subject.prompts]
    levels = 1 + max(depths_of(parents))  # as the formula counts them: with the root
    drafts = sum(each.stats.num_drafts for each in runs)
    draft_s = sum(each.stats.seconds["draft"] for each in runs)
    rates = [t / r for t, r in zip(taken, reached, strict=True) if r]
    return rates, 1e3 * draft_s / max(1, drafts * levels)


def _tokens_per_pass(runs: Sequence[Run]) -> float:
    tokens = sum(each.stats.num_generated_tokens for each in runs)
    return tokens / sum(each.stats.target_passes for each in runs)
