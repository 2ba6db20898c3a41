"""The planner: arms by what they give, trees by what they cost, texts untouched by either."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pytest
from scipy.stats import chisquare

from planner_kit import (
    PROMPTS,
    VOCAB,
    InOrder,
    ScriptedClock,
    TimedTable,
    answers,
    arms_used,
    curve,
    drafter_of,
    law_after,
    planner_for,
    simulate,
)
from redwood.algorithms.specinfer import merge_trees
from redwood.drafters.base import ModelDrafter, NgramDrafter, NoDrafter, UnionDrafter
from redwood.drafters.context import Context
from redwood.engine.engine import RowEngine
from redwood.errors import ArgumentError
from redwood.planner.budget import LatencyCorrection, LevelBudget, StepBudget
from redwood.planner.planner import Planner, arms_of
from redwood.sampling import History, SamplingParams
from redwood.testing import TableBackend
from redwood.tree import Law, TokenTree


@pytest.mark.parametrize("name", ["ngram", "model", "union"])
@pytest.mark.parametrize("slope", [0.01, 3.0])
def test_text_equals_plain_decoding(name: str, slope: float, clock: ScriptedClock) -> None:
    target, drafter = TimedTable(clock, slope), drafter_of(name, clock)
    engine = RowEngine(target, drafter, planner=planner_for(drafter, slope))
    for params in ({"temperature": 0.0}, {"temperature": 0.8, "seed": 3}):
        plain = answers(RowEngine(target), PROMPTS, **params)
        assert answers(engine, PROMPTS, **params) == plain
        assert [answers(engine, [p], **params)[0] for p in PROMPTS] == plain


@pytest.mark.usefixtures("clock")
def test_a_clock_too_coarse_for_a_pass_costs_no_request() -> None:
    target, drafter = TableBackend(VOCAB, capacity=256), drafter_of("union")  # no time passes
    engine = RowEngine(target, drafter, planner=planner_for(drafter))
    plain = answers(RowEngine(target), PROMPTS, temperature=0.0)
    assert answers(engine, PROMPTS, temperature=0.0) == plain


def test_a_drafter_with_a_shorter_context_is_filled_to_its_last_slot(clock: ScriptedClock) -> None:
    target, model = TimedTable(clock, 0.01), drafter_of("model", clock, capacity=70, noise=0.0)
    engine = RowEngine(target, model, planner=planner_for(model, 0.01, 1e-3))
    plain = answers(RowEngine(target), PROMPTS, temperature=0.0, max_tokens=80)
    assert answers(engine, PROMPTS, temperature=0.0, max_tokens=80) == plain


def test_a_seed_without_coupling_gives_one_text_whatever_was_learned(clock: ScriptedClock) -> None:
    target, drafter = TimedTable(clock, 0.1), drafter_of("union", clock)
    engine = RowEngine(target, drafter, planner=planner_for(drafter), budget=8)
    params = {"temperature": 0.9, "seed": 5, "verifier": "traversal"}
    first = answers(engine, PROMPTS[:1], **params)
    answers(engine, PROMPTS * 3, temperature=0.9)
    assert answers(engine, PROMPTS[:1], **params) == first
    assert answers(engine, PROMPTS, **params)[:1] == first


@pytest.mark.parametrize("name", ["model", "union"])
def test_two_tokens_follow_the_targets_law(name: str, clock: ScriptedClock) -> None:
    target, runs = TimedTable(clock, 0.01, vocab_size=12), 1000
    drafter = drafter_of(name, clock, vocab_size=12, noise=1.0)
    models = {model: curve(1e-5, 1e-4) for model in arms_of(drafter)[-1].models}
    planner = InOrder(drafter, curve(0.01), models)
    engine = RowEngine(target, drafter, planner=planner, max_rows=250)
    prompt = [3, 4, 5, 3, 4, 6, 3, 4]
    settings = SamplingParams(max_tokens=2, temperature=0.9)
    tokens: dict[int, list[int]] = {engine.add(prompt, settings): [] for _ in range(runs)}
    drafted = 0
    while engine.busy:
        for step in engine.step():
            tokens[step.request] += step.token_ids
            drafted += len(step.tree) - 1
    assert drafted > runs / 4
    want = np.zeros((12, 12))
    for first, second in np.ndindex(12, 12):
        after = law_after(target, [*prompt, first], 0.9)
        want[first, second] = law_after(target, prompt, 0.9)[first] * after[second]
    seen = np.zeros((12, 12))
    for first, second in tokens.values():
        seen[first, second] += 1
    cells = want.ravel() * runs
    big = cells >= 5
    observed = np.append(seen.ravel()[big], seen.ravel()[~big].sum())
    expected = np.append(cells[big], cells[~big].sum())
    assert chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-4


def test_arms_are_plain_decoding_the_parts_and_all_together() -> None:
    names = [arm.drafter.name for arm in arms_of(drafter_of("union"))]
    assert names == ["none", "model", "ngram", "model+ngram"]
    assert [arm.drafter.name for arm in arms_of(NgramDrafter())] == ["none", "ngram"]
    assert [arm.drafter.name for arm in arms_of(NoDrafter())] == ["none"]


class Toy:
    """A drafter of some name, of which a simulation says what it gives."""

    def __init__(self, name: str) -> None:
        self.name, self.draws = name, False

    def propose(self, contexts: Sequence[Context], budgets: Sequence[int]) -> list[TokenTree]:
        return NoDrafter().propose(contexts, budgets)

    def release(self, key: int) -> None:
        """Forgets nothing: it knows nothing."""


def simulated(*names: str, slope: float = 0.1, draft: float = 1.0) -> Planner:
    """A planner of a model, of something else, or of both; n-grams would look ahead."""
    parts = [ModelDrafter(TableBackend()) if name == "model" else Toy(name) for name in names]
    return planner_for(parts[0] if len(parts) == 1 else UnionDrafter(parts), slope, draft)


def test_the_arm_with_most_tokens_per_time_is_used() -> None:
    gives = {"none": (1, 0.0), "model": (3, 4.0), "toy": (2, 0.1), "model+toy": (3, 14.0)}
    used = arms_used(simulate(simulated("model", "toy"), gives, 300))
    assert used[100:].count("model") > 165


def test_a_useless_drafter_costs_a_few_passes_and_then_one_percent() -> None:
    gives = {"none": (1, 0.0), "model": (1, 20.0)}
    used = arms_used(simulate(simulated("model", slope=2.0), gives, 1000))
    believed = 4 * 20.0  # before it is known
    assert used.count("model") * 20.0 <= believed + 16 * 10.0 + 0.01 * 1000 * 10.0


def test_reading_prompts_for_tries_is_bounded_as_well() -> None:
    planner = simulated("model", slope=2.0, draft=30.0)
    reading = 30.0 + 49 * 3.0
    gives, tries = {"none": (1, 0.0), "model": (1, 0.5)}, 0
    for _ in range(400):
        tries += "model" in arms_used(simulate(planner, gives, 5))
        planner.release(1)
    assert 1 <= tries and tries * reading <= 16 * 10.0 + 0.01 * 400 * 5 * 10.0


def test_a_better_arm_is_found_after_the_text_changed() -> None:
    planner = simulated("toy")
    simulate(planner, {"none": (1, 0.0), "toy": (1, 2.0)}, 300)
    used = arms_used(simulate(planner, {"none": (1, 0.0), "toy": (4, 2.0)}, 300))
    assert used[-100:].count("toy") > 90


@pytest.mark.parametrize("name", ["model", "toy"])
def test_an_arm_that_keeps_losing_is_tried_again_within_64_steps(name: str) -> None:
    used = arms_used(simulate(simulated(name), {"none": (1, 0.0), name: (1, 0.1)}, 800))
    tried = [step for step, arm in enumerate(used) if arm == name]
    waits = [after - before for before, after in zip(tried, tried[1:], strict=False)]
    assert max(waits) == 64 and used.count("none") > 600


def test_what_was_known_of_a_request_is_forgotten_with_it() -> None:
    few = {"none": (1, 0.0), "model": (3, 4.0), "toy": (2, 0.1), "model+toy": (3, 14.0)}
    many = {**few, "model": (9, 4.0)}

    def plans_of(second: int) -> list[tuple[int, float | None, float]]:
        """The first text's rate is not that of all texts; the next one's number is the second's."""
        planner = simulated("model", "toy")
        simulate(planner, few, 40, key=7)
        simulate(planner, many, 20, key=1)
        planner.release(1)
        plans = simulate(planner, few, 60, key=second)
        return [(plan.arm, plan.best_ms, planner.predicted_ms) for plan in plans]

    assert plans_of(1) == plans_of(2)


