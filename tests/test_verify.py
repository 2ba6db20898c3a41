"""Verification piece by piece; the proof that it is exact stands in test_lossless.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from redwood import testing, verify
from redwood.errors import ArgumentError, NumericalError
from redwood.testing import Case
from redwood.tree import Law, TokenTree
from redwood.verify import Acceptance

POINT, WITHOUT, WITH = Law.POINT, Law.WITHOUT_REPLACEMENT, Law.WITH_REPLACEMENT
RULES = [verify.traversal, verify.recursive]
KEEP_ALL, KEEP_NONE = 0.0, float(np.nextafter(1.0, 0.0))
Rule = Callable[..., Acceptance]


class Rows:
    """A table of target rows that notes which of them are read."""

    def __init__(self, table: Any) -> None:
        self.table, self.read = np.asarray(table, dtype=float), list[int]()

    def __getitem__(self, node: int) -> np.ndarray:
        self.read.append(node)
        return self.table[node]


def drawn(tokens: list[int], parents: list[int], law: Law, row: list[float]) -> TokenTree:
    """A tree whose nodes were all drawn from one row."""
    size = len(tokens)
    return TokenTree(tokens, parents, [law] * size, [0] * size, [row])  # type: ignore[arg-type]


def star(p: list[float], q: list[float], law: Law, siblings: int) -> Case:
    """One level; POINT nodes are the best tokens of q."""
    best = np.argsort(-np.array(q), kind="stable").tolist()
    return Case(
        vocab_size=len(p),
        parents=[-1] + [0] * siblings,
        laws=[law] * (siblings + 1),
        target=lambda path: p,
        draft=lambda source, path: q,
        choose=lambda node, path, siblings: int(best[len(siblings)]),
    )


# ------------------------------------------------------------------ what is kept


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("p", "q", "siblings", "with_replacement", "without_replacement", "top"),
    [
        ([0.5, 0.3, 0.2], [0.6, 0.3, 0.1], 2, 0.91, 0.925, 0.8),
        ([0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1], 2, 0.72, 0.764286, 0.3),
        ([0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1], 3, 0.768, 0.840298, 0.6),
        ([1.0, 0.0], [0.5, 0.5], 2, 0.75, 1.0, 1.0),
        ([0.25] * 4, [0.7, 0.1, 0.1, 0.1], 3, 0.7795, 1.0, 0.75),
    ],
)
def test_one_level_is_kept_as_often_as_the_closed_forms_say(
    rule: Rule,
    p: list[float],
    q: list[float],
    siblings: int,
    with_replacement: float,
    without_replacement: float,
    top: float,
) -> None:
    for law, expected in ((WITH, with_replacement), (WITHOUT, without_replacement), (POINT, top)):
        kept = testing.expected_kept(rule, star(p, q, law, siblings))
        assert kept == pytest.approx(expected, abs=5e-7)


def test_traversal_keeps_at_least_what_recursion_keeps() -> None:
    totals = np.zeros(2)
    for laws in ([WITHOUT], [WITH], [POINT, WITHOUT, WITH]):
        for case in testing.random_cases(seed=21, count=60, laws=laws, max_runs=300):
            more, less = (testing.expected_kept(rule, case) for rule in RULES)
            assert more >= less - 1e-12, case.name
            totals += more, less
    assert totals[0] > 1.002 * totals[1]


@pytest.mark.parametrize("size", [2, 3])
def test_traversal_of_a_chain_is_block_verification(size: int) -> None:
    case = Case(
        vocab_size=size,
        parents=[-1, 0, 1, 2],
        laws=[WITH] * 4,
        target=lambda path: np.random.default_rng([1, *path]).dirichlet(np.ones(size)),
        draft=lambda source, path: np.random.default_rng([2, *path]).dirichlet(np.ones(size)),
    )
    for _, tree, p in testing.drafts(case):
        # arXiv 2403.10444: h[i] is the chance to stop at i once nothing longer was kept.
        weight, h = 1.0, [1.0]
        for i, token in enumerate(tree.token_list[1:]):
            weight = min(1.0, weight * p[i][token] / tree.draft_row(i).probs[token])
            h.append(weight)
            if i < 2:
                left = np.maximum(weight * p[i + 1] - tree.draft_row(i + 1).probs, 0.0).sum()
                h[-1] = left / (left + 1.0 - weight)
        expected = [h[i] * np.prod([1.0 - x for x in h[i + 1 :]]) for i in range(4)]
        got = np.zeros(4)
        for probability, (nodes, _) in testing.outcomes(verify.traversal, tree, p):
            got[len(nodes) - 1] += probability
        np.testing.assert_allclose(got, expected, atol=1e-14)


def test_a_first_child_is_kept_by_traversal_as_if_it_had_nothing_below() -> None:
    """On average over what is drawn below it, though not for every single drawing."""
    for case in testing.random_cases(seed=8, count=40, laws=[WITHOUT, WITH], max_runs=300):
        if len(case.parents) == 1:
            continue
        met, kept = np.zeros(case.vocab_size), np.zeros(case.vocab_size)
        for weight, tree, p in testing.drafts(case):
            token = tree.token_list[1]
            met[token] += weight
            for probability, (nodes, _) in testing.outcomes(verify.traversal, tree, p):
                kept[token] += weight * probability * (1 in nodes)
        q = case.draft_row(case.sources[1], ())
        np.testing.assert_allclose(met, q, atol=1e-14)
        np.testing.assert_allclose(kept, np.minimum(q, case.target_row(())), atol=1e-14)


@pytest.mark.parametrize("rule", RULES)
def test_point_trees_keep_the_targets_chance_of_each_path(rule: Rule) -> None:
    for case in testing.random_cases(seed=9, count=40, laws=[POINT], max_runs=300):
        ((_, tree, _),) = testing.drafts(case)
        paths = {tuple(tree.token_list[i] for i in tree.path(n)[1:]) for n in range(1, len(tree))}
        chances = [
            np.prod([case.target_row(path[:i])[token] for i, token in enumerate(path)])
            for path in paths
        ]
        if len(paths) == len(tree) - 1:  # no duplicates
            assert testing.expected_kept(rule, case) == pytest.approx(sum(chances), abs=1e-12)


# ------------------------------------------------------------------ rows and numbers read


def test_only_visited_rows_are_read() -> None:
    tree = drawn([0, 1, 0, 0, 0], [-1, 0, 0, 1, 2], WITH, [0.5, 0.5])
    table = [[0.5, 0.5]] * 5
    for rule, numbers, read in (
        (verify.recursive, KEEP_ALL, [0, 1, 3]),
        (verify.traversal, KEEP_ALL, [0, 1, 3]),
    ):
        rows = Rows(table)
        assert rule(tree, rows, [numbers] * 5).nodes == [0, 1, 3]
        assert rows.read == read
    never = Rows([[1.0, 0.0]] * 5)  # token 1 has no probability: nothing below node 1 matters
    assert verify.traversal(tree, never, [KEEP_ALL] * 5).nodes == [0, 2, 4]
    assert never.read == [0, 2, 4]
    refused = Rows([[0.9, 0.1]] * 5)
    assert verify.recursive(drawn([0, 1, 1, 0, 0], [-1, 0, 0, 1, 2], WITH, [0.5, 0.5]), refused,
                            [KEEP_NONE] * 5) == Acceptance([0], 0)  # fmt: skip
    assert refused.read == [0]


def test_coupled_and_greedy_read_the_rows_of_their_path_only() -> None:
    tree = TokenTree.point([0, 1, 0, 0, 1], [-1, 0, 0, 1, 2])
    rows = Rows([[0.0, 1.0]] * 5)
    got = verify.coupled(tree, rows, lambda depth: np.zeros(2))
    assert (got, rows.read) == (Acceptance([0, 1], 1), [0, 1])
    asked: list[int] = []

    def best(node: int) -> int:
        asked.append(node)
        return 0

    assert verify.greedy(tree, best) == Acceptance([0, 2], 0)
    assert asked == [0, 2]


@pytest.mark.parametrize("rule", RULES)
def test_each_uniform_judges_its_own_node_and_the_first_draws_the_token(rule: Rule) -> None:
    tree = drawn([0, 0, 1], [-1, 0, 0], WITH, [0.5, 0.5, 0.0])
    table = torch.tensor([[0.25, 0.25, 0.5]] * 3)
    assert rule(tree, table, [0.9, 0.49, 0.9]) == Acceptance([0, 1], 2)
    assert rule(tree, table, [0.1, 0.49, 0.9]) == Acceptance([0, 1], 0)
    # Node 1 refused leaves (0, 0, 1) of (1/4, 1/4, 1/2), so node 2 has no chance.
    assert rule(tree, table, [0.1, 0.51, 0.0]) == Acceptance([0], 2)


@pytest.mark.parametrize("rule", RULES)
def test_kinds_of_input_do_not_matter(rule: Rule) -> None:
    rng = np.random.default_rng(3)
    for case in testing.random_cases(seed=4, count=30):
        for _, tree, table in testing.drafts(case)[:5]:
            numbers = rng.random(len(tree))
            expected = rule(tree, table, numbers)
            assert rule(tree, torch.from_numpy(table), torch.from_numpy(numbers)) == expected
            assert rule(tree, Rows(table * 3.0), [*numbers.tolist(), 0.5]) == expected
            assert isinstance(expected.next_token, int) and expected.nodes[0] == 0


@pytest.mark.parametrize("rule", RULES)
def test_sparse_draft_rows_are_judged_as_the_full_ones(rule: Rule) -> None:
    for case in testing.random_cases(seed=6, count=40, laws=[POINT, WITHOUT, WITH], max_runs=200):
        full, sparse = replace(case, sparse=False), replace(case, sparse=True)
        np.testing.assert_allclose(
            testing.law(rule, full), testing.law(rule, sparse), rtol=0, atol=1e-15
        )


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("rule", RULES)
def test_coupled_nodes_are_refused_by_the_ratio_rules(rule: Rule) -> None:
    tree = TokenTree([0, 1, 1], [-1, 0, 1], [0, 0, 3], [-1] * 3)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="use coupled verification"):
        rule(tree, np.full((3, 2), 0.5), np.zeros(3))


@pytest.mark.parametrize("law", [WITHOUT, WITH])
def test_drawn_nodes_are_refused_by_coupled_verification(law: Law) -> None:
    tree = drawn([0, 1], [-1, 0], law, [0.5, 0.5])
    with pytest.raises(ArgumentError, match="POINT and COUPLED nodes only"):
        verify.coupled(tree, np.full((2, 2), 0.5), lambda depth: np.zeros(2))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("numbers", [[], [0.5], [[0.5, 0.5]], 0.5])
def test_too_few_uniforms_are_refused(rule: Rule, numbers: Any) -> None:
    with pytest.raises(ArgumentError, match="a number per node: 2"):
        rule(TokenTree.chain([0, 1]), np.full((2, 2), 0.5), numbers)


@pytest.mark.parametrize("row", [[0.0, 0.0], [np.nan, 1.0], [np.inf, 1.0]])
def test_target_rows_without_a_finite_mass_raise(row: list[float]) -> None:
    for rule in RULES:
        with pytest.raises(NumericalError, match="after node 1"):
            rule(TokenTree.chain([0, 1]), np.array([[0.5, 0.5], row]), np.zeros(2))
    with pytest.raises(NumericalError, match="after node 0"):
        verify.coupled(TokenTree.chain([0]), np.array([row]), lambda depth: np.zeros(2))


@pytest.mark.parametrize("rule", RULES)
def test_draft_rows_without_mass_raise(rule: Rule) -> None:
    for row in ([0.0, 0.0], [np.nan, 1.0]):
        with pytest.raises(NumericalError, match="draft row 0"):
            rule(drawn([0, 1], [-1, 0], WITHOUT, row), np.full((2, 2), 0.5), np.zeros(2))


# ------------------------------------------------------------------ rounding and ties


@pytest.mark.parametrize("rule", RULES)
def test_a_refusal_that_only_rounding_allows_goes_on(rule: Rule) -> None:
    above = float(np.nextafter(0.3, 1.0))
    tree = drawn([0, 0, 1], [-1, 0, 0], WITH, [above, 1.0 - above])
    table = np.array([[0.3, 0.7]] * 3)
    got = testing.outcomes(rule, tree, table)
    assert sum(probability for probability, a in got if a.nodes == [0, 1]) == pytest.approx(1.0)
    # Refused all the same: what is left is the other token, for sure.
    assert {(tuple(a.nodes), a.next_token) for _, a in got if 1 not in a.nodes} <= {
        ((0, 2), 0),
        ((0, 2), 1),
        ((0,), 1),
    }
    assert len(got) > 2
    certain = TokenTree.point([0, 0, 1], [-1, 0, 0])
    for uniform in (KEEP_ALL, KEEP_NONE):
        assert rule(certain, np.array([[1.0, 0.0]] * 3), [uniform] * 3) == Acceptance([0, 1], 0)


def test_coupled_choice_takes_the_lowest_of_equals_and_no_token_without_probability() -> None:
    assert verify.coupled_choice(np.array([0.25, 0.5, 0.5]), np.zeros(3)) == 1
    assert verify.coupled_choice(np.array([0.0, 0.4, 0.6]), np.array([np.inf, 9.0, 0.0])) == 1


def test_first_of_equal_siblings_is_followed() -> None:
    tree = TokenTree.point([0, 1, 1], [-1, 0, 0])
    assert verify.greedy(tree, lambda node: 1).nodes == [0, 1]


@pytest.mark.parametrize("rule", RULES)
def test_a_lone_root_gives_one_token_of_the_target(rule: Rule) -> None:
    table = np.array([[0.2, 0.3, 0.5]])
    assert rule(TokenTree.chain([9]), table, [0.4]) == Acceptance([0], 1)
    assert rule(TokenTree.chain([9]), table, [KEEP_NONE]) == Acceptance([0], 2)


# ------------------------------------------------------------------ arguments that do not fit


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("numbers", ["ab", [np.nan, 0.5], [-0.1, 0.5], [0.5, 2.0]])
def test_uniforms_that_are_none_are_refused(rule: Rule, numbers: Any) -> None:
    with pytest.raises(ArgumentError, match="uniforms"):
        rule(TokenTree.chain([0, 1]), np.full((2, 2), 0.5), numbers)


@pytest.mark.parametrize("rule", RULES)
def test_tokens_and_rows_beyond_the_targets_vocabulary_are_refused(rule: Rule) -> None:
    half = np.full((2, 2), 0.5)
    with pytest.raises(ArgumentError, match="token 7"):
        rule(TokenTree.chain([0, 7]), half, np.zeros(2))
    for row in ([1.0], [0.2, 0.3, 0.5]):
        with pytest.raises(ArgumentError, match="draft row 0"):
            rule(drawn([0, 0], [-1, 0], WITHOUT, row), half, np.zeros(2))
    sparse = replace(drawn([0, 0], [-1, 0], WITHOUT, [0.5, 0.5]), draft_ids=[[0, 9]])
    with pytest.raises(ArgumentError, match="draft row 0"):
        rule(sparse, half, np.zeros(2))
    with pytest.raises(ArgumentError, match="no row for node 1"):
        rule(TokenTree.chain([0, 1]), half[:1], np.zeros(2))
    with pytest.raises(NumericalError, match="below 0"):
        rule(TokenTree.chain([0, 1]), np.array([[-0.5, 1.5]] * 2), np.zeros(2))


@pytest.mark.parametrize("rule", RULES)
def test_tensors_with_gradients_are_read_as_numbers(rule: Rule) -> None:
    half = torch.full((2, 2), 0.5, requires_grad=True)
    tree = replace(drawn([0, 1], [-1, 0], WITHOUT, [0.5, 0.5]), draft_probs=half[:1])
    assert rule(tree, half, torch.tensor([0.1, 0.2], requires_grad=True)).nodes == [0, 1]


def test_noise_may_be_any_row_of_numbers_that_is_long_enough() -> None:
    tree, half = TokenTree.chain([0, 1]), np.full((2, 2), 0.5)
    for row in ([0.0, 1.0], torch.tensor([0.0, 1.0], requires_grad=True), np.array([0, 1])):
        noise: Any = lambda depth, row=row: row  # noqa: E731
        assert verify.coupled(tree, half, noise) == Acceptance([0, 1], 1)
    with pytest.raises(ArgumentError, match="noise"):
        verify.coupled(tree, half, lambda depth: np.zeros(1))
