"""The pure parts of the tables in benchmarks/: shapes, one-level acceptance, recorded laws."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from redwood import verify
from redwood.algorithms.sequoia import expected_tokens
from redwood.sampling import SamplingParams, probs_from_scores
from redwood.testing import Case, drafts, expected_kept, outcomes
from redwood.tree import Law, depths_of

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
RATES = [0.6, 0.2, 0.1, 0.05]


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)


def module(name: str) -> Any:
    return import_module(name)


def rows(count: int, size: int, seed: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.full(size, 0.6), count), rng.dirichlet(np.full(size, 0.6), count)


def draws(children: int, count: int, vocab_size: int) -> Any:
    return module("one_level").Draws(children, count, np.random.default_rng(0), vocab_size)


def one_level_case(p: Any, q: Any, law: Law, children: int) -> Case:
    """A root with children only; POINT ones are the drafter's best tokens."""
    best = np.argsort(-q, kind="stable").tolist()
    return Case(
        vocab_size=len(p),
        parents=[-1] + [0] * children,
        laws=[law] * (children + 1),
        target=lambda path: p,
        draft=lambda source, path: q,
        choose=lambda node, path, siblings: best[len(siblings)],
    )


def enumerated(p: Any, q: Any, law: Law, children: int) -> list[float]:
    """The chance of each rank to be the accepted one, over every draft and every coin."""
    case, rates = one_level_case(p, q, law, children), [0.0] * children
    for drawn in drafts(case):
        table = np.stack([case.target_row(()) for _ in range(children + 1)])
        for chance, acceptance in outcomes(verify.recursive, drawn.tree, table):
            if len(acceptance.nodes) > 1:
                rates[acceptance.nodes[1] - 1] += drawn.probability * chance
    return rates


# ------------------------------------------------------------------------ shapes


def test_chains_share_the_root_and_grow_alike() -> None:
    trees = module("trees")
    assert trees.chains(1, 4) == [-1, 0, 1, 2]
    assert trees.chains(3, 8) == [-1, 0, 0, 0, 1, 2, 3, 4]
    assert trees.chains(4, 3) == [-1, 0, 0]
    assert trees.chains(2, 1) == [-1]


def test_a_complete_tree_fills_level_by_level() -> None:
    trees = module("trees")
    assert trees.complete_tree(2, 7) == [-1, 0, 0, 1, 1, 2, 2]
    assert trees.complete_tree(3, 6) == [-1, 0, 0, 0, 1, 1]
    assert trees.complete_tree(1, 4) == trees.chains(1, 4)


def test_the_value_of_chains_and_complete_trees_has_a_closed_form() -> None:
    trees = module("trees")
    one_chain = 1 + 0.6 + 0.6**2
    assert expected_tokens(trees.chains(1, 4), RATES) == pytest.approx(one_chain + 0.6**3)
    assert expected_tokens(trees.chains(2, 7), RATES) == pytest.approx(1 + 0.8 * one_chain)
    levels = sum(0.8**depth for depth in range(4))
    assert expected_tokens(trees.complete_tree(2, 15), RATES) == pytest.approx(levels)


@pytest.mark.parametrize("size", [1, 2, 5, 16, 64])
def test_no_shape_beats_the_optimum(size: int) -> None:
    made = module("trees").shapes(size, RATES)
    values = {name: expected_tokens(parents, RATES) for name, parents in made.items()}
    assert all(len(parents) == size for parents in made.values())
    assert max(values.values()) == pytest.approx(values["optimal"])


def test_the_error_of_a_prediction_is_that_of_leaving_out_prompts() -> None:
    trees = module("trees")
    rates, prompts = np.array([[0.7], [0.8], [0.2], [0.3], [0.4], [0.6]]), [0, 0, 1, 1, 2, 2]
    value, error = trees.predicted([-1, 0], rates, np.array(prompts))
    assert value == pytest.approx(1.5)
    assert error == pytest.approx(np.std([0.75, 0.25, 0.5], ddof=1) / np.sqrt(3))


# ------------------------------------------------------------------ one level


def test_one_child_is_accepted_as_often_as_the_laws_overlap() -> None:
    one_level = module("one_level")
    p, q = rows(40, 7, seed=1)
    overlap = 1.0 - 0.5 * np.abs(p - q).sum(1)
    without = one_level.without_replacement(p, q, draws(1, 1, 7))[:, 0]
    assert without == pytest.approx(overlap, abs=1e-13)
    assert one_level.with_replacement(p, q, 1)[:, 0] == pytest.approx(overlap, abs=1e-13)


