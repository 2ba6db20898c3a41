"""Compiled passes over rows of the vocabulary equal the NumPy reference, bit for bit."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from redwood.drafters.context import Context
from redwood.engine.verification import verify_rows
from redwood.errors import NumericalError
from redwood.sampling import History, PathRows, SamplingParams, draft_law, draw, kernels, top
from redwood.sampling import _kernels_numpy as reference
from redwood.sampling.noise import GumbelNoise, coupled_choice
from redwood.tree import TokenTree

needs_native = pytest.mark.skipif(not kernels.compiled, reason="installed without a compiler")
FULL = 151_936
SIZES = [1, 2, 3, 7, 8, 15, 16, 31, 32, 33, 63, 64, 65, 127, 130, 1000, 1023, 1025, 8191, 8193]
Row = NDArray[np.float64]


def shaped(size: int, seed: int, kind: str, dtype: Any = np.float32) -> NDArray[Any]:
    """A row of logits of one kind."""
    rng = np.random.default_rng([size, seed])
    row = 3.0 * rng.standard_normal(size)
    if kind == "tied":
        row = np.round(row)
    elif kind == "flat":
        row[:] = 0.25
    elif kind == "huge":
        row *= 1e37
    elif kind == "denormal":
        row *= 1e-40
    elif kind == "peaked":
        row[rng.integers(size)] += 25.0
    elif kind == "masked":
        row[rng.random(size) < 0.7] = -math.inf
        row[rng.integers(size)] = 1.0
    elif kind == "one finite":
        row[:] = -math.inf
        row[rng.integers(size)] = -7.0
    return row.astype(dtype)


KINDS = ["random", "tied", "flat", "huge", "denormal", "peaked", "masked", "one finite"]


def weights_of(row: NDArray[Any], temperature: float) -> tuple[Row, float]:
    out = np.empty(len(row))
    return out, reference.weigh(row, float(row.max()), temperature, out)


# ------------------------------------------------------------------ one pass at a time


@needs_native
@pytest.mark.parametrize("kind", KINDS)
def test_the_best_few_are_those_of_the_reference(kind: str) -> None:
    for size in [*SIZES, FULL]:
        rows = np.stack([shaped(size, seed, kind) for seed in (1, 2)])
        for count in {1, min(4, size), size if size < 100 else 16}:
            found = kernels.best_few(rows, count)
            ids, probs = np.empty((2, count), np.int32), np.empty((2, count), np.float32)
            if not reference.best_few(rows, ids, probs):
                assert found is None and not np.isfinite(rows).all()
                continue
            assert found is not None
            np.testing.assert_array_equal(found[0], ids)
            # Blocks far below the best value are left out of the sum, and its exp is rough.
            np.testing.assert_allclose(found[1], probs, rtol=0.03, atol=1e-3)
            if size <= 512:
                np.testing.assert_allclose(found[1], probs, rtol=2e-4, atol=1e-30)


@needs_native
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_weights_and_range_are_those_of_the_reference(kind: str, dtype: Any) -> None:
    for size in [*SIZES, FULL]:
        row = shaped(size, 1, kind, dtype)
        held = kernels.row_range(row)
        assert held == (row.min(), row.max(), int(row.argmax()))
        for temperature in (1.0, 0.7, 1e-3, 5e-324, 1e300) if size < FULL else (0.8,):
            got, mass = kernels.weigh(row, held.high, temperature)
            expected, expected_mass = weights_of(row, temperature)
            np.testing.assert_array_equal(got, expected)
            assert mass == expected_mass


def test_weights_are_exponentials_and_their_sum() -> None:
    for kind in KINDS:
        for size in (1, 65, 8193):
            row = shaped(size, 2, kind, np.float64)
            got, mass = kernels.weigh(row, float(row.max()), 0.7)
            with np.errstate(over="ignore"):
                exact = np.exp((row - row.max()) / 0.7)
            exact[exact < math.exp(-708.0)] = 0.0
            np.testing.assert_allclose(got, exact, rtol=4e-16, atol=0)
            assert got.max() == 1.0 and mass == pytest.approx(math.fsum(exact), rel=1e-14)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_no_number_hides_in_any_place(bad: float, dtype: Any) -> None:
    for size in SIZES:
        for place in {0, size // 2, size - 1}:
            row = shaped(size, 3, "random", dtype)
            row[place] = bad
            assert not kernels.row_range(row).finite


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_that_are_used_are_checked(temperature: float, bad: float) -> None:
    logits = torch.zeros(2, 100)
    logits[1, 70] = bad
    params = SamplingParams(temperature=temperature, ignore_eos=True)
    with pytest.raises(NumericalError, match="NaN or infinite"):
        PathRows(logits, TokenTree.chain([0, 1]), params, History([0]))[1]


@needs_native
@settings(max_examples=300, deadline=None)
@given(
    size=st.one_of(st.integers(1, 200), st.sampled_from(SIZES)),
    seed=st.integers(0, 1000),
    kind=st.sampled_from(KINDS),
    temperature=st.sampled_from([0.05, 0.7, 1.0, 3.0, 1e300]),
    top_k=st.sampled_from([0, 1, 2, 5, 50, 150, 10**6, 2**70]),
    top_p=st.sampled_from([1e-9, 0.1, 0.5, 0.9, 0.95, 1.0 - 1e-12, 1.0]),
    min_p=st.sampled_from([0.0, 1e-300, 0.05, 0.5, 1.0]),
)
def test_truncation_is_that_of_the_reference(
    size: int, seed: int, kind: str, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    got, mass = weights_of(shaped(size, seed, kind), temperature)
    expected = got.copy()
    kept = kernels.truncate(got, mass, top_k, top_p, min_p)
    assert kept == reference.truncate(expected, mass, top_k, top_p, min_p)
    np.testing.assert_array_equal(got, expected)
    assert got.max() == 1.0


@needs_native
@pytest.mark.parametrize("kind", ["random", "tied", "peaked", "flat"])
def test_truncation_of_whole_rows_is_that_of_the_reference(kind: str) -> None:
    weights, mass = weights_of(shaped(FULL, 4, kind), 1.3)
    for top_k, top_p, min_p in (
        *((50, 1.0, 0.0), (0, 0.95, 0.0), (50, 0.9, 0.02), (5000, 0.99, 0.0)),
        *((0, 1.0 - 1e-12, 0.0), (100_000, 0.7, 0.0), (0, 1.0, 0.1), (FULL, 0.5, 0.0)),
    ):
        got, expected = weights.copy(), weights.copy()
        assert kernels.truncate(got, mass, top_k, top_p, min_p) == reference.truncate(
            expected, mass, top_k, top_p, min_p
        )
        np.testing.assert_array_equal(got, expected)


def test_truncation_keeps_what_a_full_sort_says() -> None:
    for seed in range(20):
        weights, mass = weights_of(shaped(3000, seed, "random"), 1.5)
        order = np.sort(weights)[::-1]
        got = weights.copy()
        kernels.truncate(got, mass, 0, 0.9, 0.0)
        last = int(np.searchsorted(np.cumsum(order) / mass, 0.9))
        np.testing.assert_array_equal(got > 0, weights >= order[last])
        kernels.truncate(weights, mass, 40, 1.0, 0.0)
        np.testing.assert_array_equal(np.sort(weights[weights > 0])[::-1], order[:40])


@needs_native
def test_a_draw_is_that_of_the_running_sum() -> None:
    rng = np.random.default_rng(5)
    for size in [*SIZES, FULL]:
        for kind in ("random", "masked", "one finite", "flat"):
            weights, _ = weights_of(shaped(size, 6, kind), 1.0)
            edges = np.cumsum(weights) / weights.sum()
            uniforms = [0.0, 5e-324, 0.5, 1.0 - 2.0**-53, 1.0, *rng.random(20)]
            uniforms += np.minimum(edges[rng.integers(size, size=5)], 1.0).tolist()
            for uniform in uniforms:
                assert kernels.draw(weights, uniform) == reference.draw(weights, uniform)
                assert weights[draw(weights, uniform)] > 0.0


# ------------------------------------------------------------------ noise


@needs_native
def test_the_generator_is_that_of_numpy() -> None:
    rng = np.random.default_rng(7)
    for key in (0, 1, 2**64 - 1, 2**63 + 12345):
        for position in (0, 1, 77, 2**40):
            for size in (1, 2, 3, 4, 5, 1000):
                ids = rng.permutation(size)
                np.testing.assert_array_equal(
                    kernels.uniforms_at(key, position, ids),
                    reference.uniforms(key, position, size)[ids],
                )
    noise = GumbelNoise(5, FULL)
    ids = rng.integers(FULL, size=300)
    np.testing.assert_array_equal(noise.at(9, ids), noise(9)[ids])


@pytest.mark.parametrize("native", [False, pytest.param(True, marks=needs_native)])
def test_the_winner_of_all_tokens_is_among_the_few(
    native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "compiled", native)
    lengths = []
    for size, kind, seed, temperature in (
        *((s, k, i, 0.9) for s in (1, 2, 3, 5, 8, 33, 130) for k in KINDS for i in range(40)),
        *((FULL, k, i, t) for k in ("random", "peaked", "tied") for i in (0, 1) for t in (0.6, 2)),
        *((FULL, "flat", 0, 1.0), (FULL, "masked", 0, 1.0), (FULL, "one finite", 0, 1.0)),
    ):
        weights, mass = weights_of(shaped(size, 8, kind), temperature)
        noise = GumbelNoise(seed, size)
        tree = TokenTree.chain([0])
        rows = PathRows(
            torch.from_numpy(shaped(size, 8, kind))[None],
            tree,
            SamplingParams(temperature=temperature, logits_processor=lambda ids, row: row),
            History([0]),
        )
        finite = kind not in ("masked", "one finite")
        for position in (seed, 1000 + seed):
            best = coupled_choice(weights / mass, noise(position))
            ids, uniforms = kernels.gumbel_candidates(weights, noise.key, position)
            assert best in ids and (np.diff(ids) > 0).all()
            np.testing.assert_array_equal(
                uniforms, reference.uniforms(noise.key, position, size)[ids]
            )
            if finite and kind != "huge":  # its scores pass through float32 in the processor
                assert rows.choice(0, noise, position) == best
            lengths.append(len(ids))
    assert max(lengths) < 50


@needs_native
@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    size=st.integers(4, 300),
    kind=st.sampled_from(["random", "tied", "flat", "huge", "denormal", "peaked"]),
    temperature=st.sampled_from([0.3, 0.8, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 20]),
    top_p=st.sampled_from([0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.05]),
    penalty=st.sampled_from([1.0, 1.3]),
    bias=st.sampled_from([{}, {1: 4.0, 3: -2.0}]),
    verifier=st.sampled_from(["coupled", "traversal", "recursive"]),
)
def test_a_text_does_not_depend_on_the_extension(
    seed: int, size: int, kind: str, penalty: float, bias: dict[int, float], **rest: Any
) -> None:
    params = SamplingParams(seed=seed, repetition_penalty=penalty, logit_bias=bias, **rest)
    logits = torch.from_numpy(np.stack([shaped(size, seed % 97 + i, kind) for i in range(5)]))
    best = logits.argsort(dim=-1, descending=True)[:, :2].tolist()
    tree = TokenTree.point([1, *best[0], best[1][0], best[3][0]], [-1, 0, 0, 1, 3])

    def answer() -> Any:
        context = Context(
            key=1,
            token_ids=[2, 1],
            params=params,
            history=History([2, 1]),
            vocab_size=size,
            rng=np.random.default_rng(seed),
            noise=GumbelNoise(seed, size) if params.coupled else None,
        )
        rows = PathRows(logits, tree, context.params, context.history)
        return verify_rows(context, tree, rows)

    fast = answer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "compiled", False)
        assert answer() == fast


def test_logarithms_have_one_value_everywhere() -> None:
    rng = np.random.default_rng(11)
    uniforms = reference.uniforms(3, 4, 20_000)
    values = np.concatenate(
        [uniforms, 1.0 - uniforms * 2.0 ** -rng.integers(0, 53, 20_000), -np.log(uniforms)]
        + [np.ldexp(uniforms, rng.integers(-1073, 1024, 20_000)), [1.0, 5e-324, 2.0, 0.5, 1e308]]
    )
    values = values[values > 0.0]
    np.testing.assert_allclose(reference.log(values), np.log(values), rtol=4e-16, atol=0)
    np.testing.assert_array_equal(kernels.log(values), reference.log(values))
    np.testing.assert_array_equal(kernels.log(np.array([0.0, 1.0])), [-math.inf, 0.0])
    assert len(kernels.log(np.empty(0))) == 0


def test_coupled_choices_equal_those_by_whole_rows_of_noise() -> None:
    logits = torch.from_numpy(np.stack([shaped(FULL, i, "random") for i in range(3)]))
    for params in (
        SamplingParams(temperature=0.8, seed=1),
        SamplingParams(temperature=1.2, top_p=0.95, seed=2),
        SamplingParams(temperature=1.0, top_k=50, min_p=0.01, logit_bias={7: 9.0}, seed=3),
    ):
        noise = GumbelNoise(params.seed or 0, FULL)
        rows = PathRows(logits, TokenTree.chain([0, 1, 2]), params, History([0]))
        for position in range(8):
            node = position % 3
            expected = coupled_choice(rows[node], noise(position))
            assert rows.choice(node, noise, position) == expected


# ------------------------------------------------------------------ the best of a row


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_best_of_rows_come_in_order_and_ties_by_id(dtype: torch.dtype) -> None:
    rows = torch.from_numpy(np.stack([shaped(500, i, "tied") for i in range(4)])).to(dtype)
    for count in (1, 2, 20, 499, 500):
        values, ids = top(rows, count)
        for row, row_values, row_ids in zip(rows.double(), values, ids, strict=True):
            expected = np.argsort(-row.numpy(), kind="stable")[:count]
            assert row_ids.tolist() == expected.tolist()
            assert row_values.double().tolist() == row[row_ids].tolist()
    probs, _ = draft_law(rows, SamplingParams(temperature=1.0), 20)
    torch.testing.assert_close(probs.sum(-1), torch.ones(4, dtype=torch.float64))


def test_rows_of_any_stride_are_read() -> None:
    wide = torch.zeros(3, 48).copy_(torch.from_numpy(shaped(144, 9, "random")).view(3, 48))
    cut = wide[:, :37]
    tree = TokenTree.chain([0, 1, 2])
    for logits in (cut, cut.t().contiguous().t()):
        rows = PathRows(logits, tree, SamplingParams(), History([0]))
        assert [rows.best(i) for i in range(3)] == cut.argmax(-1).tolist()
        drawn = PathRows(logits, tree, SamplingParams(temperature=1.0), History([0]))
        whole = PathRows(cut.clone(), tree, SamplingParams(temperature=1.0), History([0]))
        np.testing.assert_array_equal(drawn[1], whole[1])
