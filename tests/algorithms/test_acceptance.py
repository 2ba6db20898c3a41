"""Estimates of acceptance: what they learn, and how they order drafts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from redwood.algorithms.acceptance import (
    MODEL_BINS,
    AcceptanceTable,
    learn_below,
    model_bin,
    model_prior,
)
from redwood.errors import ArgumentError
from redwood.planner.budget import best_count
from redwood.tree import children_of


def test_a_rate_moves_from_its_prior_to_what_was_seen() -> None:
    table = AcceptanceTable([0.5, 0.2])
    for i in range(200):
        table.count(0, i % 10 != 0)
    assert table.rates[0] == pytest.approx(0.9, abs=0.03)
    assert table.rates[1] == 0.2


def test_old_trials_fade() -> None:
    table = AcceptanceTable([0.5])
    for hit in [True] * 2000 + [False] * 1000:
        table.count(0, hit)
    assert table.rates[0] < 0.35


def test_a_text_begins_with_what_all_texts_taught_and_keeps_its_own_counts() -> None:
    table = AcceptanceTable([0.5])
    for _ in range(50):
        table.count(0, True)
    child = table.child()
    assert child.rates == table.rates
    child.count(0, False)
    assert child.rates[0] < table.rates[0]


def test_a_table_survives_being_written_down() -> None:
    table, other = AcceptanceTable([0.5, 0.1]), AcceptanceTable([0.5, 0.1])
    for hit in (True, True, False):
        table.count(1, hit)
    other.load(table.to_dict())
    assert other.rates == table.rates


@pytest.mark.parametrize(
    "seen",
    [
        {},
        {"hits": [1.0], "trials": [1.0]},
        {"hits": [2.0, 0.0], "trials": [1.0, 0.0]},
        {"hits": [-1.0, 0.0], "trials": [1.0, 0.0]},
        {"hits": [float("nan"), 0.0], "trials": [1.0, 0.0]},
        {"hits": "ab", "trials": [1.0, 0.0]},
    ],
)
def test_a_damaged_table_is_refused(seen: dict[str, object]) -> None:
    with pytest.raises(ArgumentError):
        AcceptanceTable([0.5, 0.1]).load(seen)


def test_bins_are_within_their_tables() -> None:
    assert {model_bin(p) for p in np.linspace(0, 1, 1001)} == set(range(MODEL_BINS))
    assert len(model_prior()) == MODEL_BINS


def test_learning_follows_the_text_and_notes_siblings() -> None:
    #      0
    #     1 2       tokens 7 8
    #    3   4      tokens 9 9
    parents, tokens, bins = [-1, 0, 0, 1, 2], [-1, 7, 8, 9, 9], [-1, 0, 1, 2, 3]
    table = AcceptanceTable([0.5] * 4)
    assert learn_below([8, 5], children_of(parents).__getitem__, tokens, bins, [table]) == 1
    seen = table.to_dict()
    assert seen["hits"] == [0.0, 1.0, 0.0, 0.0]
    assert seen["trials"] == [1.0, 1.0, 0.0, 1.0]


gains = st.lists(st.floats(0, 1), max_size=12).map(lambda g: sorted(g, reverse=True))


@given(gains, st.integers(1, 4), st.floats(0, 10), st.data())
def test_the_best_count_is_the_best(
    found: list[float], rows: int, sunk: float, data: st.DataObject
) -> None:
    step = st.floats(0.01, 5)
    times = np.cumsum([data.draw(step) for _ in range(len(found) + 1)])
    rates = [(rows + sum(found[:n])) / (times[n] + sunk) for n in range(len(times))]
    assert rates[best_count(found, times, sunk, rows)] == pytest.approx(max(rates))
