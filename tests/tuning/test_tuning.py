"""Tuning: training on a learnable tiny target, boosting, measuring, files that resume or refuse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import redwood
from conftest import save_model, tiny_llama, tiny_tokenizer
from redwood import Engine
from redwood.bench.acceptance import Text, teacher_forced
from redwood.errors import ArgumentError, NumericalError
from redwood.profiling.profile import MeasuredAcceptance
from redwood.tuning import (
    Rates,
    Sample,
    Settings,
    TrainingHistory,
    agreement,
    boost,
    collect,
    measure,
    read_corpus,
    tune,
    union_rates,
)
from redwood.tuning.packing import pack, row_logits
from redwood.tuning.training import learning_rate, row_loss

QUICK = Settings(epochs=5, learning_rate=2e-2, batch_tokens=128)


def peaked(spread: float = 3.0) -> Any:
    """A target that says 16 tokens only, the next one mostly by the last: soon learned."""
    model = tiny_llama(0, 2)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.05)
            layer.mlp.down_proj.weight.mul_(0.05)
        model.lm_head.weight.mul_(spread)
        model.lm_head.weight[:20] = 0.0
        model.lm_head.weight[36:] = 0.0
    return model


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `target` and `start`."""
    folder = tmp_path_factory.mktemp("tuning")
    save_model(folder / "target", peaked(), tiny_tokenizer())
    save_model(folder / "start", fresh(), tiny_tokenizer())
    return folder


def fresh() -> Any:
    return tiny_llama(7, 1, initializer_range=0.1)


@pytest.fixture(scope="module")
def engine(places: Path) -> Engine:
    return redwood.load(str(places / "target"), "ngram")


PROMPTS: list[list[int]] = np.random.default_rng(0).integers(20, 36, (40, 5)).tolist()


@pytest.fixture(scope="module")
def greedy(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    return collect(engine, PROMPTS, tmp_path_factory.mktemp("c"), key="g", max_tokens=16, top=5)


@pytest.fixture(scope="module")
def sampled(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    folder = tmp_path_factory.mktemp("c")
    return collect(engine, PROMPTS, folder, key="s", max_tokens=16, temperature=1.0, seed=3)


def all_ones(samples: Sequence[Sample]) -> list[NDArray[np.float32]]:
    return [np.ones(len(sample.answer), np.float32) for sample in samples]


def share(marks: Sequence[NDArray[np.bool_]]) -> float:
    return float(np.concatenate(marks).mean())


def trained(samples: Sequence[Sample], settings: Settings = QUICK, **more: Any) -> Any:
    model = fresh()
    ours, check = samples[:28], samples[28:34]
    weights = more.pop("weights", all_ones(ours))
    tune(model, ours, weights, check, all_ones(check), settings, **more)
    return model


# --- the corpus ------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_collected_answers_are_those_of_plain_decoding(
    engine: Engine, places: Path, tmp_path: Path, temperature: float
) -> None:
    plain = redwood.load(str(places / "target"))
    how = dict(max_tokens=12, temperature=temperature)
    made = collect(engine, PROMPTS[:10], tmp_path, key="a", seed=5, top=3, **how)
    for number, sample in enumerate(made):
        seed = {"seed": 5 + number} if temperature else {}
        alone = plain.generate(sample.prompt, **how, **seed, logprobs=3)
        assert (sample.prompt, sample.answer) == (PROMPTS[number], alone.token_ids)
        assert alone.logprobs is not None
        for row, entry in enumerate(alone.logprobs):
            assert sample.top_ids[row].tolist() == [token for token, _ in entry.top]
            logprobs = [logprob for _, logprob in entry.top]
            assert sample.top_logprobs[row] == pytest.approx(logprobs, abs=1e-5)


def test_an_interrupted_collection_goes_on_where_it_was(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = collect(engine, PROMPTS[:20], tmp_path / "whole", key="a", max_tokens=8)

    def interrupt(what: str, done: int, of: int) -> None:
        if done == 16:
            raise KeyboardInterrupt

    how: dict[str, Any] = dict(key="a", max_tokens=8)
    with pytest.raises(KeyboardInterrupt):
        collect(engine, PROMPTS[:20], tmp_path / "cut", on_progress=interrupt, **how)
    added: list[int] = []
    add = Engine.add
    monkeypatch.setattr(Engine, "add", lambda *a, **k: added.append(1) or add(*a, **k))
    again = collect(engine, PROMPTS[:20], tmp_path / "cut", **how)
    assert len(added) == 4
    assert [s.answer for s in again] == [s.answer for s in whole]
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "cut" / file.name).read_bytes()
    assert [s.prompt for s in read_corpus(tmp_path / "cut", "a")] == PROMPTS[:20]


def test_damaged_and_foreign_files_of_a_corpus_are_refused(engine: Engine, tmp_path: Path) -> None:
    how: dict[str, Any] = dict(max_tokens=4)
    collect(engine, PROMPTS[:3], tmp_path, key="a", **how)
    (file,) = tmp_path.iterdir()
    with pytest.raises(ArgumentError, match="is of another run"):
        collect(engine, PROMPTS[:3], tmp_path, key="b", **how)
    with pytest.raises(ArgumentError, match="holds other prompts"):
        collect(engine, PROMPTS[3:6], tmp_path, key="a", **how)
    good = file.read_bytes()
    for bad in (good[:-9], b"", good[:-1] + bytes([good[-1] ^ 1])):
        file.write_bytes(bad)
        with pytest.raises(ArgumentError, match=rf"{file} is damaged .*: remove it"):
            collect(engine, PROMPTS[:3], tmp_path, key="a", **how)
    with pytest.raises(ArgumentError, match="no prompts"):
        collect(engine, [], tmp_path, key="a")


# --- packing, marks, losses ------------------------------------------------------------------


def direct_logits(model: Any, sample: Sample) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([sample.prompt + sample.answer[:-1]])).logits[0]
    return torch.as_tensor(logits[len(sample.prompt) - 1 :])


