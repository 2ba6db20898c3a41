"""Drafting: a tree for every row that decodes, from the drafter that the planner chose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from redwood.algorithms.specinfer import merge_trees
from redwood.backends.base import Backend
from redwood.drafters.base import Drafter, parts_of
from redwood.drafters.context import Context
from redwood.drafters.limits import NO_LIMITS
from redwood.drafters.proposing import permitted, prefill, proposals, with_forced
from redwood.engine.request import Request
from redwood.engine.stats import Clock
from redwood.planner.planner import Planner, StepPlan, planned
from redwood.profiling.measure import recordings_of
from redwood.tree import TokenTree

_PREDICTED = 8  # least number of nodes of a predicted output


class Drafts(NamedTuple):
    """Requests and their trees, and the plan to learn from, if there is one."""

    requests: Sequence[Request]
    trees: Sequence[TokenTree]
    plan: StepPlan | None


def draft(
    requests: Sequence[Request],
    free_slots: Sequence[int],
    drafter: Drafter,
    planner: Planner | None,
    budget: int,
    clock: Clock,
) -> Drafts:
    """Returns a tree for every request; times of stages are recorded in the clock.

    Args:
        free_slots: nodes that each may have, the root included.
        drafter, budget: where no planner decides.
        planner: not asked where a text may depend on its seed alone: neither what was measured nor
            such a text's company may change it.
    """
    contexts = [request.context for request in requests]
    if max(free_slots) == 1 or any(context.unsteered for context in contexts):
        planner = None
    budgets, most = [min(budget, free) for free in free_slots], max(budget, _PREDICTED)
    plan = None
    if planner is not None:
        known, most = planner.prepared, planner.most
        plan = planned(
            planner, contexts, free_slots, [request.max_new_tokens for request in requests]
        )
        budgets = [1] * len(requests) if plan is None else plan.budgets
        drafter = drafter if plan is None else plan.drafter
        clock.record_stage("draft" if known else "prefill")  # latency is measured once
    drafting = [i for i, nodes in enumerate(budgets) if nodes > 1]
    prefill(drafter, [contexts[i] for i in drafting])
    clock.record_stage("prefill")
    before = recordings_of(*_backends(drafter))
    made = _asked(drafter, contexts, budgets, drafting, plan)
    trees = [
        _with_prediction(request, tree, free, most)
        for request, tree, free in zip(requests, made, free_slots, strict=True)
    ]
    if plan is None or plan.drafted is None:  # the lookahead has done it
        largest = budget if planner is None else planner.most
        trees = [
            with_forced(context, tree, min(free, largest))
            for context, tree, free in zip(contexts, trees, free_slots, strict=True)
        ]
    usual = recordings_of(*_backends(drafter)) == before  # a graph is recorded once
    drafting_s = clock.record_stage("draft" if usual else "prefill")
    if planner is None or plan is None or not usual:
        return Drafts(requests, trees, None)
    return Drafts(requests, planner.trim(plan, trees, drafting_s), plan)


def _asked(
    drafter: Drafter,
    contexts: Sequence[Context],
    budgets: Sequence[int],
    drafting: Sequence[int],
    plan: StepPlan | None,
) -> list[TokenTree]:
    """Trees of the lookahead, if the plan has them, else of the drafter; bare roots else."""
    if plan is not None and plan.drafted is not None:
        made = {i: plan.drafted[i] for i in drafting}
    else:
        limits = NO_LIMITS if plan is None else plan.limits
        asked, sizes = [contexts[i] for i in drafting], [budgets[i] for i in drafting]
        made = dict(zip(drafting, proposals(drafter, asked, sizes, limits), strict=True))
    return [
        made.get(i) or TokenTree.chain(context.token_ids[-1:]) for i, context in enumerate(contexts)
    ]


def _with_prediction(request: Request, tree: TokenTree, free: int, most: int) -> TokenTree:
    """The tree, merged with the next tokens of the request's prediction."""
    prediction = request.context.prediction
    if prediction is None or free == 1:
        return tree
    chain = prediction.tree(tree.token_list[0], min(free - len(tree) + 1, most))
    return merge_trees([tree, permitted(request.context, chain)])


def _backends(drafter: Drafter) -> list[Backend]:
    return [part.backend for part in parts_of(drafter) if hasattr(part, "backend")]