def test_trimming_keeps_drawn_nodes_and_the_best_of_the_others() -> None:
    tree = TokenTree(
        token_ids=[0, 1, 2, 3, 4],
        parents=[-1, 0, 0, 1, 3],
        laws=[0, Law.WITHOUT_REPLACEMENT, Law.POINT, Law.POINT, Law.POINT],
        draft_rows=[-1, 0, -1, -1, -1],
        draft_probs=[[0.1, 0.9]],
        estimates=[1.0, 0.5, 0.9, 0.1, 0.05],
    )
    times = StepBudget(1, np.array([10.0, 10.0, 12.0, 20.0, 40.0]))
    (kept,) = times.trim([tree], 0.0)
    assert kept.token_list == [0, 1, 2]
    assert times.nodes == 3
    (same,) = StepBudget(1, np.full(5, 10.0)).trim([tree], 0.0)
    assert same is tree


def test_trimming_two_trees_is_the_best_of_all_cuts() -> None:
    trees = [
        TokenTree.point([0, 1, 2, 3], [-1, 0, 1, 1], [1.0, 0.8, 0.6, 0.1]),
        TokenTree.point([0, 1, 2], [-1, 0, 0], [1.0, 0.4, 0.3]),
    ]
    values = np.array([10.0, 11.0, 13.0, 16.0, 20.0, 25.0])
    free = [(t, n) for t, tree in enumerate(trees) for n in range(1, len(tree))]
    cuts = [c for size in range(len(free) + 1) for c in combinations(free, size)]
    rates = [
        (2 + sum((trees[t].estimates or [])[n] for t, n in cut)) / (values[len(cut)] + 3.0)
        for cut in cuts
    ]
    kept = StepBudget(2, values).trim(trees, 3.0)
    tokens = sum(sum(tree.estimates or []) for tree in kept)
    assert tokens / (values[sum(map(len, kept)) - 2] + 3.0) == pytest.approx(max(rates))


