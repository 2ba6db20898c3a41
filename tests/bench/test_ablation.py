"""The ablation simulates the real planner, alike each time, and knows what it takes away."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    yield import_module("ablation")


def answers(bench: Any) -> list[Any]:
    copied = list(range(40, 70))
    return [bench.Answer("edit", copied, copied), bench.Answer("chat", [7, 8], list(range(30)))]


@pytest.mark.parametrize("drafter", ["ngram", "good", "useless", "turning"])
@pytest.mark.parametrize("rows", [1, 4])
def test_a_simulation_takes_the_same_time_whenever_it_is_run(
    bench: Any, drafter: str, rows: int
) -> None:
    case = bench.Case("edits", drafter, "cpu", rows)
    first, again = (bench.simulated_s(case, answers(bench), True) for _ in range(2))
    assert 0.0 < first == again


def test_plain_decoding_takes_a_pass_for_each_token(bench: Any) -> None:
    texts = answers(bench)
    tokens = sum(len(each.answer) + 1 for each in texts)  # each ends with a token of its own
    plain = bench.simulated_s(bench.Case("edits", "ngram", "cpu"), texts, False)
    assert plain == pytest.approx(tokens * 5e-3, rel=0.05)


def test_copies_are_faster_and_a_useless_model_is_not(bench: Any) -> None:
    def ratio(drafter: str, texts: Any) -> float:
        case = bench.Case("edits", drafter, "gpu")
        own, plain = (bench.simulated_s(case, texts, planned) for planned in (True, False))
        return float(own / plain)

    copied = answers(bench)[:1] * 4
    assert ratio("ngram", copied) < 0.5
    assert ratio("good", answers(bench)[1:] * 4) < ratio("useless", answers(bench)[1:] * 4)


def test_every_mechanism_can_be_taken_away_and_comes_back(bench: Any) -> None:
    case, texts = bench.Case("edits", "fair", "cpu"), answers(bench) * 4
    before = bench.simulated_s(case, texts, True)
    for name in bench.ABLATIONS:
        with bench.without([name]):
            assert bench.simulated_s(case, texts, True) > 0.0
    assert bench.simulated_s(case, texts, True) == before
