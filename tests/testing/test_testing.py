"""The exactness kit itself: what it enumerates, what it meets, what it refuses."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from redwood import testing, verify
from redwood.errors import ArgumentError, RedwoodError
from redwood.testing import Case, ExactnessError
from redwood.testing.enumeration import Script, runs
from redwood.tree import Law, TokenTree
from redwood.verify import Acceptance, Chance

POINT, WITHOUT, WITH = Law.POINT, Law.WITHOUT_REPLACEMENT, Law.WITH_REPLACEMENT


def case(parents: list[int], laws: list[int], row: list[float], **changes: Any) -> Case:
    """The same row everywhere, drawn from and aimed at."""
    fields: dict[str, Any] = {"target": lambda path: row, "draft": lambda source, path: row}
    return Case(vocab_size=len(row), parents=parents, laws=laws, **fields | changes)


def drawn(made: Case) -> dict[tuple[int, ...], float]:
    return {tuple(d.tree.token_list[1:]): d.probability for d in testing.drafts(made)}


# ------------------------------------------------------------------ cases and drafts


def test_drafts_follow_their_laws() -> None:
    row = [0.5, 0.3, 0.2]
    assert drawn(case([-1, 0, 0], [0, WITH, WITH], row))[1, 1] == pytest.approx(0.09)
    without = drawn(case([-1, 0, 0], [0, WITHOUT, WITHOUT], row))
    assert without[0, 2] == pytest.approx(0.5 * 0.2 / 0.5) and (0, 0) not in without
    mixed = drawn(case([-1, 0, 0, 0], [0, WITH, POINT, WITHOUT], row))
    assert set(mixed) == {(0, 1, 1), (0, 1, 2), (1, 0, 0), (1, 0, 2), (2, 0, 0), (2, 0, 1)}
    used_up = drawn(case([-1, 0, 0], [0, WITHOUT, WITHOUT], [0.0, 1.0, 0.0]))
    assert used_up == {(1, 0): 0.5, (1, 2): 0.5}
    two_rows = case([-1, 0, 0], [0, WITHOUT, WITHOUT], row, sources=[0, 0, 1])
    assert drawn(two_rows)[0, 0] == pytest.approx(0.25)
    assert [d.tree.draft_row_list for d in testing.drafts(two_rows)][0] == [-1, 0, 1]


def test_drafts_sum_to_one_and_sparse_rows_hold_the_same_law() -> None:
    for made in testing.random_cases(seed=1, count=80):
        assert sum(drawn(made).values()) == pytest.approx(1.0, abs=1e-12)
        dense = testing.drafts(replace(made, sparse=False))
        sparse = testing.drafts(replace(made, sparse=True))
        for one, other in zip(dense, sparse, strict=True):
            for index in {r for r in one.tree.draft_row_list if r >= 0}:
                probs, ids = other.tree.draft_row(index)
                assert ids is not None and probs[-1] == 0.0  # padding is always there
                spread = np.bincount(ids, probs, made.vocab_size)
                np.testing.assert_array_equal(spread, one.tree.draft_row(index).probs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"laws": [0]}, "one entry per node"),
        ({"sources": [0, 0, 0]}, "one entry per node"),
        ({"parents": [-1, 1]}, "precede"),
        ({"parents": [], "laws": []}, "one entry per node"),
        ({"laws": [0, Law.COUPLED]}, "check_coupled"),
        ({"target": lambda path: [0.5, 0.6]}, "sums to"),
        ({"target": lambda path: [1.5, -0.5]}, "bad row"),
        ({"target": lambda path: [1.0]}, "bad row"),
        ({"draft": lambda source, path: [np.nan, 1.0]}, "bad row"),
        ({"parents": [-1, 0, 0, 0], "laws": [0, 1, 1, 1]}, "no token left"),
    ],
)
def test_cases_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    fields: dict[str, Any] = {"parents": [-1, 0], "laws": [0, WITH], "row": [0.5, 0.5]}
    with pytest.raises(ArgumentError, match=message):
        testing.drafts(case(**fields | changes))


def test_drawn_nodes_need_a_draft_row() -> None:
    with pytest.raises(ArgumentError, match="no draft row"):
        testing.drafts(Case(vocab_size=2, parents=[-1, 0], laws=[0, 2], target=lambda p: [1, 0]))


def test_random_cases_depend_on_seed_and_index_only() -> None:
    few, many = (list(testing.random_cases(seed=5, count=count)) for count in (5, 9))
    other = list(testing.random_cases(seed=6, count=5))
    assert [c.name for c in few] == [c.name for c in many[:5]]
    for one, same, another in zip(few, many, other, strict=False):
        path = (0, 1)
        np.testing.assert_array_equal(one.target_row(path), same.target_row(path))
        assert one.name != another.name
    for changes in ({"seed": -1}, {"vocab_sizes": [1]}, {"max_nodes": -1}):
        with pytest.raises(ArgumentError):
            next(testing.random_cases(**{"seed": 0, "count": 1} | changes))  # type: ignore[arg-type]


def test_random_cases_meet_the_corners() -> None:
    met: Counter[str] = Counter()
    for made in testing.random_cases(seed=2402, count=200):
        size = len(made.parents)
        p, q = made.target_row(()), made.draft_row(0, ())
        below = [n for n in range(1, size) if made.parents[n] == 0]
        rows = {(made.parents[n], made.sources[n]) for n in range(1, size) if made.laws[n]}
        met["root alone"] += size == 1
        met["chain of three"] += size > 3 and made.levels == size
        met["five nodes"] += size >= 6
        met["mixed laws at a node"] += len({made.laws[n] for n in below}) > 1
        met["two rows at a node"] += len(rows) > len({parent for parent, _ in rows})
        met["sparse"] += made.sparse and bool(rows)
        met["equal"] += bool((p == q).all())
        met["nearly equal"] += bool(0.0 < np.abs(p - q).max() < 1e-8)
        met["disjoint"] += not (p * q).any()
        met["one-hot target"] += p.max() == 1.0
        met["one-hot draft"] += q.max() == 1.0
        met["zeros in the target"] += bool(((p == 0.0) & (q > 0.0)).any() and p.max() < 1.0)
        met["zeros in the draft"] += bool(((q == 0.0) & (p > 0.0)).any() and q.max() < 1.0)
        met["tiny"] += bool(((p > 0.0) & (p < 1e-290)).any())
        ratios = (p[q > 1e-9] / q[q > 1e-9]).round(12)
        met["equal ratios"] += len(set(ratios)) < len(ratios) and not (p == q).all()
        met[f"V = {made.vocab_size}"] += 1
        for _, tree, _ in testing.drafts(made):
            for node, children in enumerate(tree.children):
                tokens = [tree.token_list[c] for c in children]
                met["equal siblings"] += len(set(tokens)) < len(tokens)
                for n in children:
                    row = made.draft_row(made.sources[n], path(tree, node))
                    met["uniform fallback"] += (
                        made.laws[n] == WITHOUT and row[tree.token_list[n]] == 0.0
                    )
    assert min(met.values()) >= 2, met


def path(tree: TokenTree, node: int) -> tuple[int, ...]:
    return tuple(tree.token_list[i] for i in tree.path(node)[1:])


# ------------------------------------------------------------------ enumeration


def test_all_runs_are_made_once_with_their_probabilities() -> None:
    def program(script: Script) -> tuple[int, ...]:
        first = script.choose([0.25, 0.0, 0.75])
        return (first, script.choose([0.5, 0.5])) if first else (first,)

    assert list(runs(program)) == [(0.25, (0,)), (0.375, (2, 0)), (0.375, (2, 1))]


ROOT = Acceptance([0], 0)


def coin_twice(tree: TokenTree, rows: np.ndarray, chance: Chance) -> Acceptance:
    chance.coin(1, 0.5)
    chance.coin(1, 0.5)
    return ROOT


def draw_twice(tree: TokenTree, rows: np.ndarray, chance: Chance) -> Acceptance:
    return Acceptance([0], chance.draw(rows[0]) * chance.draw(rows[0]))


def no_chance(tree: TokenTree, rows: np.ndarray, chance: Chance) -> Acceptance:
    chance.coin(1, float("nan"))
    return ROOT


def no_mass(tree: TokenTree, rows: np.ndarray, chance: Chance) -> Acceptance:
    return Acceptance([0], chance.draw(0.0 * rows[0]))


def no_path(tree: TokenTree, rows: np.ndarray, chance: Chance) -> Acceptance:
    return Acceptance([0, 2], 0)


def no_token(tree: TokenTree, rows: np.ndarray, chance: Chance) -> Acceptance:
    return Acceptance([0], 2)


def without_root(tree: TokenTree, rows: np.ndarray, chance: Chance) -> Acceptance:
    return Acceptance([1], 0)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (coin_twice, "asked twice"),
        (draw_twice, "drawn twice"),
        (no_chance, "probability nan"),
        (no_mass, "drawn from"),
        (no_path, "no path"),
        (no_token, "no path"),
        (without_root, "no path"),
    ],
)
def test_a_rule_that_breaks_the_contract_is_named(rule: Any, message: str) -> None:
    made = case([-1, 0, 1], [0, WITH, WITH], [0.5, 0.5], name="the chain")
    with pytest.raises(ExactnessError, match=message) as caught:
        testing.check_exact(rule, [made])
    assert caught.value.__notes__ == ["in the chain"]


def test_a_rule_with_chance_of_its_own_is_found_out() -> None:
    own = np.random.default_rng(0)

    def rule(tree: TokenTree, rows: np.ndarray, chance: Chance) -> Acceptance:
        chance.coin(1, float(own.random()))
        return Acceptance([0], chance.draw(rows[0]))

    with pytest.raises(ExactnessError, match="own chance"):
        testing.check_exact(rule, [case([-1, 0], [0, WITH], [0.5, 0.5])])


def test_errors_of_the_kit_are_assertions_and_errors_of_redwood() -> None:
    assert issubclass(ExactnessError, AssertionError) and issubclass(ExactnessError, RedwoodError)


def test_bisection_finds_the_volumes_of_boxes() -> None:
    tree, rows = TokenTree.point([0, 0, 0], [-1, 0, 0]), np.full((3, 4), 0.25)

    def rule(tree: TokenTree, rows: np.ndarray, uniforms: np.ndarray) -> Acceptance:
        if uniforms[2] < 0.3 and uniforms[1] >= 1 / 7:
            return Acceptance([0, 2], 0)
        return Acceptance([0], int(4 * uniforms[0]))

    found = testing.outcomes(testing.bisected(rule), tree, rows)
    by_answer = {(tuple(a.nodes), a.next_token): weight for weight, a in found}
    kept = 0.3 * 6 / 7
    expected = {((0, 2), 0): kept} | {((0,), t): (1 - kept) / 4 for t in range(4)}
    assert by_answer == pytest.approx(expected, abs=1e-14)


def test_one_number_used_for_every_node_is_rejected() -> None:
    def rule(tree: TokenTree, rows: np.ndarray, uniforms: np.ndarray) -> Acceptance:
        return verify.recursive(tree, rows, np.full(len(tree), uniforms[-1]))

    made = case([-1, 0], [0, WITH], [0.5, 0.5], target=lambda path: [0.8, 0.2])
    assert testing.total_variation(testing.bisected(rule), made) > 0.03


# ------------------------------------------------------------------ laws and checks


def test_law_of_a_rule_that_drafts_nothing_is_the_target_law() -> None:
    def rule(tree: TokenTree, rows: np.ndarray, chance: Chance) -> Acceptance:
        return Acceptance([0], chance.draw(rows[0]))

    made = next(testing.random_cases(seed=3, count=1, vocab_sizes=[3]))
    for length in (1, 2, 3):
        expected = testing.target_law(made, length)
        assert expected.shape == (3,) * length
        np.testing.assert_allclose(testing.law(rule, made, length=length), expected, atol=1e-15)
    assert testing.expected_kept(rule, made) == 0.0
    np.testing.assert_allclose(
        testing.target_law(made, 2)[1], made.target_row(())[1] * made.target_row((1,)), atol=1e-15
    )


def test_total_variation_is_the_distance_of_known_laws() -> None:
    def always_zero(tree: TokenTree, rows: np.ndarray, chance: Chance) -> Acceptance:
        return ROOT

    made = case([-1], [0], [0.3, 0.7])
    assert testing.total_variation(always_zero, made) == pytest.approx(0.7)
    with pytest.raises(ExactnessError, match=r"total variation 0\.7 > 1e-12 in the worst"):
        testing.check_exact(
            always_zero, [case([-1], [0], [0.9, 0.1]), replace(made, name="the worst")]
        )
    assert testing.check_exact(always_zero, [made], tolerance=0.8) == pytest.approx(0.7)


def test_no_cases_are_no_proof() -> None:
    with pytest.raises(ArgumentError, match="no cases"):
        testing.check_exact(verify.traversal, [])


def test_state_is_fresh_for_every_run_and_lasts_for_its_steps() -> None:
    class Counting:
        def __init__(self) -> None:
            self.steps = 0

        def __call__(self, tree: TokenTree, rows: np.ndarray, chance: Chance) -> Acceptance:
            self.steps += 1
            return Acceptance([0], self.steps % 2)

    law = testing.law(testing.Stateful(Counting), case([-1], [0], [0.5, 0.5]), steps=3)
    assert law[1, 0, 1] == 1.0


def test_fifty_random_cases_find_common_mistakes() -> None:
    def wrong_tag(tree: TokenTree, rows: np.ndarray, chance: Chance) -> Acceptance:
        laws = np.where(tree.laws == WITH, WITHOUT, tree.laws)
        return verify.traversal(replace(tree, laws=laws), rows, chance)

    def other_temperature(tree: TokenTree, rows: np.ndarray, chance: Chance) -> Acceptance:
        changed = (
            tree if tree.draft_probs is None else replace(tree, draft_probs=tree.draft_probs**2)
        )
        return verify.recursive(changed, rows, chance)

    def bonus_from_target(tree: TokenTree, rows: np.ndarray, chance: Chance) -> Acceptance:
        class Bonus:
            coin = staticmethod(chance.coin)

            def draw(self, probs: np.ndarray) -> int:
                return -1

        nodes, _ = verify.traversal(tree, rows, Bonus())
        return Acceptance(nodes, chance.draw(rows[nodes[-1]]))

    for rule in (wrong_tag, other_temperature, bonus_from_target):
        with pytest.raises(ExactnessError, match="total variation 0.[1-9]"):
            testing.check_exact(rule, testing.random_cases(seed=0, count=50))
