"""Trees of hundreds of nodes: quick ways against simple ones, and whole texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from conftest import tiny_llama
from redwood import verify
from redwood.algorithms.acceptance import AcceptanceTable, learn_below
from redwood.algorithms.specinfer import merge_trees
from redwood.backends.base import Nodes
from redwood.backends.eager.backend import _Span
from redwood.backends.eager.slots import Row
from redwood.backends.load import wrap_model
from redwood.drafters.base import ModelDrafter, NgramDrafter, UnionDrafter
from redwood.drafters.context import Context
from redwood.drafters.draft_row import DraftRow
from redwood.drafters.draft_tree import TreeBuilder
from redwood.drafters.vocabulary import DraftVocabulary
from redwood.engine.engine import RowEngine
from redwood.planner.budget import LatencyCorrection, LevelBudget, StepBudget
from redwood.planner.planner import Planner, arms_of
from redwood.profiling.latency import LatencyModel, LatencyPoint
from redwood.sampling import History, SamplingParams, kernels
from redwood.tree import Law, TokenTree, ancestor_mask, children_of

SIZES = (1, 2, 7, 60, 600)
PROMPTS = [[5, 9, 17, 33, 5, 9, 17, 40, 5, 9], list(range(100, 160))]


def flat_curve(ms: float, per_node: float) -> LatencyModel:
    """Times of streamed weights: the pass is dear, a node is not."""
    return LatencyModel(
        tuple(LatencyPoint(1, n, 0, *[ms + per_node * n] * 3) for n in (1, 16, 1024))
    )


def random_parents(rng: np.random.Generator, size: int, roots: float = 0.0) -> list[int]:
    """Parents of a tree, or with `roots` of a forest; deep and wide parts."""
    near = [max(0, node - 1 - int(rng.exponential(4.0))) for node in range(1, size)]
    return [-1, *(-1 if rng.random() < roots else parent for parent in near)]


def random_tree(rng: np.random.Generator, size: int, laws: Sequence[Law]) -> TokenTree:
    """Few tokens, so that siblings are often equal; drawn nodes from two rows of 40 tokens."""
    parents = random_parents(rng, size)
    chances = [1.0]
    for parent in parents[1:]:
        chances.append(chances[parent] * float(rng.random()))
    return TokenTree(
        torch.tensor([3, *rng.integers(4, size=size - 1)]),
        torch.tensor(parents),
        torch.tensor(rng.choice(laws, size=size), dtype=torch.int8),
        torch.tensor(rng.integers(2, size=size)),
        torch.tensor(rng.random((2, 40))),
        None,
        chances,
    )


def ancestors(parents: Sequence[int], node: int) -> set[int]:
    found = set()
    while node >= 0:
        found.add(node)
        node = parents[node]
    return found


@pytest.mark.parametrize("size", SIZES)
def test_a_mask_of_the_last_nodes_shows_their_ancestors(size: int) -> None:
    rng = np.random.default_rng(size)
    for roots in (0.0, 0.2, 1.0):
        parents = random_parents(rng, size, roots)
        above = [ancestors(parents, node) for node in range(size)]
        want = np.array([[j in above[i] for j in range(size)] for i in range(size)])
        np.testing.assert_array_equal(ancestor_mask(parents), want)
        for last in {1, size // 2 or 1, size}:
            np.testing.assert_array_equal(ancestor_mask(parents, last), want[-last:])


@pytest.mark.parametrize("window", [None, 3, 20])
def test_the_attention_mask_is_that_of_every_slot_by_itself(window: int | None) -> None:
    parents = random_parents(np.random.default_rng(1), 90, 0.1)
    row = Row()
    row.length = 11
    row.parents, row.depths = row.grown(Nodes(0, range(90), parents), 200)
    mask = _Span(row, Nodes(0, range(30), parents[-30:]), 0).mask(window, 2, torch.zeros(1))
    assert mask is not None and mask.shape == (1, 1, 60, 101)
    for i, node in enumerate(range(60, 90)):
        seen = [True] * 11 + [j in ancestors(parents, node) for j in range(90)]
        if window is not None:
            places = [*range(11), *(11 + depth for depth in row.depths)]
            near = [place > 11 + row.depths[node] - window for place in places]
            seen = [a and b for a, b in zip(seen, near, strict=True)]
        want = torch.where(torch.tensor(seen), 0.0, -torch.inf)
        assert torch.equal(mask[0, 0, i], want) and torch.equal(mask[0, 0, 30 + i], want)


def simple_merge(trees: Sequence[TokenTree]) -> list[tuple[int, int, int, int]]:
    """(token, parent, law, draft row) of the merged nodes, siblings compared one by one."""
    made = [(trees[0].token_list[0], -1, 0, -1)]
    for number, tree in enumerate(trees):
        place = [0]
        for node in range(1, len(tree)):
            token, law = tree.token_list[node], tree.law_list[node]
            parent, row = place[tree.parent_list[node]], tree.draft_row_list[node]
            joined = [
                i
                for i, (other, above, other_law, _) in enumerate(made)
                if (other, above) == (token, parent)
                and (law == Law.POINT or law == Law.COUPLED and other_law in (0, Law.COUPLED))
            ]
            place.append(joined[0] if joined else len(made))
            if not joined:
                made.append((token, parent, law, row + 2 * number))
    return made


@pytest.mark.parametrize("laws", [[Law.POINT], [Law.POINT, Law.COUPLED], list(Law)])
def test_merged_trees_join_what_a_look_at_every_sibling_would(laws: list[Law]) -> None:
    rng = np.random.default_rng(len(laws))
    for size in SIZES:
        trees = [random_tree(rng, size, laws), random_tree(rng, 1 + size // 2, laws)]
        got = merge_trees(trees)
        lists = got.token_list, got.parent_list, got.law_list, got.draft_row_list
        assert list(zip(*lists, strict=True)) == simple_merge(trees)
        chances = got.estimates or []
        assert all(chances[n] <= chances[p] for n, p in enumerate(got.parent_list) if n)


def test_learning_and_following_meet_the_nodes_that_a_scan_meets() -> None:
    rng = np.random.default_rng(5)
    for size in SIZES:
        tree = random_tree(rng, size, [Law.POINT])
        tokens, parents = tree.token_list, tree.parent_list
        bins = rng.integers(-1, 6, size=size).tolist()
        news = [*(tokens[node] for node in tree.path(size - 1)[1:]), 1, 2]
        quick, slow = AcceptanceTable([0.5] * 6), AcceptanceTable([0.5] * 6)
        depth, at = learn_below(news, children_of(parents).__getitem__, tokens, bins, [quick]), 0
        for step, token in enumerate(news):
            below = [node for node in range(size) if parents[node] == at]
            for node in below:
                if bins[node] >= 0:
                    slow.count(bins[node], tokens[node] == token)
            hits = [node for node in below if tokens[node] == token]
            if not hits:
                assert depth == step
                break
            at = hits[-1]
        assert quick.to_dict() == slow.to_dict()

        row, path, at = DraftRow(0), [], -1
        for node, edge in enumerate(zip(parents, tokens, strict=True)):
            row.below.setdefault(edge, node)
        for token in (*tokens[:1], *news):
            hits = [n for n in range(size) if parents[n] == at and tokens[n] == token]
            if not hits:
                break
            path.append(at := hits[0])
        assert row.follow([*tokens[:1], *news]) == path


def test_a_dynamic_tree_keeps_its_best_nodes_as_cutting_the_whole_tree_would() -> None:
    params = SamplingParams()
    context = Context(1, [4, 5, 6], params, History([4, 5, 6]), 5000)
    rates, known = np.linspace(0.05, 0.95, 16).tolist(), DraftVocabulary(5000)
    for budget in (2, 12, 200):
        growing = TreeBuilder(context, Law.POINT, None, budget, 10_000, rates, known)
        generator = torch.Generator().manual_seed(budget)
        for level in range(6):
            nodes = growing.candidates()
            rows = torch.randn(len(nodes), 5000, generator=generator) * 4.0
            growing.expand(level, nodes, rows, 256)
        whole = TokenTree.point(growing.tokens, growing.parents, growing.estimates)
        best = sorted(range(len(whole)), key=lambda node: -growing.estimates[node])[:budget]
        want, got = whole.kept(sorted(best)), growing.finish()
        assert len(whole) > budget == len(got)
        assert (got.token_list, got.parent_list) == (want.token_list, want.parent_list)
        assert got.estimates == want.estimates and got.law_list == want.law_list


@pytest.mark.parametrize("size", [5, 300, 8192, 50_001])
def test_the_largest_values_of_a_row_are_those_of_a_sort(size: int) -> None:
    rng = np.random.default_rng(size)
    rough = rng.integers(6, size=size).astype(np.float32)  # ties: the lowest ids first
    masked = np.where(rng.random(size) < 0.01, rng.standard_normal(size), -np.inf)
    crowded = np.zeros(size, np.float32)
    crowded[3::64] = 1.0 + rng.random(len(crowded[3::64]), dtype=np.float32)
    for row in (rng.standard_normal(size).astype(np.float32), rough, masked, crowded):
        for count in (1, 3, min(size, 40), min(size, 256)):
            values, ids = kernels.top(row, count)
            want = np.argsort(-row, kind="stable")[:count]
            np.testing.assert_array_equal(ids, want)
            np.testing.assert_array_equal(values, row[want])


def test_a_row_is_finite_unless_a_value_is_not() -> None:
    for row in (np.zeros(5000, np.float32), np.full(5000, 3e38, np.float32)):
        assert kernels.row_range(row).finite
        for bad in (np.nan, np.inf, -np.inf):
            row[4321] = bad
            assert not kernels.row_range(row).finite


def test_times_of_growing_steps_are_those_of_each_step() -> None:
    step = StepBudget(2, np.cumsum(np.linspace(2.0, 1.0, 60)))
    assert step.growth(5, 80) == [step.of(nodes) for nodes in range(5, 86)]
    points = [LatencyPoint(1, n, c, *[9.0 + n + c / 90] * 3) for n in (1, 8, 40) for c in (0, 900)]
    curve = LatencyModel((*points, LatencyPoint(4, 2, 0, 22.0, 22.0, 22.0)))
    widths, lengths = [3, 1, 20, 5, 9], [7, 0, 300, 20, 40]
    running = list(curve.running(widths, lengths))
    assert running == [curve.ms(widths[:n], lengths[:n]) for n in range(1, 6)]
    assert running[1] == pytest.approx(
        float(curve.times(0, 4)[4]) + running[0] - float(curve.times(0, 3)[3])
        + curve._fit.per_row
    )  # fmt: skip
    correction = LatencyCorrection()
    for nodes in (1, 2, 5, 30, 200):
        correction.learn(nodes, 30.0 + nodes, 20.0)
    times = np.linspace(10.0, 40.0, 300)
    for first in (1, 3, 8):
        shapes = [correction._shape.get((first + i).bit_length(), 0.0) for i in range(300)]
        factors = [np.exp(round(shape, 2)) for shape in shapes]
        want = np.maximum.accumulate(times * factors)
        made = correction.apply(times, first)
        np.testing.assert_allclose(made, want, rtol=1e-15)
        assert correction.apply(times, first) is made


@pytest.mark.parametrize("law", [Law.WITHOUT_REPLACEMENT, Law.WITH_REPLACEMENT])
@pytest.mark.parametrize("rule", [verify.traversal, verify.recursive])
def test_a_few_drafted_tokens_are_taken_off_a_wide_row_as_from_a_whole_one(
    law: Law, rule: Any
) -> None:
    rng, vocab, width = np.random.default_rng(9), 6000, 30
    for _ in range(25):
        parents = random_parents(rng, 40)
        inner = sorted(set(parents[1:]))
        ids = np.stack([rng.choice(vocab, size=width, replace=False) for _ in inner])
        probs = rng.dirichlet(np.full(width, 0.3), size=len(inner))
        rows = [-1, *(inner.index(parent) for parent in parents[1:])]
        tokens = [0]
        for node in range(1, 40):
            earlier = {tokens[i] for i in range(1, node) if parents[i] == parents[node]}
            found = [t for t in ids[rows[node]] if t not in earlier or law != 1]
            tokens.append(int(rng.choice(found)))
        table = 1e-9 + 1e-7 * rng.random((40, vocab))
        for i, node in enumerate(inner):  # much of the target's mass is where drafts are
            table[node, ids[i]] += probs[i] * rng.random(width) ** 2
        table /= table.sum(1, keepdims=True)
        full = np.zeros((len(inner), vocab))
        np.put_along_axis(full, ids, probs, 1)
        laws = [0, *[int(law)] * 39]
        sparse, whole = (
            TokenTree(tokens, parents, laws, rows, *drafted)  # type: ignore[arg-type]
            for drafted in ((probs, ids), (full, None))
        )
        for uniforms in rng.random((20, 40)):
            told: list[list[float]] = [[], []]
            kept = [
                rule(tree, table, _Telling(uniforms, said))
                for tree, said in zip((sparse, whole), told, strict=True)
            ]
            assert kept[0] == kept[1]
            np.testing.assert_allclose(told[0], told[1], rtol=1e-9, atol=1e-12)


class _Telling(verify.Uniforms):
    """Uniforms that write down which chances they were asked about."""

    def __init__(self, values: Any, said: list[float]) -> None:
        super().__init__(values, len(values))
        self._said = said

    def coin(self, node: int, probability: float) -> bool:
        self._said.append(probability)
        return super().coin(node, probability)


# ------------------------------------------------------------------------------ whole texts


def _model(noise: float) -> Any:
    model = tiny_llama(max_position_embeddings=2048)
    torch.manual_seed(7)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * noise * weight.std())
    return wrap_model(model)


def _texts(engine: RowEngine, **params: Any) -> tuple[list[list[int]], int]:
    """Tokens by prompt, and nodes of the largest tree."""
    keys = [engine.add(p, SamplingParams(max_tokens=16, ignore_eos=True, **params))
            for p in PROMPTS]  # fmt: skip
    out: dict[int, list[int]] = {key: [] for key in keys}
    largest = 0
    while engine.busy:
        for step in engine.step():
            out[step.request] += step.token_ids
            largest = max(largest, len(step.tree))
    return list(out.values()), largest


@pytest.mark.parametrize("params", [{}, {"temperature": 0.8, "seed": 3}])
def test_texts_from_trees_of_512_nodes_are_those_of_plain_decoding(params: dict[str, Any]) -> None:
    target = _model(0.0)
    want, _ = _texts(RowEngine(target, budget=1), **params)
    union = UnionDrafter([ModelDrafter(_model(0.08), width=64, max_levels=6), NgramDrafter()])
    got, largest = _texts(RowEngine(target, union, budget=896), **params)  # half of it the model's
    assert got == want and largest > 440

    model = ModelDrafter(_model(0.08), width=64, max_levels=6)
    planner = Planner(model, flat_curve(4000.0, 0.01), {model: flat_curve(0.02, 0.0001)}, most=512)
    got, largest = _texts(RowEngine(target, model, planner=planner), **params)
    assert got == want and largest > 200
    assert [len(arm.models) for arm in arms_of(model)] == [0, 1]


def test_the_pace_of_a_wide_level_is_that_of_adding_offers_one_by_one() -> None:
    rng = np.random.default_rng(2)
    free = (0.1 * rng.random(400)).tolist()
    gains = sorted((0.5 * rng.random(120)).tolist(), reverse=True)
    target, draft = flat_curve(50.0, 0.6).growth([40], 511), flat_curve(1.0, 0.02)
    pace = LevelBudget(StepBudget(1, target), draft, 40, 1.2)
    got = pace.num_expansions(1.0, 1, free, gains, [1] * 120, [1] * 120)
    step = StepBudget(1, target)
    best, best_rate = 0, 0.0
    for count in range(401):
        rate = (1.0 + sum(sorted(free)[400 - count :])) / step.of(1 + count)
        best, best_rate = (count, rate) if rate > best_rate else (best, best_rate)
    gained = 1.0 + sum(sorted(free)[400 - best :])
    rates = [best_rate]
    for offers in range(1, 121):
        ms = 1.2 * draft.ms([1] * offers, [40] * offers) + step.of(1 + best + offers)
        rates.append((gained + sum(gains[:offers])) / ms)
    assert got == int(np.argmax(rates)) > 0