@pytest.mark.parametrize("children", [1, 2, 3])
def test_point_and_with_replacement_agree_with_enumeration(children: int) -> None:
    one_level = module("one_level")
    p, q = rows(6, 4, seed=children)
    order = np.argsort(-q, axis=1, kind="stable")
    point = one_level.point(p, order, children)
    drawn = one_level.with_replacement(p, q, children)
    for i in range(len(p)):
        assert point[i] == pytest.approx(enumerated(p[i], q[i], Law.POINT, children), abs=1e-12)
        law = Law.WITH_REPLACEMENT
        assert drawn[i] == pytest.approx(enumerated(p[i], q[i], law, children), abs=1e-12)


@pytest.mark.parametrize("used_up", [False, True])
def test_without_replacement_agrees_with_enumeration(used_up: bool) -> None:
    one_level = module("one_level")
    p, q = rows(6, 4, seed=9)
    if used_up:  # the third draw is uniform over what is left
        q[:, 2:] = 0.0
        q /= q.sum(1, keepdims=True)
    rates = one_level.without_replacement(p, q, draws(3, 20_000, 4))
    for i in range(len(p)):
        exact = enumerated(p[i], q[i], Law.WITHOUT_REPLACEMENT, 3)
        assert rates[i] == pytest.approx(exact, abs=5e-3)
        assert rates[i, 0] == pytest.approx(exact[0], abs=1e-12)


def test_the_kept_mass_of_all_columns_is_the_rate() -> None:
    one_level = module("one_level")
    p, q = rows(5, 4, seed=6)
    rates = one_level.without_replacement(p, q, draws(3, 64, 4))
    parts = [
        one_level.without_replacement_of(p, q, np.full(5, column), draws(3, 64, 4))
        for column in range(4)
    ]
    assert sum(parts) == pytest.approx(rates, abs=1e-12)
    assert (np.array(parts).sum(2).T <= p + 1e-2).all()  # no token more often than the target


def test_as_many_children_as_tokens_are_always_accepted() -> None:
    one_level = module("one_level")
    p, q = rows(10, 4, seed=4)
    without = one_level.without_replacement(p, q, draws(4, 50, 4))
    assert without.sum(1) == pytest.approx(np.ones(10), abs=1e-9)
    assert (one_level.with_replacement(p, q, 4).sum(1) < 1.0).all()


# -------------------------------------------------------------- trees along texts


def test_the_value_along_texts_is_that_of_every_text_weighed() -> None:
    """Two tokens, laws that depend on the last one: the mean over texts against the recursion."""
    trees, one_level, laws = module("trees"), module("one_level"), module("laws")
    p, q = rows(2, 2, seed=7)
    parents = [-1, 0, 1, 0, 3, 1]
    rates = one_level.without_replacement(p, q, draws(2, 4, 2))
    kept = np.stack(
        [
            one_level.without_replacement_of(p, q, np.full(2, token), draws(2, 4, 2))
            for token in (0, 1)
        ]
    )
    children = trees.children_of(parents)

    def value(node: int, last: int) -> float:
        return 1.0 + sum(
            kept[token, last, rank] * value(child, token)
            for rank, child in enumerate(children[node])
            for token in (0, 1)
        )

    found, shape = 0.0, {field: np.zeros(0) for field in laws.Record.__dataclass_fields__}
    for a in (0, 1):
        for b in (0, 1):
            last, text = np.array([0, a, b]), np.array([a, b, 0])
            shares = kept[text, last] / p[last, text][:, None]
            record = laws.Record(**{**shape, "prompts": np.zeros(3, int)})
            along, _ = trees.in_context(record, parents, rates[last], shares)
            # The root's places are 0 and 1, of which only the first starts at token 0.
            second, _ = trees.in_context(
                laws.Record(**{**shape, "prompts": np.zeros(2, int)}),
                parents,
                rates[last][1:],
                shares[1:],
            )
            found += p[0, a] * p[a, b] * (2.0 * along - second)
    assert found == pytest.approx(value(0, 0), abs=1e-12)


# --------------------------------------------------------------- integrated coins