def test_packed_rows_give_the_logits_of_the_samples_alone(greedy: list[Sample]) -> None:
    model, order = fresh(), [3, 0, 5, 1]
    (row,) = pack(greedy, order, 1000, 256)
    with torch.no_grad():
        logits = row_logits(model, row)
    alone = torch.cat([direct_logits(model, greedy[number]) for number in order])
    assert torch.allclose(logits, alone, atol=1e-4)
    assert [place.sample for place in row.places[:1]] == [3]


def test_rows_keep_to_their_size_and_leave_out_what_weighs_nothing(greedy: list[Sample]) -> None:
    rows = list(pack(greedy, range(10), 45, 256))
    assert len(rows) == 5 and all(len(row.tokens) <= 45 for row in rows)
    weights = all_ones(greedy)
    weights[0][:] = 0.0
    weights[1][3:] = 0.0
    (row,) = pack(greedy, [0, 1], 1000, 256, weights)
    assert [tuple(place) for place in row.places] == [(1, 0), (1, 1), (1, 2)]
    assert row.tokens == greedy[1].prompt + greedy[1].answer[:2]
    (short,) = pack(greedy, [2], 1000, 7)
    assert len(short.tokens) == 7 and len(short.places) == 3
    assert list(pack(greedy, [2], 1000, 3)) == []


def test_marks_are_where_the_best_token_is_the_answers(sampled: list[Sample]) -> None:
    model = peaked()
    marks = agreement(model, sampled, most_tokens=50)
    for sample, marked in zip(sampled, marks, strict=True):
        best = direct_logits(model, sample).argmax(-1).tolist()
        assert marked.tolist() == [a == b for a, b in zip(best, sample.answer, strict=True)]
    assert 0.1 < share(marks) < 0.95


def test_the_loss_is_the_weighted_cross_entropy(greedy: list[Sample]) -> None:
    model, weights = fresh(), all_ones(greedy)
    weights[1][2] = 0.5
    (row,) = pack(greedy, [0, 1], 1000, 256, weights)
    logits = row_logits(model, row)
    loss, mass = row_loss(logits, row, greedy, weights, distill=False)
    wanted = 0.0
    for number in (0, 1):
        law = direct_logits(model, greedy[number]).log_softmax(-1)
        for at, token in enumerate(greedy[number].answer):
            wanted -= float(weights[number][at]) * float(law[at, token])
    assert float(loss.detach()) == pytest.approx(wanted, rel=1e-4)
    assert mass == sum(len(greedy[number].answer) for number in (0, 1)) - 0.5
    cut, less = row_loss(logits[:, :30], row, greedy, weights, distill=False)
    assert math.isfinite(float(cut.detach())) and less < mass  # tokens that it cannot say


