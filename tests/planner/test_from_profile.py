"""From a profile to a planner: what it takes over, and what it refuses."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import redwood
from conftest import tiny_llama
from redwood.backends.load import wrap_model
from redwood.drafters.base import ModelDrafter, NgramDrafter, UnionDrafter
from redwood.engine.engine import RowEngine
from redwood.errors import ArgumentError
from redwood.planner.from_profile import known_profile, make_planner
from redwood.profiling.key import profile_key
from redwood.profiling.latency import LatencyModel, LatencyPoint
from redwood.profiling.profile import DrafterProfile, MeasuredAcceptance, Profile, profile_path
from redwood.sampling import SamplingParams
from redwood.tree import Law


def curve(ms: float) -> LatencyModel:
    return LatencyModel(
        (LatencyPoint(1, 1, 0, ms, ms, ms), LatencyPoint(1, 4, 0, 2 * ms, ms, 3 * ms))
    )


def drafters() -> dict[str, Any]:
    return {"ngram": NgramDrafter(), "small": ModelDrafter(wrap_model(tiny_llama(3, 1)))}


def profile_for(key: Any, known: dict[str, Any]) -> Profile:
    ngram, small = known["ngram"].reliability, known["small"].reliability[Law.POINT]
    for table in (ngram.rates, small):
        for _ in range(40):
            table.count(3, True)
    learned = {"POINT": small.to_dict(), "COUPLED": small.to_dict()}
    rates = MeasuredAcceptance([0.6, 0.2], [0.01, 0.01], 100, "teacher-forced")
    return Profile(
        key,
        "2026-11-22T00:00:00+00:00",
        curve(10.0),
        0.1,
        {
            "ngram": DrafterProfile("ngram", None, 0.01, {}, {"0": ngram.to_dict()}),
            "small": DrafterProfile("small", curve(2.0), 0.1, {"0": [rates]}, {"0": learned}),
        },
    )


@pytest.fixture
def saved(tiny_model_folder: Path) -> tuple[Any, str, dict[str, Any]]:
    target, name, folder = wrap_model(tiny_llama()), str(tiny_model_folder), str(tiny_model_folder)
    known = drafters()
    named = {"ngram": known["ngram"], folder: known["small"]}
    key = profile_key(target, name, named)
    made = profile_for(key, known)
    made.drafters[folder] = made.drafters.pop("small")
    made.save(profile_path(key))
    return target, name, named


def test_a_planner_begins_with_what_the_profile_knows(
    saved: tuple[Any, str, dict[str, Any]],
) -> None:
    target, name, _ = saved
    fresh = {"ngram": NgramDrafter(), name: ModelDrafter(wrap_model(tiny_llama(3, 1)))}
    before = fresh["ngram"].reliability.rates.rate(3, 0.5)
    profile = known_profile(target, name, fresh)
    assert profile is not None
    planner = make_planner(target, UnionDrafter(list(fresh.values())), profile, fresh)
    assert planner.curve() == profile.target
    model = fresh[name]
    assert planner.curve(model) == profile.drafters[name].curve
    assert list(model.acceptance) == [0.6, 0.2]
    assert fresh["ngram"].reliability.rates.rate(3, 0.5) > before
    assert (
        model.reliability[Law.POINT].rates[3] > model.reliability[Law.WITHOUT_REPLACEMENT].rates[3]
    )


def test_without_a_profile_times_are_measured_when_they_are_needed(tiny_model_folder: Path) -> None:
    target, known = wrap_model(tiny_llama()), drafters()
    assert known_profile(target, str(tiny_model_folder), {"ngram": known["ngram"]}) is None
    planner = make_planner(target, UnionDrafter(list(known.values())))
    assert planner.curve().ms([1], [10]) > 0.0
    assert planner.curve() is planner.curve()


@pytest.mark.parametrize("damage", ["truncated", "another drafter"])
def test_a_profile_of_no_use_is_left_alone_with_a_warning(
    damage: str, saved: tuple[Any, str, dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    target, name, named = saved
    path = profile_path(profile_key(target, name, named))
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        named = {name: ModelDrafter(wrap_model(tiny_llama(3, 1, vocab_size=280)))}
    with caplog.at_level(logging.WARNING):
        assert known_profile(target, name, named) is None
    assert "redwood calibrate" in caplog.text


def test_a_table_that_does_not_fit_is_left_out_with_a_warning(
    saved: tuple[Any, str, dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    target, name, named = saved
    profile = known_profile(target, name, named)
    assert profile is not None
    profile.drafters["ngram"].reliability["0"] = {"hits": [1.0], "trials": [1.0]}
    fresh = {"ngram": NgramDrafter()}
    before = fresh["ngram"].reliability.to_dict()
    with caplog.at_level(logging.WARNING):
        make_planner(target, fresh["ngram"], profile, fresh)
    assert fresh["ngram"].reliability.to_dict() == before
    assert "ngram" in caplog.text


def model(seed: int) -> ModelDrafter:
    return ModelDrafter(wrap_model(tiny_llama(seed, 1)))


@pytest.mark.parametrize(
    ("make", "arms"),
    [
        (lambda: UnionDrafter([model(1), NgramDrafter()]), 4),
        (lambda: [model(1), model(2)], 4),
        (lambda: [model(1), "ngram"], 4),
    ],
    ids=["a union", "two models", "a model and a name"],
)
def test_drafters_of_ones_own_all_become_arms(
    make: Callable[[], Any], arms: int, tiny_model_folder: Path
) -> None:
    engine = redwood.load(str(tiny_model_folder), make(), backend="eager")
    assert engine.planner is not None and len(engine.planner.arms) == arms
    plain = redwood.load(str(tiny_model_folder), backend="eager")
    prompt = [5, 9, 17, 5, 9, 17, 5, 9]
    settings: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0}
    assert (
        engine.generate(prompt, **settings).token_ids
        == plain.generate(prompt, **settings).token_ids
    )


@pytest.mark.parametrize("option", [{"draft_vocab": 64}, {"draft_weights": "int8"}])
@pytest.mark.parametrize("drafter", ["ngram", "model"])
def test_options_of_native_draft_models_are_refused_where_nothing_takes_them(
    option: dict[str, Any], drafter: str, tiny_model_folder: Path
) -> None:
    folder = str(tiny_model_folder)
    with pytest.raises(ArgumentError, match="draft on the native backend"):
        redwood.load(folder, folder if drafter == "model" else drafter, backend="eager", **option)


def test_a_window_is_taken_or_refused(tiny_model_folder: Path) -> None:
    folder = str(tiny_model_folder)

    def window(**option: Any) -> int | None:
        drafter = redwood.load(folder, folder, backend="eager", **option).drafter
        assert isinstance(drafter, ModelDrafter)
        return drafter.window

    assert [window(), window(draft_window=7), window(draft_window=None)] == [128, 7, None]
    for wrong in (0, "all", 2.5):
        with pytest.raises(ArgumentError, match="window"):
            redwood.load(folder, folder, backend="eager", draft_window=wrong)
    for drafter in (None, "ngram", model(1)):
        with pytest.raises(ArgumentError, match="draft_window"):
            redwood.load(folder, drafter, backend="eager", draft_window=64)


def test_what_was_measured_shapes_no_tree_of_a_seeded_text_without_coupling() -> None:
    target, params = (
        wrap_model(tiny_llama()),
        SamplingParams(temperature=0.9, seed=5, verifier="traversal", max_tokens=30),
    )

    def answer(acceptance: list[float] | None) -> list[int]:
        drafter = ModelDrafter(wrap_model(tiny_llama(3, 1)), width=32)
        drafter.acceptance = acceptance or drafter.acceptance
        engine = RowEngine(target, drafter, budget=8, planner=make_planner(target, drafter))
        engine.add([5, 9, 17, 33], params)
        return [token for _ in iter(lambda: engine.busy, False) for s in engine.step()
                for token in s.token_ids]  # fmt: skip

    assert answer([0.3, 0.3, 0.3]) == answer(None)
