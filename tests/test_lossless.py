"""Proof that verification changes nothing: exact laws by enumeration, and mistakes that must fail.

The negative controls are mistakes found in published code or easily made; each is a few lines and
states the least total variation with which the kit must reject it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from redwood import testing, verify
from redwood.testing import Case, ExactnessError
from redwood.testing.enumeration import Rule
from redwood.tree import Law, TokenTree
from redwood.verify import Acceptance, Chance

POINT, WITHOUT, WITH = Law.POINT, Law.WITHOUT_REPLACEMENT, Law.WITH_REPLACEMENT
RULES = {"traversal": verify.traversal, "recursive": verify.recursive}
LAWS = {
    "point": [POINT],
    "without replacement": [WITHOUT],
    "with replacement": [WITH],
    "mixed": [POINT, WITHOUT, WITH],
}
PAIR, STAR, CHAIN, FORK = (-1, 0, 0), (-1, 0, 0, 0), (-1, 0, 1, 2), (-1, 0, 0, 1, 2)


@cache
def cases(laws: str) -> list[Case]:
    return list(testing.random_cases(seed=2402, count=200, laws=LAWS[laws], max_runs=600))


@pytest.mark.parametrize("laws", LAWS)
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_keeps_the_target_law_for_every_law_of_drafts(rule: str, laws: str) -> None:
    testing.check_exact(RULES[rule], cases(laws), tolerance=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_two_steps_in_a_row_keep_the_target_law(rule: str) -> None:
    two = [fixed_case((-1, 0, 0), WITHOUT, size=2), fixed_case((-1, 0, 1), WITH, size=2)]
    testing.check_exact(RULES[rule], two, steps=2)


@pytest.mark.parametrize("rule", RULES)
def test_plain_uniforms_give_the_law_that_scripted_chance_gives(rule: str) -> None:
    some = [fixed_case((-1, 0, 0), WITHOUT), fixed_case((-1, 0, 1), WITH, size=2)]
    some += [replace(fixed_case((-1, 0, 0, 1), POINT), laws=(0, POINT, WITHOUT, POINT))]
    for case in some:
        by_script = testing.law(RULES[rule], case)
        by_bisection = testing.law(testing.bisected(RULES[rule]), case)
        np.testing.assert_allclose(by_bisection, by_script, rtol=0, atol=1e-13)
        assert testing.total_variation(testing.bisected(RULES[rule]), case) < 1e-12


def test_coupled_verification_gives_the_text_of_plain_seeded_decoding() -> None:
    for laws in LAWS:
        testing.check_coupled(verify.coupled, cases(laws)[:100])


def test_coupled_text_does_not_depend_on_nodes_removed_after_drawing() -> None:
    rng = np.random.default_rng(5)
    for case in cases("point")[:40]:
        table = rng.gumbel(size=(case.levels, case.vocab_size))
        (draft,) = testing.drafts(case)
        whole = text(draft.tree, verify.coupled(draft.tree, draft.target_probs, table.__getitem__))
        keep = [n for n in range(len(draft.tree)) if n == 0 or rng.random() < 0.5]
        keep = [n for n in keep if set(draft.tree.path(n)) <= set(keep)]
        pruned, rows = only(draft.tree, keep), draft.target_probs[keep]
        part = text(pruned, verify.coupled(pruned, rows, table.__getitem__))
        assert whole[: len(part)] == part


def test_greedy_equals_the_other_rules_where_the_target_is_certain() -> None:
    for case in cases("mixed")[:60]:
        sure = replace(case, target=lambda path, case=case: one_hot(case.target_row(path)))
        for draft in testing.drafts(sure):
            rows = draft.target_probs
            expected = text(draft.tree, verify.greedy(draft.tree, lambda n: int(rows[n].argmax())))  # noqa: B023
            for rule in RULES.values():
                found = testing.outcomes(rule, draft.tree, rows)
                assert {text(draft.tree, got) for weight, got in found if weight > 1e-12} == {
                    expected
                }


# ------------------------------------------------------------------ helpers of the controls


def fixed_case(parents: Sequence[int], law: Law, *, size: int = 3, top: bool = False) -> Case:
    """Rows that depend on the path; `top`: POINT nodes are the draft's best tokens."""

    def row(stream: int, path: tuple[int, ...]) -> np.ndarray:
        return np.random.default_rng([7, stream, *path]).dirichlet(np.ones(size))

    def best(node: int, path: tuple[int, ...], siblings: tuple[int, ...]) -> int:
        return int(np.argsort(-row(1, path), kind="stable")[len(siblings)])

    laws = (0, *[law] * (len(parents) - 1))
    target, draft = lambda path: row(0, path), lambda source, path: row(1 + source, path)
    case = Case(vocab_size=size, parents=parents, laws=laws, target=target, draft=draft)
    return replace(case, choose=best) if top else case