def test_distillation_is_the_cross_entropy_over_kept_tokens_and_the_rest(
    greedy: list[Sample],
) -> None:
    model, weights = fresh(), all_ones(greedy)
    (row,) = pack(greedy, [4], 1000, 256)
    loss, _ = row_loss(row_logits(model, row), row, greedy, weights, distill=True)
    sample, wanted = greedy[4], 0.0
    ours = direct_logits(model, sample).double().softmax(-1).numpy()
    for at in range(len(sample.answer)):
        ids, probs = sample.top_ids[at], np.exp(sample.top_logprobs[at].astype(np.float64))
        own = ours[at, ids]
        wanted -= float((probs * np.log(own)).sum())
        wanted -= float((1.0 - probs.sum()) * np.log(1.0 - own.sum()))
    assert float(loss.detach()) == pytest.approx(wanted, rel=1e-3)


def test_the_rate_rises_and_then_falls_as_a_cosine() -> None:
    how = Settings(learning_rate=2.0, warm_up=0.5)
    rates = [learning_rate(how, at) for at in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert rates == pytest.approx([0.0, 1.0, 2.0, 1.0, 0.0])
    assert learning_rate(Settings(learning_rate=2.0, warm_up=0.0), 0.0) == 2.0


# --- training --------------------------------------------------------------------------------


@pytest.mark.parametrize("distill", [False, True])
def test_training_raises_acceptance_on_held_out_prompts(
    greedy: list[Sample], distill: bool
) -> None:
    how = Settings(**{**vars(QUICK), "distill": distill})
    before, after = (share(agreement(m, greedy[34:])) for m in (fresh(), trained(greedy, how)))
    assert before < 0.1 and after > before + 0.3, (before, after)


def test_a_seed_fixes_the_result_and_an_interrupted_training_ends_alike(
    greedy: list[Sample], tmp_path: Path
) -> None:
    state = tmp_path / "state"
    once = trained(greedy).state_dict()
    calls: list[str] = []

    def interrupt(what: str, done: int, of: int) -> None:
        calls.append(what)
        if what.startswith("Epoch 3") and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(greedy, checkpoint=state, key="k", on_progress=interrupt)
    later: list[str] = []
    told = dict(on_progress=lambda what, done, of: later.append(what))
    resumed = trained(greedy, checkpoint=state, key="k", **told).state_dict()
    assert later[0].startswith("Epoch 3")
    assert all(torch.equal(once[name], resumed[name]) for name in once)
    other = trained(greedy, Settings(**{**vars(QUICK), "seed": 1})).state_dict()
    assert not all(torch.equal(once[name], other[name]) for name in once)

    with pytest.raises(ArgumentError, match="is of another run"):
        trained(greedy, checkpoint=state, key="other")
    state.write_bytes(state.read_bytes()[:-5])
    with pytest.raises(ArgumentError, match="is damaged .*: remove it"):
        trained(greedy, checkpoint=state, key="k")


def test_the_best_epoch_is_kept_and_training_ends_when_nothing_is_gained(
    greedy: list[Sample],
) -> None:
    model, before = fresh(), fresh().state_dict()
    wrong = [Sample.of(sample.prompt, [299] * len(sample.answer)) for sample in greedy[:6]]
    how = Settings(epochs=9, learning_rate=1e-2, patience=2)  # learns what validation never has
    history = tune(model, wrong, all_ones(wrong), greedy[:4], all_ones(greedy[:4]), how)
    assert (history.best, len(history.losses), len(history.scores)) == (0, 2, 3)
    assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())


def test_a_training_that_diverges_is_refused(greedy: list[Sample]) -> None:
    model = fresh()
    with torch.no_grad():
        model.lm_head.weight[5, 5] = math.nan
    with pytest.raises(NumericalError, match="epoch 1, step 1: the loss is nan.*lower the learn"):
        tune(model, greedy, all_ones(greedy), greedy[:2], all_ones(greedy[:2]), QUICK)


def test_what_cannot_be_trained_on_is_refused(sampled: list[Sample]) -> None:
    nothing = [0.0 * weights for weights in all_ones(sampled)]
    with pytest.raises(ArgumentError, match="no token to learn from"):
        tune(fresh(), sampled, nothing, sampled, nothing, QUICK)
    with pytest.raises(ArgumentError, match="needs the target's probabilities"):
        trained(sampled, Settings(distill=True))
    for wrong in ({"epochs": 0}, {"learning_rate": math.nan}, {"warm_up": 1.0}, {"seed": -1}):
        with pytest.raises(ArgumentError, match=next(iter(wrong))):
            Settings(**wrong)


