"""Replays count what real decoding would, and budgets follow the curve they are given."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from redwood.drafters.base import NgramDrafter, NoDrafter
from redwood.tree import TokenTree


class Modules(NamedTuple):
    replay: Any
    budget: Any
    sources: Any


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Modules]:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    yield Modules(*map(import_module, ("replay", "batch_budget", "ngram_sources")))


def answers(bench: Modules) -> list[Any]:
    return [
        bench.replay.Answer("loop", [1, 2, 3], [4, 5, 6, 4, 5, 6, 4, 5, 6, 4, 5, 6]),
        bench.replay.Answer("new", [9, 8], list(range(20, 40))),
    ]


def test_a_step_follows_the_tree_as_far_as_the_answer_goes(bench: Modules) -> None:
    replay = bench.replay.start(bench.replay.Answer("x", [1], [5, 6, 7, 8, 9]), 0, 100)
    assert replay.context.token_ids == [1, 5]  # the prefill gave the first token
    tree = TokenTree.point([5, 9, 6, 7, 1], [-1, 0, 0, 2, 3])
    assert replay.follow(tree) == 3  # 6 and 7 were drafted, 8 is the target's
    assert replay.context.token_ids == [1, 5, 6, 7, 8] and replay.rest == [9]
    assert replay.follow(TokenTree.chain([8])) == 1 and replay.rest == []
    assert (replay.steps, replay.tokens, replay.nodes) == (2, 4, 6)


def test_plain_decoding_takes_a_step_for_every_token_and_drafts_take_fewer(bench: Modules) -> None:
    plain = bench.replay.replay_all(NoDrafter(), answers(bench), 8)
    drafted = bench.replay.replay_all(NgramDrafter(), answers(bench), 8)
    for answer, one, other in zip(answers(bench), plain, drafted, strict=True):
        assert one.steps == one.tokens == other.tokens == len(answer.answer) - 1
        assert other.context.token_ids == [*answer.prompt, *answer.answer]
    assert [replay.steps < replay.tokens for replay in drafted] == [True, False]
    assert (
        bench.sources.row_of(plain)["tokens_per_step"]
        == bench.sources.row_of(plain)["nodes_per_step"]
        == 1.0
    )
    gain = bench.sources.gain_of(drafted, plain)["gain"]
    assert gain == pytest.approx(30 / sum(replay.steps for replay in drafted), abs=1e-4)


def test_a_curve_goes_through_its_points_and_on_past_them(bench: Modules) -> None:
    curve = bench.budget.curve_from({1: 10.0, 4: 10.0, 8: 14.0}, None, 16)
    assert curve.times[[1, 2, 4, 6, 8, 16]].tolist() == [10.0, 10.0, 10.0, 12.0, 14.0, 22.0]
    assert curve.knee == 10.0  # a node at the end costs 1, a pass 10
    assert (
        bench.budget.curve_from({1: 1.0, 2: 3.0, 3: 2.0}, 5.0, 4).times[2:].min() == 3.0
    )  # never falls


def test_rates_are_tokens_over_the_time_of_all_rows(bench: Modules) -> None:
    curve = bench.budget.curve_from({1: 1.0, 100: 100.0}, None, 100)  # a node costs 1
    steps = [[bench.budget.Taken(2, 2), bench.budget.Taken(1, 1)], [bench.budget.Taken(4, 1)]]
    assert bench.budget.rate_of(steps, 1, curve) == (pytest.approx(8 / 14), pytest.approx(8 / 6))
    assert bench.budget.rate_of([[bench.budget.Taken(1, 1)] * 5] * 3, 2, curve)[0] == 1.0


def test_the_marginal_rule_drafts_where_nodes_are_free_and_not_where_they_are_dear(
    bench: Modules,
) -> None:
    free = bench.budget.curve_from({1: 1.0, 5000: 1.0001}, 1e9, 5000)
    dear = bench.budget.curve_from({1: 1.0, 5000: 5000.0}, None, 5000)
    assert bench.budget.marginal_rate(answers(bench), 2, dear)[1:] == (1.0, 1.0)
    steps = bench.budget.fixed_steps(answers(bench), 32)
    assert bench.budget.marginal_rate(answers(bench), 1, free)[1] == pytest.approx(
        bench.budget.rate_of(steps, 1, free)[1]
    )


def test_the_table_has_a_row_for_every_batch(bench: Modules) -> None:
    rows = bench.budget.compare(
        answers(bench),
        bench.budget.Curve(bench.budget.curve_from({1: 1.0, 3000: 20.0}, None, 3000).times, 153.0),
    )
    assert [row["batch"] for row in rows] == [1, 2, 4, 8, 16, 32, 64]
    assert [row["published_budget"] for row in rows] == [32, 32, 24, 16, 8, 4, 2]
    assert all(row["marginal"] >= 1.0 for row in rows)