def test_chances_go_through_a_union_and_siblings_share_their_parents() -> None:
    contexts = [Context(1, PROMPTS[0] * 3, SamplingParams(temperature=0.0), History([]), 300)]
    (tree,) = drafter_of("union").propose(contexts, [12])
    assert tree.estimates is not None and len(tree) > 4
    for node, children in enumerate(tree.children):
        assert sum(tree.estimates[c] for c in children) <= tree.estimates[node] + 1e-9


def test_a_drawn_node_cannot_be_left_out() -> None:
    tree = TokenTree([0, 1], [-1, 0], [0, Law.WITHOUT_REPLACEMENT], [-1, 0], [[0.5, 0.5]])
    with pytest.raises(ArgumentError, match="drawn"):
        tree.kept([0])
    chain = TokenTree.chain([0, 1, 2])
    for wrong in ([], [1], [0, 2], [0, 2, 1]):
        with pytest.raises(ArgumentError):
            chain.kept(wrong)


@pytest.mark.parametrize(
    ("times", "node_ms"),
    [
        ([10.0, 11.0, 12.0, 14.0, 16.0], 2.0),  # as over the last half
        ([10.0, 12.0, 14.0, 14.0, 14.0], 1.0),  # which is flat: as over the whole
        ([10.0, 10.0, 10.0], 2.5),  # all flat: in proportion, with two roots
        ([10.0], 5.0),
    ],
)
def test_nodes_past_the_table_of_times_are_never_free(times: list[float], node_ms: float) -> None:
    step, last = StepBudget(2, np.array(times)), 2 + len(times) - 1
    assert step.of(last) == times[-1]
    assert step.of(last + 3) == pytest.approx(times[-1] + 3 * node_ms)
    assert step.growth(last, 2) == pytest.approx(
        [times[-1], times[-1] + node_ms, times[-1] + 2 * node_ms]
    )
    assert step.growth(last + 4, 1) == [step.of(last + 4), step.of(last + 5)]