def one_hot(row: np.ndarray) -> np.ndarray:
    return np.eye(len(row))[row.argmax()]


def text(tree: TokenTree, got: Acceptance) -> tuple[int, ...]:
    return (*(tree.token_list[n] for n in got.nodes[1:]), got.next_token)


def only(tree: TokenTree, keep: list[int]) -> TokenTree:
    """The tree without the other nodes."""
    place = {node: i for i, node in enumerate(keep)} | {-1: -1}
    parents = torch.tensor([place[tree.parent_list[n]] for n in keep])
    columns = tree.token_ids[keep], parents, tree.laws[keep], tree.draft_rows[keep]
    return TokenTree(*columns, tree.draft_probs, tree.draft_ids)


def as_law(law: Law) -> Rule:
    """Shipped verification of a tree with wrong tags."""
    return lambda tree, rows, chance: verify.traversal(
        replace(tree, laws=torch.full_like(tree.laws, law)), rows, chance
    )


class OldNumbers:
    """Chance from numbers already used: `known` holds what their earlier use has told of them."""

    def __init__(self, chance: Chance, known: dict[int, tuple[float, float]]) -> None:
        self._chance, self._known = chance, known

    def coin(self, node: int, probability: float) -> bool:
        low, high = self._known.get(node, (0.0, 1.0))
        share = min(1.0, max(0.0, (probability - low) / (high - low)))
        below = self._chance.coin(node, share)
        self._known[node] = (
            (low, min(high, probability)) if below else (max(low, probability), high)
        )
        return below

    def draw(self, probs: np.ndarray) -> int:
        low, high = self._known.get(0, (0.0, 1.0))
        borders = np.concatenate([[0.0], probs.cumsum() / probs.sum()]).clip(low, high)
        token = self._chance.draw(np.diff(borders))
        self._known[0] = (borders[token], borders[token + 1])
        return token


Change = Callable[..., float | np.ndarray]


def reference(
    *,
    ratio: Change = lambda p, q, x, r: r * p[x] / q[x],
    rest: Change = lambda p, q, r: np.maximum(r * p - q, 0.0),
    weight: Change = lambda left, r, q, x: left / (left + 1.0 - r) if left else 0.0,
    bonus: Change = lambda rest, p: rest,
    used_up: Change = lambda gone: ~gone,
    leaf_to_root: bool = True,
) -> Rule:
    """The building block in its plainest form, for draws without replacement or chains.

    Each argument is a place where one may go wrong.
    """

    def rule(tree: TokenTree, rows: np.ndarray, chance: Chance) -> Acceptance:
        def walk(node: int, path: list[int], r: float) -> Acceptance | None:
            p, by_row = rows[node], np.zeros((len(tree), rows.shape[1]), dtype=bool)
            for child in tree.children[node]:
                x, index = tree.token_list[child], tree.draft_row_list[child]
                (q, ids), gone = tree.draft_row(index), by_row[index]
                q = np.bincount(ids, q, len(p)) if ids is not None else q
                q = np.where(gone, 0.0, q)
                q = q if q.any() else np.asarray(used_up(gone), dtype=float)
                q = q / q.sum() if q.any() else q
                kept = min(1.0, float(ratio(p, q, x, r))) if p[x] and r else 0.0
                if leaf_to_root or chance.coin(child, kept):
                    got = walk(child, [*path, child], kept if leaf_to_root else 1.0)
                    if got:
                        return got
                left = np.asarray(rest(p, q, r))
                r = min(1.0, float(weight(left.sum(), r, q, x))) if r < 1.0 else 1.0
                p = left / left.sum() if left.any() else p
                gone[x] |= tree.law_list[child] == WITHOUT
            if node and leaf_to_root and not chance.coin(node, r):
                return None
            return Acceptance(path, chance.draw(np.asarray(bonus(p, rows[node]))))

        got = walk(0, [0], 1.0)
        assert got is not None
        return got

    return rule


