"""The search over all free sources: by hand, and the compiled one against the reference."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from redwood.algorithms.retrieval import PREDICTED, STORE, TABLE, TEXT, Retriever
from redwood.algorithms.source_rates import (
    CELLS,
    LearnedRates,
    Rates,
    joint_cell,
    level,
    predicted_cell,
    prior_of,
    store_cell,
    table_cell,
    text_cell,
)
from redwood.algorithms.successors import LEAST_BYTES, successor_table
from redwood.errors import ArgumentError

Make = Callable[[], tuple[Any, Any]]


@pytest.fixture(params=["reference", "compiled"])
def make(request: pytest.FixtureRequest) -> Make:
    """A retriever and rates."""
    if request.param == "reference":
        return lambda: (Retriever(True), Rates())
    native = pytest.importorskip("redwood._native")
    return lambda: (native.Retriever(True), native.Rates())


def drafted(retriever: Any, rates: Any, size: int = 9, **sources: Any) -> dict[str, list[Any]]:
    made = retriever.draft(
        size,
        sources.get("max_branch", 5),
        sources.get("least", 0.0),
        rates,
        sources.get("table"),
        sources.get("stored", ()),
        sources.get("predicted", ()),
        sources.get("run", 0),
    )
    return dict(zip(("tokens", "parents", "chances", "sources"), map(list, made), strict=True))


def test_cells_of_all_sources_are_apart_and_all_used() -> None:
    matches = [(m, c, t, x) for m in range(1, 12) for t in (1, 2, 3, 5, 60, 100)
               for c in range(1, t + 1) for x in (False, True)]  # fmt: skip
    probs = [0.0, *(2.0 ** (-0.5 * k - 0.25) for k in range(12))]
    keys = [(1, 0), (2, 0), (3, 0), (2, 1), (3, 1), (3, 2)]
    cells = [
        {text_cell(m, c, t, longest=x) for m, c, t, x in matches},
        {store_cell(m, c, t, longest=x) for m, c, t, x in matches},
        {table_cell(a, b, p, q) for a, b in keys for p in probs for q in probs},
        {predicted_cell(run) for run in range(9)},
    ]
    single = set[int]().union(*cells)
    assert single == set(range(len(single))) and len(single) == sum(map(len, cells))
    assert all(0.0 < prior_of(cell) < 1.0 for cell in single)
    assert joint_cell([0, 0, 0, 0]) == len(single)
    assert joint_cell([7, 7, 7, 7]) == CELLS - 1
    assert {level(rate) for rate in np.linspace(0, 1, 101)} == set(range(2, 8))


def test_each_source_is_asked_at_every_node(make: Make) -> None:
    retriever, rates = make()
    retriever.extend([1, 2, 3, 9, 1, 2, 3], rates)
    table = successor_table(LEAST_BYTES)
    ids = np.array([[50, 51], [60, 61]], np.int32)
    probs = np.array([[0.9, 0.05], [0.9, 0.05]], np.float32)
    table.learn([], [3, 9], [-1, -1], ids, probs)
    stored = [(1, [[70, 71], [70, 72]])]
    made = drafted(retriever, rates, 20, table=table, stored=stored, predicted=[80, 81], run=4)
    below: dict[int, dict[int, int]] = {}
    for token, parent, source in zip(made["tokens"], made["parents"], made["sources"], strict=True):
        below.setdefault(parent, {})[token] = source
    assert below[0] == {9: 1 << TEXT, 50: 1 << TABLE, 51: 1 << TABLE, 70: 1 << STORE,
                        80: 1 << PREDICTED}  # fmt: skip
    nine = 1 + made["tokens"].index(9)
    assert below[nine][60] == 1 << TABLE and below[nine][1] == 1 << TEXT
    predicted = 1 + made["tokens"].index(80)
    assert below[predicted] == {81: 1 << PREDICTED}


def test_sources_that_agree_are_one_node_and_learn_together(make: Make) -> None:
    retriever, rates = make()
    text = [1, 2, 9, 1, 2]
    retriever.extend(text, rates)
    table = successor_table(LEAST_BYTES)
    table.learn([1], [2], [-1], np.array([[9]], np.int32), np.array([[0.9]], np.float32))
    made = drafted(retriever, rates, 2, table=table)
    assert (made["tokens"], made["sources"]) == ([9], [1 << TEXT | 1 << TABLE])
    trials = list(rates.trials)
    retriever.extend([9], rates)
    counted = [i for i, before in enumerate(trials) if rates.trials[i] > before]
    joint = [cell for cell in counted if cell >= joint_cell([0] * 4)]
    assert len(joint) == 1 and sum(rates.hits[cell] for cell in joint) == 1.0


def test_what_was_considered_counts_although_it_was_not_drafted(make: Make) -> None:
    retriever, rates = make()
    retriever.extend([1, 2, 8, 1, 2, 9, 1, 2, 9, 1, 2], rates)
    assert drafted(retriever, rates, 2)["tokens"] == [9]
    retriever.extend([8], rates)
    assert sum(rates.trials) > 1.0 and sum(rates.hits) == 1.0


def test_longer_matches_are_told_apart_beyond_four_tokens(make: Make) -> None:
    retriever, rates = make()
    retriever.extend([1, 2, 3, 4, 5, 6, 9, 0, 3, 4, 5, 6, 7, 1, 2, 3, 4, 5, 6], rates)
    nine = text_cell(6, 1, 2, longest=True)
    rates.load(
        [50.0 if cell == nine else 0.0 for cell in range(CELLS)],
        [50.0 if cell == nine else 0.0 for cell in range(CELLS)],
    )
    assert drafted(retriever, rates, 2)["tokens"] == [9]


def test_a_source_that_is_always_wrong_gives_way(make: Make) -> None:
    retriever, rates = make()
    retriever.extend([1, 2, 1, 2], rates)
    table = successor_table(LEAST_BYTES)
    table.learn([1], [2], [-1], np.array([[5]], np.int32), np.array([[0.95]], np.float32))
    assert drafted(retriever, rates, 2, table=table)["tokens"] == [5]
    for _ in range(30):
        drafted(retriever, rates, 3, table=table)
        retriever.extend([1, 2], rates)
    made = drafted(retriever, rates, 3, table=table)
    assert made["tokens"][0] == 1 and 5 not in made["tokens"]


def test_rates_outlive_a_json_file_and_bad_ones_are_refused() -> None:
    learned = LearnedRates()
    learned.rates.count(7, True)
    learned.rates.count(CELLS - 1, False)
    other = LearnedRates()
    other.load(learned.to_dict())
    assert other.to_dict() == learned.to_dict()
    other.load({"hits": [1.0] * 80, "trials": [2.0] * 80})  # a profile of version 0.1
    assert other.rates.trials[79] == 2.0 and other.rates.trials[80] == 0.0
    before = other.to_dict()
    for bad in (
        {},
        {"hits": [1.0], "trials": [1.0]},
        {"cells": [CELLS], "hits": [1.0], "trials": [1.0]},
        {"cells": [-1], "hits": [1.0], "trials": [1.0]},
        {"cells": [0], "hits": [2.0], "trials": [1.0]},
        {"cells": [0], "hits": [float("nan")], "trials": [1.0]},
        {"cells": ["x"], "hits": [1.0], "trials": [1.0]},
        {"cells": [2**70], "hits": [1.0], "trials": [1.0]},
    ):
        with pytest.raises(ArgumentError, match="reliability"):
            other.load(bad)
    assert other.to_dict() == before


def test_the_compiled_search_is_the_reference_bit_for_bit() -> None:
    native = pytest.importorskip("redwood._native")
    rng = np.random.default_rng(2)
    table = native.SuccessorTable(LEAST_BYTES)
    all_rates = native.Rates(), Rates()
    for text in range(24):
        pair = native.Retriever(text % 3 != 0), Retriever(text % 3 != 0)
        most = int(rng.integers(3, 12))
        news = rng.integers(0, most, 60).tolist()
        for step in range(40):
            for each, rates in zip(pair, all_rates, strict=True):
                each.extend(news, rates)
            stored = [
                (length, [rng.integers(0, most, int(rng.integers(1, 5))).tolist()
                          for _ in range(int(rng.integers(1, 6)))])
                for length in range(int(rng.integers(0, 4)), 0, -1)
            ]  # fmt: skip
            predicted = rng.integers(0, most, int(rng.integers(0, 5))).tolist()
            size, branch = int(rng.integers(1, 20)), int(rng.integers(1, 5))
            asked = (size, branch, float(rng.choice([0.0, 0.05, 0.3])))
            given = (table if step % 3 else None, stored, predicted, step % 4)
            made = [
                tuple(map(list, each.draft(*asked, rates, *given)))
                for each, rates in zip(pair, all_rates, strict=True)
            ]
            assert made[0] == made[1]
            chances = made[0][2]
            assert all(a >= b for a, b in pairwise(chances))
            news = rng.integers(0, most, int(rng.integers(1, 4))).tolist()
            if made[0][0] and rng.random() < 0.7:
                news = [made[0][0][0], *news]
            ids = np.stack([rng.permutation(most + 4)[:4] for _ in news]).astype(np.int32)
            probs = -np.sort(-rng.dirichlet([0.3] * 5, len(news))[:, :4].astype(np.float32), 1)
            table.learn([1, 2], news, list(range(-1, len(news) - 1)), ids, probs)
    assert list(all_rates[0].hits) == all_rates[1].hits
    assert list(all_rates[0].trials) == all_rates[1].trials
