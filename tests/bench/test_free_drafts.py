"""Measuring free drafts: what a drafter learned is kept, put back, and not changed by measuring."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import redwood
from redwood import Engine, NgramDrafter, NoDrafter, SamplingParams
from redwood.algorithms.token_recycling import AdjacencyMatrix
from redwood.bench.interleave import PLAIN, Candidate, run
from redwood.drafters.base import UnionDrafter

PARAMS = SamplingParams(max_tokens=24)
PROMPTS = [[5, 6, 7, 5, 6, 7, 5], [9, 9, 9], [40]]


class Modules(NamedTuple):
    feeding: Any
    free_drafts: Any
    table_curve: Any


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Modules]:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    yield Modules(*map(import_module, ("feeding", "free_drafts", "table_curve")))


@pytest.fixture(scope="module")
def engine(tiny_model_folder: Path) -> Engine:
    return redwood.load(str(tiny_model_folder), "none")


def counts(state: Any) -> dict[str, Any]:
    return {name: rates.to_dict() for name, rates in state.rates.items()}


def test_what_was_learned_is_kept_and_put_back(
    bench: Modules, engine: Engine, tmp_path: Path
) -> None:
    drafter, feeding = NgramDrafter(), bench.feeding
    empty = feeding.state_of(drafter)
    assert feeding.feed(engine, drafter, PROMPTS, PARAMS) > 24
    learned = feeding.state_of(drafter)
    assert counts(learned) != counts(empty)
    path = tmp_path / "state.npz"
    feeding.save_state(path, learned, seen=7)
    feeding.restore(drafter, empty)
    assert counts(feeding.state_of(drafter)) == counts(empty)
    saved, about = feeding.read_state(path, drafter)
    feeding.restore(drafter, saved)
    assert counts(feeding.state_of(drafter)) == counts(learned) and about == {"seen": 7}
    assert [each.name for each in tmp_path.iterdir()] == ["state.npz"]


def test_a_cold_measurement_is_the_same_whatever_was_measured_before(
    bench: Modules, engine: Engine
) -> None:
    drafter = NgramDrafter()
    empty, found = bench.feeding.state_of(drafter), []
    for nodes in (8, 3, 8):
        bench.feeding.restore(drafter, empty)
        candidate = Candidate("ngram", drafter, nodes)
        found.append(bench.free_drafts.tokens_per_pass(engine, candidate, PROMPTS, 2, PARAMS))
    assert found[0] == found[2]


def test_a_point_of_the_curve_teaches_nothing(bench: Modules, engine: Engine) -> None:
    drafter = NgramDrafter()
    bench.feeding.feed(engine, drafter, PROMPTS[:1], PARAMS)
    before = counts(bench.feeding.state_of(drafter))
    candidate = Candidate("ngram", drafter, 8)
    first, again = (bench.table_curve.measure(engine, candidate, PROMPTS, PARAMS) for _ in range(2))
    assert first == again and counts(bench.feeding.state_of(drafter)) == before


def test_token_recycling_answers_as_plain_decoding_does(bench: Modules, engine: Engine) -> None:
    matrix, passes, tokens = AdjacencyMatrix(engine.target.vocab_size), 0, 0
    for prompt in PROMPTS * 2:
        answer, steps = bench.free_drafts.recycled(engine, matrix, prompt, 24)
        assert answer == run(engine, PLAIN, prompt, PARAMS).token_ids
        passes, tokens = passes + steps, tokens + len(answer)
    assert passes < tokens


def test_one_free_part_is_measured(bench: Modules) -> None:
    part = NgramDrafter()
    assert bench.feeding.free_part(UnionDrafter([NoDrafter(), part])) is part
    for other in (NoDrafter(), UnionDrafter([part, NgramDrafter()])):
        with pytest.raises(SystemExit, match="free parts"):
            bench.feeding.free_part(other)


def test_made_prompts_ask_about_every_text_before_any_is_asked_about_again(
    bench: Modules, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "Returns the number of leaves. " * 6
    (tmp_path / "one.py").write_text(f'def f():\n    """{text}"""\n')
    (tmp_path / "bad.py").write_text("def f(:\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "two.py").write_text(f'"""Of a test: {text}"""\n')
    monkeypatch.setattr(bench.feeding, "topics", {"a": "short", "b": "Long enough. " * 20})
    made = list(bench.feeding.made_prompts(tmp_path))
    assert len(made) == len(set(made)) == 10  # five questions about two texts
    assert sum("leaves" in prompt for prompt in made[:2]) == 1
    assert made == list(bench.feeding.made_prompts(tmp_path))
    assert not any("Of a test" in prompt for prompt in made)