def test_a_chain_merged_on_a_full_tree_is_trimmed_where_it_does_not_pay() -> None:
    sure = TokenTree.point(list(range(16)), range(-1, 15), [0.97**i for i in range(16)])
    rest = TokenTree.point([0, *range(100, 115)], range(-1, 15), [1.0] + [0.002] * 15)
    step = StepBudget(1, curve(1.0, 20.0).growth([10], 15))
    (kept,) = step.trim([merge_trees([sure, rest])], 0.0)
    assert kept.token_list == sure.token_list
    free = StepBudget(1, curve(1e-9, 20.0).growth([10], 15))
    assert len(free.trim([merge_trees([sure, rest])], 0.0)[0]) == 31


def test_levels_are_drafted_while_they_pay() -> None:
    def num_expansions(gain: float, level_ms: float) -> int:
        step = StepBudget(1, np.full(9, 10.0))
        return LevelBudget(step, curve(0.0, level_ms), 50, 1.0).num_expansions(
            1.0, 1, [], [gain], [1], [1]
        )

    assert num_expansions(0.9, 1.0) == 1
    assert num_expansions(0.05, 1.0) == 0
    assert num_expansions(0.9, 12.0) == 0


def test_the_rows_with_most_to_gain_draft_on() -> None:
    step = StepBudget(3, np.array([30.0, 31.0, 36.0, 60.0]))
    pace = LevelBudget(step, curve(0.5, 2.0), 50, 1.0)
    assert pace.num_expansions(3.0, 3, [], [0.9, 0.8, 0.1], [1, 1, 1], [1, 1, 1]) == 2


def test_rows_that_draft_nothing_take_their_part_of_the_pass() -> None:
    def num_expansions(idle: int, rows: int) -> int:
        step = StepBudget(3, np.array([30.0, 31.0, 40.0, 80.0, 200.0]))
        pace = LevelBudget(step, curve(0.0, 1.5), 50, 1.0, idle)
        return pace.num_expansions(rows, rows, [], [0.9, 0.6], [1, 1], [1, 1])

    assert num_expansions(2, 1) == num_expansions(0, 3) == 1
    step = StepBudget(3, np.array([30.0, 31.0]))
    assert step.growth(1, 2) == step.growth(3, 2) == [30.0, 31.0, 32.0]  # rows asked one by one


def test_the_machines_speed_is_told_from_the_curves_shape() -> None:
    correction, times = LatencyCorrection(), np.array([10.0, 10.0, 10.0, 10.0])
    for _ in range(200):  # everything twice as slow, and 4 nodes dearer still
        for nodes, ms in ((1, 20.0), (4, 26.0)):
            said = correction.apply(times, 1)[nodes - 1]
            correction.learn(nodes, ms, float(said))
    said = correction.apply(times, 1)
    assert said[3] / said[0] == pytest.approx(1.3, rel=0.05)
    assert correction.speed * said[0] == pytest.approx(20.0, rel=0.2)