@pytest.mark.parametrize("rule", [verify.recursive, verify.traversal])
@pytest.mark.parametrize("law", [Law.WITHOUT_REPLACEMENT, Law.WITH_REPLACEMENT])
def test_tokens_per_step_are_those_of_the_exactness_kit(rule: Any, law: Law) -> None:
    rules = module("rules")
    parents = [-1, 0, 0, 1]
    p, q = rows(1 + 4, 3, seed=2)

    def at(path: tuple[int, ...]) -> int:
        return 0 if not path else 1 + path[0]

    case = Case(
        vocab_size=3,
        parents=parents,
        laws=[law] * 4,
        target=lambda path: p[at(path)],
        draft=lambda source, path: q[at(path)],
    )
    found = 0.0
    for drawn in drafts(case):
        paths = [[drawn.tree.token_list[n] for n in drawn.tree.path(node)[1:]] for node in range(4)]
        table = np.stack([case.target_row(tuple(path)) for path in paths])
        found += drawn.probability * rules.tokens_per_step(rule, drawn.tree, table)
    assert found == pytest.approx(1.0 + expected_kept(rule, case), abs=1e-12)


# ------------------------------------------------------------------------ records


def record_of(target: Any, draft: Any, width: int, order: int) -> Any:
    import torch

    parts = module("record").position_arrays(
        torch.tensor(target), torch.tensor(draft), width, order
    )
    ends = np.array([len(target) + 1])
    return module("laws").Record(
        tokens=np.arange(len(target) + 1),
        ends=ends,
        prompt_lengths=np.array([1]),
        prompts=np.zeros(len(target), int),
        places=1 + np.arange(len(target)),
        **parts,
        facts={"vocab_size": target.shape[1]},
    )


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.6])
def test_recorded_laws_are_those_of_sampling(top_p: float) -> None:
    import torch

    rng = np.random.default_rng(3)
    target, draft = (3.0 * rng.standard_normal((5, 40)).astype(np.float32) for _ in range(2))
    record = record_of(target, draft, width=12, order=40)
    laws = record.laws(0.6, top_p)
    params = SamplingParams(temperature=0.6, top_p=top_p)
    assert laws.num_cut == 0
    for i in range(5):
        whole = probs_from_scores(torch.tensor(target[i]).double(), params).numpy()
        kept = whole[record.draft_ids[i]]
        assert laws.target[i, :-1] == pytest.approx(kept, abs=1e-9)
        assert laws.target[i, -1] == pytest.approx(1.0 - kept.sum(), abs=1e-9)
        assert laws.draft[i].sum() == pytest.approx(1.0)
        assert (np.diff(laws.draft[i, :-1]) <= 0.0).all() and laws.draft[i, -1] == 0.0


def test_a_record_comes_back_from_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("REDWOOD_CACHE", str(tmp_path))
    rng = np.random.default_rng(5)
    target, draft = (rng.standard_normal((3, 9)).astype(np.float32) for _ in range(2))
    record = record_of(target, draft, width=4, order=6)
    record.save("one")
    again = module("laws").Record.load("one")
    assert again.facts == record.facts and again.text(0) == [0, 1, 2, 3]
    assert (again.target_at_draft == record.target_at_draft).all()
    with pytest.raises(SystemExit, match="no record two"):
        module("laws").Record.load("two")


def test_greedy_acceptance_is_the_rank_of_the_best_token() -> None:
    target = np.array([[0.0, 3.0, 1.0], [5.0, 1.0, 0.0]], np.float32)
    draft = np.array([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]], np.float32)
    record = record_of(target, draft, width=2, order=3)
    rates, _ = module("trees").acceptance(record, 0.0, 2, 1)
    assert rates.tolist() == [[0.0, 1.0], [1.0, 0.0]]


# ------------------------------------------------------------------- the choice


def test_a_plan_of_a_size_has_its_best_levels() -> None:
    sizes = module("sizes")
    times = {1: 10.0, 4: 11.0, 16: 14.0}
    plans = [sizes.plan_of_size(RATES, times, 2.0, size, 8) for size in (4, 16)]
    assert [plan.size for plan in plans] == [4, 16]
    best = sizes.choose_tree(RATES, times, 2.0, max_levels=8)
    fastest = min(plans, key=lambda plan: plan.time_per_token)
    assert fastest == best
    assert max(depths_of(fastest.parents)) + 1 == fastest.levels


def test_times_are_read_with_and_without_a_heading(tmp_path: Path) -> None:
    sizes = module("sizes")
    for name, text in (("a", '{"1": 5, "8": 7.5}'), ("b", '{"ms": {"1": 5, "8": 7.5}}')):
        (tmp_path / name).write_text(text)
        assert sizes.read_times(tmp_path / name) == {1: 5.0, 8: 7.5}