# --- boosting --------------------------------------------------------------------------------


def test_every_round_gets_what_no_earlier_model_knows(sampled: list[Sample]) -> None:
    ours, check, models = sampled[:28], sampled[28:34], [peaked(), fresh(), fresh()]
    given: list[list[NDArray[np.float32]]] = []

    def train(number: int, weights: Any, validation: Any) -> tuple[Any, TrainingHistory]:
        given.append(weights)
        assert [len(w) for w in validation] == [len(s.answer) for s in check]
        return models[number], TrainingHistory([0.0])

    rounds = boost(3, ours, check, train, marked_weight=0.25)
    first, second = (agreement(model, ours) for model in models[:2])
    assert all((weights == 1.0).all() for weights in given[0])
    for weights, known in zip(given[1], first, strict=True):
        assert weights.tolist() == np.where(known, 0.25, 1.0).tolist()
    for weights, a, b in zip(given[2], first, second, strict=True):
        assert weights.tolist() == np.where(a | b, 0.25, 1.0).tolist()
    tokens = sum(len(sample.answer) for sample in ours)
    assert [(r.left, r.of) for r in rounds[:2]] == [
        (tokens, tokens),
        (tokens - sum(int(m.sum()) for m in first), tokens),
    ]
    with pytest.raises(ArgumentError, match="marked_weight 1"):
        boost(1, ours, check, train, marked_weight=1.0)


def test_boosting_ends_when_nothing_is_left(places: Path, tmp_path: Path) -> None:
    same = redwood.load(str(places / "target"), backend="eager")
    own = collect(same, PROMPTS[:4], tmp_path, key="e", max_tokens=8)
    target = peaked()  # knows every answer of its own
    made = boost(3, own, own[:2], lambda number, weights, check: (target, TrainingHistory()))
    assert [each.left for each in made] == [sum(len(sample.answer) for sample in own)]


def test_boosted_models_cover_more_than_the_same_model_twice(sampled: list[Sample]) -> None:
    ours, check, held = sampled[:28], sampled[28:34], sampled[34:]
    models: list[Any] = []

    def train(number: int, weights: Any, validation: Any) -> tuple[Any, TrainingHistory]:
        model = fresh()
        history = tune(model, ours, weights, check, validation, QUICK)
        models.append(model)
        return model, history

    rounds = boost(2, ours, check, train)
    assert 0 < rounds[1].left < rounds[0].left
    first, second = (agreement(model, held) for model in models)
    both = [a | b for a, b in zip(first, second, strict=True)]
    assert share(both) > share(first) + 0.05, (share(first), share(second), share(both))


# --- measuring -------------------------------------------------------------------------------


def test_measured_rates_are_those_of_calibration(
    engine: Engine, places: Path, greedy: list[Sample]
) -> None:
    texts = [Text(sample.prompt, sample.answer) for sample in greedy[:5]]
    draft = redwood.load(str(places / "start")).target
    rates = measure(engine.target, draft, texts)
    assert rates.acceptance == teacher_forced(engine.target, draft, texts, 0.0)
    assert [each.tolist() for each in rates.wanted] == [text.answer for text in texts]
    assert union_rates([rates, rates]) == rates.acceptance


def of(ids: list[list[int]], wanted: list[int]) -> Rates:
    none = MeasuredAcceptance([0.0], [0.0], 0, "teacher-forced")
    return Rates(none, [np.array(ids)], [np.array(wanted)])


def test_a_union_takes_turns_and_counts_a_token_once() -> None:
    wanted = [3, 5, 9, 8]
    a = of([[1, 2, 3], [5, 1, 2], [1, 2, 3], [8, 1, 2]], wanted)
    b = of([[1, 3, 4], [6, 5, 4], [4, 5, 6]], wanted[:3])  # its context is shorter
    union = union_rates([a, b], ranks=3)
    # candidates: 1 2 3; 5 6 1; 1 4 2; 8 1 2
    assert union.rates == pytest.approx([0.5, 0.0, 0.25]) and union.trials == 4
