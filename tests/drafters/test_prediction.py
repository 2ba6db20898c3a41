"""Predicted outputs: the cursor, and the same text with and without them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from conftest import tiny_llama
from redwood.backends.load import wrap_model
from redwood.drafters.base import NgramDrafter, NoDrafter
from redwood.drafters.prediction import Prediction
from redwood.engine.text import Engine, Output
from redwood.errors import ArgumentError
from redwood.planner.from_profile import make_planner

PROMPT = [5, 9, 17, 33]


def _chain(prediction: Prediction, size: int = 5) -> list[int]:
    return prediction.tree(0, size).token_list[1:]


def test_the_cursor_follows_the_text() -> None:
    prediction = Prediction([10, 11, 12, 13, 14, 15])
    assert _chain(prediction) == [10, 11, 12, 13]
    assert prediction.follow([10, 11]) == 2
    assert _chain(prediction) == [12, 13, 14, 15]
    assert prediction.follow([12, 13, 14, 15]) == 4
    assert _chain(prediction) == []
    assert prediction.follow([16]) == 0


def test_one_token_changed_is_one_token_skipped() -> None:
    prediction = Prediction([10, 11, 12, 13, 14, 15])
    assert prediction.follow([10, 99]) == 1
    assert _chain(prediction) == [12, 13, 14, 15]


def test_after_an_insertion_two_tokens_show_the_place() -> None:
    prediction = Prediction([10, 11, 12, 13, 14, 15, 16])
    prediction.follow([10, 11, 50, 51, 52, 12])
    prediction.follow([13])
    assert _chain(prediction) == [14, 15, 16]


def test_after_a_deletion_the_next_place_ahead_is_taken() -> None:
    tokens = [1, 2, 3, 4, 5, 2, 3, 6, 7, 2, 3, 8]
    prediction = Prediction(tokens)
    prediction.follow([1, 9, 9, 9, 2, 3])  # the cursor stood behind the first "2 3"
    assert _chain(prediction, 3) == [6, 7]


def _similar_lines(count: int) -> list[list[int]]:
    return [[1, 2, 3, 4, 1000 + line] for line in range(count)]


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: [*lines[:3], [1, 2, 3, 4, 7, 8], *lines[4:]],  # one token becomes two
        lambda lines: [*lines[:3], [1, 2, 3, 4], *lines[4:]],  # one is left out
        lambda lines: [*lines[:3], [1, 2, 9, 9, 9], *lines[3:]],  # a line is put in
        lambda lines: [*lines[:3], *lines[5:]],  # two lines are left out
        lambda lines: [*lines[:300], [1, 2, 3, 4, 7, 8], *lines[301:]],  # in the middle
    ],
)
def test_the_cursor_stays_near_where_a_file_of_similar_lines_was_changed(change: Any) -> None:
    lines = _similar_lines(600)
    prediction = Prediction([token for line in lines for token in line])
    answer = [token for line in change(lines)[:400] for token in line]
    at = steps = 0
    while at < len(answer):
        drafted, kept = _chain(prediction, 9), 0
        while kept < len(drafted) and answer[at + kept : at + kept + 1] == [drafted[kept]]:
            kept += 1
        prediction.follow(answer[at : at + kept + 1])
        at, steps = at + kept + 1, steps + 1
        assert abs(prediction._at - at) <= 15
    assert steps <= len(answer) / 9 + 8


def test_the_cursor_goes_back_to_what_stands_nearer_behind_it_than_ahead() -> None:
    prediction = Prediction([1, 2, 3, 4, 5, 6, 7, 8, *range(20, 40), 2, 3, 50])
    prediction.follow([1, 9, 9, 9, 9, 2, 3])
    assert _chain(prediction) == [4, 5, 6, 7]


def test_a_text_of_the_far_end_is_found_where_it_stands_nowhere_else() -> None:
    tokens = [token for line in _similar_lines(600) for token in line]
    prediction = Prediction([*tokens, 5, 6, 7, 8, 9])
    prediction.follow([1, 2, 77, 5, 6])
    assert _chain(prediction) == [7, 8, 9]
    prediction.follow([7, 8, 9, 5, 6])
    assert _chain(prediction) == [7, 8, 9]


def test_no_token_of_the_prediction_counts_twice() -> None:
    prediction = Prediction([1, 2, 3, 1, 2, 3])
    assert prediction.follow([1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3]) == 6


def test_estimates_fall_along_the_chain_and_learn() -> None:
    prediction = Prediction(range(100))
    first = prediction.tree(0, 8).estimates
    assert first is not None and all(a > b for a, b in pairwise(first))
    for token in range(0, 60, 2):
        prediction.follow([token, 999])
    last = prediction.tree(0, 8).estimates
    assert last is not None and last[2] < 0.3 < 0.7 < last[1]


def _engine(drafter: Any, planned: bool) -> Engine:
    target = wrap_model(tiny_llama())
    planner = make_planner(target, drafter) if planned else None
    return Engine(target, drafter, eos_ids=[1], budget=6, planner=planner)


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("drafter", [NoDrafter, NgramDrafter])
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.9, "seed": 4},
        {"temperature": 0.9, "seed": 4, "verifier": "traversal"},
        {"repetition_penalty": 1.3},
    ],
)
def test_the_text_is_plain_decodings_own(drafter: Any, planned: bool, params: Any) -> None:
    engine = _engine(drafter(), planned)
    plain: Any = _engine(NoDrafter(), False).generate(PROMPT, max_tokens=40, **params)
    edited = plain.token_ids[:10] + [77, 78] + plain.token_ids[12:]
    for predicted in (plain.token_ids, edited, [3] * 30, plain.token_ids[20:]):
        got: Any = engine.generate(PROMPT, max_tokens=40, prediction=predicted, **params)
        stats = got.stats
        if params.get("verifier") != "traversal":  # its text follows its trees
            assert got.token_ids == plain.token_ids
        assert stats.num_prediction_tokens == len(predicted)
        assert stats.num_prediction_tokens_accepted + stats.num_prediction_tokens_rejected == len(
            predicted
        )
        if predicted is plain.token_ids and not params:
            assert stats.num_prediction_tokens_rejected == 0
            assert stats.target_passes <= 10


def test_a_prediction_outside_the_vocabulary_is_refused() -> None:
    engine = _engine(NoDrafter(), False)
    with pytest.raises(ArgumentError, match="prediction"):
        engine.generate(PROMPT, prediction=[5, 100_000])
    with pytest.raises(ArgumentError, match="tokenizer"):
        engine.generate(PROMPT, prediction="text")
    with pytest.raises(ArgumentError, match="prediction"):
        engine.generate(PROMPT, prediction=[-1])


def test_without_speculation_nothing_is_drafted() -> None:
    output = _engine(NgramDrafter(), True).generate(
        PROMPT, max_tokens=30, prediction=[5, 9], speculate=False
    )
    assert isinstance(output, Output)
    assert output.stats.num_draft_tokens == 0
    assert output.stats.target_passes == output.stats.num_generated_tokens