@pytest.mark.parametrize("leaf_to_root", [True, False])
def test_the_reference_without_a_mistake_is_exact(leaf_to_root: bool) -> None:
    rule = reference(leaf_to_root=leaf_to_root)
    testing.check_exact(rule, cases("without replacement")[:60])
    testing.check_exact(rule, [fixed_case(CHAIN, WITH), fixed_case(STAR, WITH)])


# ------------------------------------------------------------------ negative controls


def other_temperature(tree: TokenTree, rows: np.ndarray, chance: Chance) -> Acceptance:
    assert tree.draft_probs is not None
    sharper = tree.draft_probs**2
    return verify.traversal(replace(tree, draft_probs=sharper), rows, chance)


def ratio_for_top_k(case: Case) -> Rule:
    def rule(tree: TokenTree, rows: np.ndarray, chance: Chance) -> Acceptance:
        law, draft_rows = torch.full_like(tree.laws, WITHOUT), torch.zeros(len(tree))
        probs = torch.tensor(case.draft_row(0, ()))[None]
        told = replace(tree, laws=law, draft_rows=draft_rows.long(), draft_probs=probs)
        return verify.recursive(told, rows, chance)

    return rule


def drafting_noise_reused(tree: TokenTree, rows: np.ndarray, chance: Chance) -> Acceptance:
    known = {}
    for node in range(1, len(tree)):
        borders = np.cumsum([0.0, *tree.draft_row(tree.draft_row_list[node]).probs])
        known[node] = tuple(borders[tree.token_list[node] :][:2])
    return verify.recursive(tree, rows, OldNumbers(chance, known))


def with_numbers_kept() -> Rule:
    known: dict[int, tuple[float, float]] = {}
    return lambda tree, rows, chance: verify.recursive(tree, rows, OldNumbers(chance, known))


def best_of_those_drawn(tree: TokenTree, rows: np.ndarray, chance: Chance) -> Acceptance:
    probs = [tree.draft_row(0).probs[x] for x in tree.token_list]
    keep = [0, *sorted(sorted(range(1, len(tree)), key=lambda n: -probs[n])[:2])]
    nodes, token = verify.traversal(only(tree, keep), rows[keep], chance)
    return Acceptance([keep[n] for n in nodes], token)


def uncapped_joint_ratio(tree: TokenTree, rows: np.ndarray, chance: Chance) -> Acceptance:
    """Block verification, but the last node is kept with the product of all ratios, uncapped."""
    q = [tree.draft_row(i).probs for i in range(len(tree) - 1)]
    capped, joint = [1.0], 1.0
    for i, x in enumerate(tree.token_list[1:]):
        joint *= rows[i][x] / q[i][x]
        capped.append(min(1.0, capped[-1] * rows[i][x] / q[i][x]))
    last = len(tree) - 1
    if chance.coin(last, min(1.0, joint)):
        return Acceptance(list(range(last + 1)), chance.draw(rows[last]))
    for i in range(last - 1, -1, -1):
        rest = np.maximum(capped[i] * rows[i] - q[i], 0.0)
        if i == 0 or chance.coin(i, rest.sum() / (rest.sum() + 1.0 - capped[i] + 1e-300)):
            return Acceptance(list(range(i + 1)), chance.draw(rest if rest.any() else rows[i]))
    raise AssertionError


