"""From logits to probabilities: parameters, processors, rows per path, noise, draws."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from redwood.errors import ArgumentError, NumericalError
from redwood.sampling import (
    GumbelNoise,
    History,
    PathRows,
    SamplingParams,
    draft_law,
    draw,
    kernels,
    probs_from_scores,
    scores,
)
from redwood.tree import TokenTree

NONE = History([])
LAST = float(np.nextafter(1.0, 0.0))


def rows(count: int, size: int, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(count, size, generator=generator, dtype=torch.float64)


# ------------------------------------------------------------------ parameters


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("max_tokens", v) for v in (0, -1, 1.5, True, None)),
        *(("temperature", v) for v in (-0.1, math.nan, math.inf, True, "1", None, 10**400)),
        *(("top_k", v) for v in (-1, 2.0, True)),
        *(("top_p", v) for v in (0, 0.0, 1.01, -1.0, math.nan, True)),
        *(("min_p", v) for v in (-0.01, 1.01, math.nan)),
        *(("repetition_penalty", v) for v in (0, -1.0, math.inf, math.nan)),
        *(("presence_penalty", v) for v in (-2.1, 2.1, math.nan)),
        *(("frequency_penalty", v) for v in (-2.1, 2.1, True)),
        *(("seed", v) for v in (True, 1.0, 2**64, -(2**64), "1")),
        *(("stop", v) for v in ("", ["a", ""], [1])),
        *(("verifier", v) for v in ("naive", "", None, 1)),
        *(("logit_bias", v) for v in ({-1: 0.0}, {"5": 0.0}, {True: 0.0})),
        *(("logit_bias", {5: v}) for v in (math.nan, math.inf, "a", None, 10**400)),
    ],
)
def test_bad_value_is_refused_by_its_name(name: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=name):
        SamplingParams(**{name: value})


def test_borders_of_the_ranges_are_taken() -> None:
    SamplingParams(temperature=0, top_p=1, min_p=0, presence_penalty=-2, frequency_penalty=2)
    SamplingParams(max_tokens=1, min_p=1.0, top_p=1e-9, temperature=1e-6, seed=-(2**64) + 1)
    SamplingParams(seed=2**64 - 1, logit_bias={0: -100.0, 5: 100})


def test_stop_is_a_tuple_whatever_was_given() -> None:
    stops: list[Any] = ["end", ["a", "b"], (), None]
    assert [SamplingParams(stop=s).stop for s in stops] == [("end",), ("a", "b"), (), ()]


def test_a_seed_makes_coupled_the_default() -> None:
    assert not SamplingParams().coupled
    assert SamplingParams(seed=0).coupled
    assert not SamplingParams(seed=0, verifier="traversal").coupled
    assert SamplingParams(verifier="coupled").coupled


def test_penalties_need_the_history_and_nothing_else_does() -> None:
    assert not SamplingParams(temperature=1, top_k=3, logit_bias={1: 2.0}).needs_history
    for name, value in (("repetition", 1.1), ("presence", -0.5), ("frequency", 0.1)):
        assert SamplingParams(**{f"{name}_penalty": value}).needs_history


# ------------------------------------------------------------------ processors


@pytest.mark.parametrize("seed", range(12))
def test_probabilities_equal_those_of_transformers(seed: int) -> None:
    rng = np.random.default_rng(seed)
    size = 40
    prompt, output = rng.integers(size, size=6).tolist(), rng.integers(size, size=5).tolist()
    params = SamplingParams(
        temperature=float(rng.choice([0.3, 0.7, 1.0, 2.5])),
        top_k=int(rng.choice([0, 1, 5, 30, 100])),
        top_p=float(rng.choice([0.1, 0.6, 0.95, 1.0])),
        min_p=float(rng.choice([0.0, 0.02, 0.3])),
        repetition_penalty=float(rng.choice([1.0, 1.3, 0.8])),
    )
    theirs = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(params.repetition_penalty)])
    theirs.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        theirs.append(TopKLogitsWarper(params.top_k))
    theirs.append(TopPLogitsWarper(params.top_p))
    theirs.append(MinPLogitsWarper(params.min_p))
    history = History(prompt)
    history.extend(output[:2])
    for row in rows(20, size, seed):
        mine = probs_from_scores(scores(row, params, history, output[2:]), params)
        ids = torch.tensor([prompt + output])
        torch.testing.assert_close(
            mine, theirs(ids, row[None].clone()).softmax(-1)[0], rtol=1e-12, atol=1e-15
        )


def test_presence_and_frequency_follow_the_formula_on_output_tokens_only() -> None:
    params = SamplingParams(temperature=1.0, presence_penalty=0.5, frequency_penalty=0.25)
    history = History([0, 1])
    history.extend([2, 2])
    row = torch.zeros(6)
    got = scores(row, params, history, path=[2, 3])
    assert got.tolist() == [0.0, 0.0, -0.5 - 3 * 0.25, -0.5 - 0.25, 0.0, 0.0]
    assert not row.any()  # the logits given are not changed


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("factor", [5e-324, 1e-300, 1e308])
def test_an_extreme_repetition_penalty_leaves_numbers(factor: float, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, repetition_penalty=factor)
    row = scores(torch.tensor([4.0, -3.0, 0.0, 1.0]), params, History([0, 1, 2]))
    assert row.isfinite().all()
    law = probs_from_scores(row, params)
    assert law.sum() == pytest.approx(1.0)
    assert int(law.argmax()) == (0 if factor < 1.0 else 3)


def test_logit_bias_is_added_after_the_penalties_and_before_the_temperature() -> None:
    params = SamplingParams(temperature=2.0, repetition_penalty=2.0, logit_bias={0: 3.0})
    row = scores(torch.tensor([4.0, 0.0]), params, History([0]))
    assert row.tolist() == [4.0 / 2.0 + 3.0, 0.0]
    expected = torch.softmax(torch.tensor([2.5, 0.0], dtype=torch.float64), 0)
    torch.testing.assert_close(probs_from_scores(row, params), expected)


def test_logit_bias_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(ArgumentError, match="token 3 is outside the vocabulary of 3"):
        scores(torch.zeros(3), SamplingParams(logit_bias={3: 1.0}), NONE)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_logits_that_are_no_numbers_raise(bad: float, dtype: torch.dtype) -> None:
    row = torch.zeros(2, 5, dtype=dtype)
    row[1, 3] = bad
    with pytest.raises(NumericalError, match="NaN or infinite"):
        scores(row[1], SamplingParams(), NONE)
    with pytest.raises(NumericalError):
        PathRows(row, TokenTree.chain([0, 1]), SamplingParams(), NONE).best(0)


def test_temperature_zero_is_the_first_arg_max() -> None:
    row = torch.tensor([0.0, 2.0, 2.0], dtype=torch.float64)
    assert probs_from_scores(row, SamplingParams()).tolist() == [0.0, 1.0, 0.0]


def test_tiny_and_huge_temperatures_stay_finite() -> None:
    for row in rows(5, 50, spread=30.0):
        for temperature in (5e-324, 1e-300, 1e-6):
            got = probs_from_scores(row, SamplingParams(temperature=temperature))
            assert got[row.argmax()] == 1.0 and got.sum() == 1.0
        flat = probs_from_scores(row, SamplingParams(temperature=1e300))
        torch.testing.assert_close(flat, torch.full_like(row, 1 / 50))


def test_ties_at_the_border_of_top_k_are_all_kept() -> None:
    row = torch.tensor([3.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    got = probs_from_scores(row, SamplingParams(temperature=1.0, top_k=2))
    assert (got > 0).tolist() == [True, True, True, False]


def test_top_p_border_may_lie_beyond_the_first_candidates_looked_at() -> None:
    for row in rows(3, 3000, spread=0.3):
        for top_p in (0.05, 0.5, 0.99, 1.0 - 1e-12):
            mine = probs_from_scores(row, SamplingParams(temperature=1.0, top_p=top_p))
            theirs = TopPLogitsWarper(top_p)(torch.empty(0), row[None].clone()).softmax(-1)[0]
            torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=0)
    assert (probs_from_scores(row, SamplingParams(temperature=1.0, top_p=0.5)) > 0).sum() > 512


@pytest.mark.parametrize("seed", range(8))
def test_draft_law_of_full_width_is_the_target_law(seed: int) -> None:
    rng = np.random.default_rng(seed)
    params = SamplingParams(
        temperature=float(rng.choice([0.3, 1.0, 1.7])),
        top_k=int(rng.choice([0, 3, 10])),
        top_p=float(rng.choice([0.3, 0.8, 1.0])),
        min_p=float(rng.choice([0.0, 0.05])),
    )
    given = rows(15, 24, seed)
    for width in (24, 1000):
        probs, ids = draft_law(given, params, width)
        for row, row_probs, row_ids in zip(given, probs, ids, strict=True):
            spread = torch.zeros(24, dtype=torch.float64).scatter(0, row_ids, row_probs)
            torch.testing.assert_close(
                spread, probs_from_scores(row, params), rtol=1e-12, atol=1e-15
            )


def test_narrow_draft_law_holds_the_best_tokens_in_order_and_sums_to_one() -> None:
    given = rows(4, 30).float()
    probs, ids = draft_law(given, SamplingParams(temperature=0.8, top_p=0.9), 5)
    assert probs.shape == ids.shape == (4, 5) and probs.dtype == torch.float64
    torch.testing.assert_close(probs.sum(-1), torch.ones(4, dtype=torch.float64))
    assert (probs.diff(dim=-1) <= 0).all()
    torch.testing.assert_close(ids, given.topk(5).indices)


# ------------------------------------------------------------------ rows per path


def test_path_rows_are_the_rows_of_the_path_once_committed() -> None:
    params = SamplingParams(
        temperature=0.9,
        top_p=0.95,
        repetition_penalty=1.2,
        presence_penalty=0.4,
        frequency_penalty=0.3,
        logit_bias={4: 1.0},
    )
    tree = TokenTree.point([9, 4, 4, 7, 4], [-1, 0, 1, 1, 2])
    logits, history = rows(5, 12).float(), History([9, 1])
    history.extend([4])
    got = PathRows(logits, tree, params, history)
    for node in range(5):
        committed = History([9, 1])
        committed.extend([4, *(tree.token_list[i] for i in tree.path(node)[1:])])
        row = scores(logits[node], params, committed)
        np.testing.assert_array_equal(got[node], probs_from_scores(row, params).numpy())
        assert got.best(node) == int(row.argmax())


def test_best_is_the_arg_max_at_temperature_zero() -> None:
    logits, tree = rows(3, 8).float(), TokenTree.chain([0, 1, 2])
    logits[1, [2, 5]] = 100.0  # a tie
    for params in (SamplingParams(), SamplingParams(logit_bias={0: 0.0})):
        got = PathRows(logits, tree, params, NONE)
        assert [got.best(n) for n in range(3)] == logits.argmax(-1).tolist()
        assert [int(got[n].argmax()) for n in range(3)] == logits.argmax(-1).tolist()
        assert got.best(1) == 2


# ------------------------------------------------------------------ noise and draws


def test_noise_depends_on_seed_and_position_only() -> None:
    noise, other = GumbelNoise(3, 100), GumbelNoise(3, 100)
    in_order = [noise(position).copy() for position in range(6)]
    for position in (5, 0, 3, 3, 1):
        np.testing.assert_array_equal(noise(position), in_order[position])
        np.testing.assert_array_equal(other(position), in_order[position])
    seeds = [GumbelNoise(seed, 100)(0) for seed in (3, 4, -1, -2, 0)]
    firsts = {float(row[0]) for row in [*in_order, *seeds]}
    assert len(firsts) == 6 + 5 - 1
    assert all(np.isfinite(row).all() for row in seeds)


def test_a_smaller_vocabulary_sees_the_same_noise() -> None:
    np.testing.assert_array_equal(GumbelNoise(1, 8)(7), GumbelNoise(1, 50)(7)[:8])


def test_noise_is_finite_at_the_ends_of_the_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ends:
        def __init__(self, **_: Any) -> None: ...

        def random_raw(self, size: int) -> np.ndarray:
            return np.array([0, 2**64 - 1], dtype=np.uint64)

    monkeypatch.setattr(np.random, "Philox", Ends)
    assert np.isfinite(GumbelNoise(0, 2)(0)).all()


def test_arg_max_of_log_probability_and_noise_follows_the_probabilities() -> None:
    probs, count = np.array([0.5, 0.25, 0.15, 0.07, 0.03]), 6000
    noise = GumbelNoise(11, len(probs))
    picks = [int(np.argmax(np.log(probs) + noise(position))) for position in range(count)]
    seen = np.bincount(picks, minlength=len(probs))
    distance = float(((seen - count * probs) ** 2 / (count * probs)).sum())
    assert distance < chi2.isf(1e-4, len(probs) - 1)
    pairs = np.bincount([5 * a + b for a, b in zip(picks[:-1:2], picks[1::2], strict=True)])
    expected = count / 2 * np.outer(probs, probs).ravel()
    both = np.pad(pairs, (0, 25 - len(pairs)))
    many = expected > 5  # neighbouring positions are independent
    assert ((both - expected) ** 2 / expected)[many].sum() < chi2.isf(1e-4, int(many.sum()))


def test_draw_is_monotone_and_gives_each_token_its_share() -> None:
    rng = np.random.default_rng(0)
    for size in (1, 2, 7, 100):
        probs = rng.dirichlet(np.ones(size)) * rng.uniform(0.1, 5.0)
        uniforms = np.linspace(0.0, LAST, 4001)
        tokens = [draw(probs, float(u)) for u in uniforms]
        assert tokens == sorted(tokens)
        shares = np.bincount(tokens, minlength=size) / len(tokens)
        np.testing.assert_allclose(shares, probs / probs.sum(), atol=1e-3)


@pytest.mark.parametrize("uniform", [0.0, 5e-324, 0.25, 0.5, 1 - 1e-16, LAST])
@pytest.mark.parametrize(
    "probs",
    [
        [0.0, 1.0, 0.0],
        [0.0, 0.5, 0.0, 0.5, 0.0],
        [0.7, 0.0],
        [0.0, 0.0, 1e-300],
        [0.0, 5e-324, 0.0],
        [0.1] * 10 + [0.0],
        [1 / 3, 1 / 3, 1 / 3, 0.0],
        [0.3, 0.3, 1e-20, 0.0],
    ],
)
def test_draw_never_gives_a_token_of_no_probability(probs: list[float], uniform: float) -> None:
    assert probs[draw(np.array(probs), uniform)] > 0.0


def test_draw_at_both_ends_gives_the_first_and_the_last_token() -> None:
    probs = np.array([0.0, 0.2, 0.3, 0.5, 0.0])
    assert (draw(probs, 0.0), draw(probs, LAST)) == (1, 3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("logit_bias", "x"),
        ("logit_bias", [1]),
        ("stop", 5),
        ("stop", True),
        ("ignore_eos", "no"),
        ("logits_processor", 2.5),
    ],
)
def test_parameters_of_the_wrong_kind_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=name):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("given", [None, torch.zeros(1, 3), torch.zeros(4)])
def test_a_processor_that_returns_no_scores_is_named(given: Any) -> None:
    params = SamplingParams(logits_processor=lambda ids, row: given)
    with pytest.raises(ArgumentError, match="logits_processor"):
        scores(torch.zeros(4), params, History([1]))


@pytest.mark.parametrize("size", [1, 12, 200, 9000])
@pytest.mark.parametrize("more", [-1, 0, 1, 8, 10**6])
def test_the_top_of_a_row_is_all_of_it_where_more_is_asked_for(size: int, more: int) -> None:
    row = np.random.default_rng(size).normal(size=size).round(1)
    count = max(0, size + more)
    values, ids = kernels.top(row, count)
    order = np.argsort(-row, kind="stable")[:count]
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_array_equal(values, row[order])
    assert len(kernels.top(row, 0)[1]) == 0