SHORT = replace(
    fixed_case(STAR, WITHOUT),
    draft=lambda source, path: [1.0, 0.0, 0.0],
    name="a draft row with one token",
)
TOP = fixed_case((-1, 0, 0), POINT, top=True)
CONTROLS: dict[str, tuple[Rule, Case, float]] = {
    # The stored row is not the one drawn from: temperature or top-k applied afterwards.
    "row at another temperature": (other_temperature, fixed_case(FORK, WITHOUT), 0.10),
    # Tokens chosen without chance, judged as if drawn.
    "ratio rule on top-k": (ratio_for_top_k(TOP), TOP, 0.20),
    # The weight of a node after a refusal: S / (1 - q(x)) instead of S / (S + 1 - r).
    "weight S / (1 - q)": (
        reference(weight=lambda left, r, q, x: left / (1.0 - q[x] + 1e-300)),
        fixed_case(FORK, WITHOUT),
        0.04,
    ),
    # A whole chain accepted by its joint ratio: an early surplus pays for a later deficit.
    "uncapped joint ratio": (uncapped_joint_ratio, fixed_case(CHAIN, WITH), 0.05),
    # The number that drew a token also judges it.
    "drafting noise reused": (drafting_noise_reused, fixed_case(CHAIN, WITH), 0.10),
    # Drawn many, kept the best: the survivors were not drawn from the row.
    "sampled nodes dropped": (best_of_those_drawn, fixed_case(STAR, WITH), 0.08),
    # After a refusal everything goes on from p, as if nothing had been tried.
    "no residual": (
        reference(rest=lambda p, q, r: p, leaf_to_root=False),
        fixed_case(PAIR, WITHOUT),
        0.04,
    ),
    # Siblings are judged rightly, but the extra token comes from p.
    "extra token from p": (
        reference(bonus=lambda rest, p: p, leaf_to_root=False),
        fixed_case(PAIR, WITHOUT),
        0.03,
    ),
    # Leaf-to-root weights with the residual of the root-to-leaf rule.
    "residual without weight": (
        reference(rest=lambda p, q, r: np.maximum(p - q, 0.0)),
        fixed_case(CHAIN, WITH),
        0.20,
    ),
    "with replacement judged as without": (as_law(WITHOUT), fixed_case(STAR, WITH), 0.08),
    "without replacement judged as with": (as_law(WITH), fixed_case(STAR, WITHOUT), 0.06),
    # The draft's probability is not at hand, so something else stands for it.
    "draft probability p(argmax)": (
        reference(ratio=lambda p, q, x, r: r * p[x] / p.max(), leaf_to_root=False),
        fixed_case(CHAIN, WITH),
        0.15,
    ),
    "draft probability 1": (
        reference(ratio=lambda p, q, x, r: r * p[x], leaf_to_root=False),
        fixed_case(CHAIN, WITH),
        0.08,
    ),
    # A draft row used up by earlier siblings: the token is taken as if it had been sure.
    "uniform fallback missing": (
        reference(
            used_up=lambda gone: np.zeros(len(gone)),
            ratio=lambda p, q, x, r: r * p[x] / q[x] if q[x] else 1.0,
            leaf_to_root=False,
        ),
        SHORT,
        0.08,
    ),
}


@pytest.mark.parametrize("mistake", CONTROLS)
def test_mistake_is_rejected(mistake: str) -> None:
    rule, case, bound = CONTROLS[mistake]
    assert testing.total_variation(rule, case) > bound
    with pytest.raises(ExactnessError, match="total variation"):
        testing.check_exact(rule, [case])


def test_random_numbers_reused_in_the_next_step_are_rejected() -> None:
    case, reused = fixed_case((-1, 0), WITH, size=2), testing.Stateful(with_numbers_kept)
    assert testing.total_variation(reused, case) < 1e-12  # one step alone cannot show it
    assert testing.total_variation(reused, case, steps=2) > 0.2
    with pytest.raises(ExactnessError, match="total variation"):
        testing.check_exact(reused, [case], steps=2)


def test_noise_of_the_wrong_position_is_rejected() -> None:
    def rule(tree: TokenTree, rows: np.ndarray, noise: verify.Noise) -> Acceptance:
        return verify.coupled(tree, rows, lambda depth: noise(max(0, depth - 1)))

    with pytest.raises(ExactnessError, match="plain decoding"):
        testing.check_coupled(rule, [fixed_case(CHAIN, WITH)])
