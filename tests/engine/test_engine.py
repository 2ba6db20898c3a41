"""The engine against plain decoding: every drafter, every tree size, any company."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

import redwood
from conftest import save_model, tiny_llama, tiny_tokenizer
from redwood.algorithms.specinfer import expansion_tree
from redwood.backends.load import wrap_model
from redwood.drafters.base import Drafter, ModelDrafter, NgramDrafter, NoDrafter, UnionDrafter
from redwood.engine.engine import RowEngine
from redwood.engine.text import Engine
from redwood.errors import (
    ArgumentError,
    CapacityError,
    NumericalError,
    TokenizerMismatchError,
)
from redwood.sampling import SamplingParams
from redwood.testing import TableBackend
from table_kit import NoisyTable

PROMPTS = [
    [5, 9, 17, 33, 5, 9, 17, 40, 5, 9],
    [2, 3, 2, 3, 2, 3, 2],
    [77],
    list(range(100, 160)),
]


def _target() -> TableBackend:
    return TableBackend(300, capacity=256)


def _draft_model(seed: int = 0) -> TableBackend:
    return NoisyTable(noise_seed=seed + 7)


DRAFTERS: dict[str, Any] = {
    "none": NoDrafter,
    "ngram": NgramDrafter,
    "model": lambda: ModelDrafter(_draft_model(), width=32),
    "specinfer": lambda: ModelDrafter(
        _draft_model(), expansion_tree([2, 2, 1]), law="with_replacement"
    ),
    "top-k": lambda: ModelDrafter(_draft_model(), expansion_tree([3, 2]), law="point"),
    "two models": lambda: UnionDrafter(
        [ModelDrafter(_draft_model(1), width=16), ModelDrafter(_draft_model(2), width=300)]
    ),
    "union": lambda: UnionDrafter([NgramDrafter(), ModelDrafter(_draft_model(), width=32)]),
}


def _answer(
    target: Any, drafter: Drafter, prompts: Sequence[list[int]], budget: int, **params: Any
) -> list[list[int]]:
    engine = Engine(target, drafter, eos_ids=[1], budget=budget)
    outputs = engine.generate(list(prompts), **{"max_tokens": 40, **params})
    assert isinstance(outputs, list)
    assert not engine.busy
    return [output.token_ids for output in outputs]


@pytest.fixture(scope="module")
def plain() -> dict[tuple[float, int | None], list[list[int]]]:
    settings: list[tuple[float, int | None]] = [(0.0, None), (0.8, 3), (1.0, -5)]
    return {
        (t, s): _answer(_target(), NoDrafter(), PROMPTS, 1, temperature=t, seed=s)
        for t, s in settings
    }


@pytest.mark.parametrize("budget", [1, 2, 5, 17, 64])
@pytest.mark.parametrize("name", sorted(DRAFTERS))
def test_text_equals_plain_decoding(
    name: str, budget: int, plain: dict[tuple[float, int | None], list[list[int]]]
) -> None:
    for (temperature, seed), want in plain.items():
        got = _answer(
            _target(), DRAFTERS[name](), PROMPTS, budget, temperature=temperature, seed=seed
        )
        assert got == want


@pytest.mark.parametrize("name", sorted(DRAFTERS))
def test_text_is_the_same_alone_and_in_company(name: str) -> None:
    drafter = DRAFTERS[name]()
    together = _answer(_target(), drafter, PROMPTS, 8, temperature=0.9, seed=1)
    for prompt, want in zip(PROMPTS, together, strict=True):
        assert _answer(_target(), drafter, [prompt], 8, temperature=0.9, seed=1) == [want]


def test_unseeded_requests_of_one_engine_differ_and_seeded_repeat() -> None:
    engine = Engine(_target(), NgramDrafter(), budget=4)
    free = {
        tuple(engine.generate(PROMPTS[0], max_tokens=30, temperature=1.0).token_ids)
        for _ in range(4)
    }  # type: ignore[union-attr]
    assert len(free) > 1
    for verifier in ("traversal", "recursive", "coupled"):
        texts = {
            tuple(
                engine.generate(
                    PROMPTS[0], max_tokens=30, temperature=1.0, seed=4, verifier=verifier
                ).token_ids  # type: ignore[union-attr]
            )
            for _ in range(3)
        }
        assert len(texts) == 1


@pytest.mark.parametrize(
    "params",
    [
        {"repetition_penalty": 1.5},
        {"presence_penalty": 1.0, "frequency_penalty": 0.7},
        {"logit_bias": {7: 3.0, 9: -100.0}, "temperature": 0.7, "seed": 2},
        {"top_k": 5, "temperature": 1.2, "seed": 2},
        {"top_p": 0.6, "min_p": 0.05, "temperature": 1.0, "seed": 2},
        {"repetition_penalty": 0.7, "frequency_penalty": -1.0, "temperature": 1.0, "seed": 9},
    ],
)
def test_processors_are_computed_per_path(params: dict[str, Any]) -> None:
    want = _answer(_target(), NoDrafter(), PROMPTS, 1, **params)
    for name in ("ngram", "model", "union"):
        assert _answer(_target(), DRAFTERS[name](), PROMPTS, 12, **params) == want


def _peaked() -> TableBackend:
    """A small vocabulary, so that a law can be counted."""
    return TableBackend(12)


@pytest.mark.parametrize(
    ("name", "law", "verifier"),
    [
        ("model", "without_replacement", "traversal"),
        ("model", "without_replacement", "coupled"),
        ("model", "with_replacement", "recursive"),
        ("model", "point", "traversal"),
        ("ngram", "", "recursive"),
        ("union", "without_replacement", "traversal"),
        ("union", "without_replacement", "recursive"),
    ],
)
def test_two_tokens_follow_the_targets_law(name: str, law: str, verifier: str) -> None:
    target = _peaked()
    other = NoisyTable(12, noise=1.0)
    shape = [-1, 0, 0, 1, 1, 2]
    drafter: Drafter = NgramDrafter()
    if name != "ngram":
        drafter = ModelDrafter(other, shape, law=law, width=4)
    if name == "union":
        drafter = UnionDrafter([drafter, NgramDrafter()])
    prompt = [3, 4, 5, 3, 4, 6, 3, 4]
    runs = 800
    engine = RowEngine(target, drafter, budget=10 if name == "union" else 6, max_rows=500)
    params = [
        SamplingParams(max_tokens=2, temperature=0.9, top_p=0.95, verifier=verifier, seed=i)
        for i in range(runs)
    ]
    tokens: dict[int, list[int]] = {engine.add(prompt, p): [] for p in params}
    while engine.busy:
        for step in engine.step():
            tokens[step.request] += step.token_ids
    seen = np.zeros((12, 12))
    for first, second in tokens.values():
        seen[first, second] += 1
    want = _law(target, prompt)
    assert not seen[want == 0].any()
    cells = want.ravel() * runs
    big = cells >= 5
    observed = np.append(seen.ravel()[big], seen.ravel()[~big].sum())
    expected = np.append(cells[big], cells[~big].sum())
    used = expected > 0
    assert chisquare(observed[used], expected[used]).pvalue > 1e-4


def _law(target: TableBackend, prompt: list[int]) -> np.ndarray[Any, Any]:
    """Joint law of two tokens at temperature 0.9, top-p 0.95, straight from the definition."""

    def row(tokens: list[int]) -> Any:
        probs = torch.softmax(target.logits(tokens).double() / 0.9, -1).numpy()
        order = np.argsort(-probs)
        kept = np.cumsum(probs[order]) - probs[order] < 0.95
        probs[order[~kept]] = 0
        return probs / probs.sum()

    first = row(prompt)
    return np.stack([first[t] * row([*prompt, t]) for t in range(12)])


def test_drafted_tokens_are_accepted_and_counted() -> None:
    engine = Engine(_target(), ModelDrafter(_target(), width=8), budget=8)
    output = engine.generate(PROMPTS[0], max_tokens=30)
    assert isinstance(output, redwood.Output)
    stats = output.stats
    assert stats.num_generated_tokens == 30 == len(output.token_ids)
    assert stats.mean_acceptance_length > 2
    assert stats.target_passes + stats.num_accepted_tokens >= 30
    assert stats.num_draft_tokens <= stats.num_drafts * 7
    assert set(stats.seconds) == {"prefill", "draft", "target", "verify", "other"}


def test_end_of_sequence_ends_inside_an_accepted_path() -> None:
    plain = _answer(_target(), NoDrafter(), PROMPTS, 1, ignore_eos=True)
    for prompt, tokens in zip(PROMPTS, plain, strict=True):
        eos = tokens[len(tokens) // 2]
        want = tokens[: tokens.index(eos) + 1]
        engine = Engine(_target(), ModelDrafter(_target()), eos_ids=[eos], budget=16)
        output = engine.generate(prompt, max_tokens=40)
        assert isinstance(output, redwood.Output)
        assert output.token_ids == want and output.finish_reason == "stop"
        free = engine.generate(prompt, max_tokens=40, ignore_eos=True)
        assert isinstance(free, redwood.Output)
        assert free.token_ids == tokens and free.finish_reason == "length"


@pytest.mark.parametrize("budget", [1, 12])
def test_the_context_is_filled_to_the_last_slot_and_no_further(budget: int) -> None:
    target = TableBackend(300, capacity=64)
    engine = Engine(target, ModelDrafter(_target()), budget=budget)
    output = engine.generate(list(range(2, 52)), max_tokens=1000)
    assert isinstance(output, redwood.Output)
    assert len(output.token_ids) == 64 - 50 and output.finish_reason == "length"


def test_a_drafter_with_a_shorter_context_stops_drafting() -> None:
    short = TableBackend(300, capacity=40)
    want = _answer(_target(), NoDrafter(), [PROMPTS[0]], 1, max_tokens=100)
    assert _answer(_target(), ModelDrafter(short), [PROMPTS[0]], 8, max_tokens=100) == want


def test_rows_join_and_leave_between_steps() -> None:
    want = _answer(_target(), NoDrafter(), PROMPTS, 1)
    engine = RowEngine(_target(), NgramDrafter(), eos_ids=[1], budget=6, max_rows=2)
    keys, tokens = [], {}
    for prompt in PROMPTS:
        keys.append(engine.add(prompt, SamplingParams(max_tokens=40)))
        tokens[keys[-1]] = list[int]()
        for step in engine.step():
            tokens[step.request] += step.token_ids
    dropped = engine.add(PROMPTS[0])
    engine.cancel(dropped)
    engine.cancel(dropped)
    while engine.busy:
        for step in engine.step():
            tokens[step.request] += step.token_ids
    assert [tokens[key] for key in keys] == want


def test_closing_a_stream_frees_its_row() -> None:
    engine = Engine(_target(), ModelDrafter(_draft_model()), budget=6)
    stream = engine.stream(PROMPTS[0], max_tokens=50)
    next(stream)
    assert engine.busy
    stream.close()  # type: ignore[attr-defined]
    assert not engine.busy


def test_nan_logits_end_the_request_with_a_clear_error() -> None:
    model = tiny_llama()
    target = wrap_model(model)
    engine = Engine(target, NgramDrafter())
    with torch.no_grad():
        model.lm_head.weight[3, 3] = float("nan")
    for params in ({}, {"temperature": 1.0}, {"temperature": 1.0, "seed": 1}):
        with pytest.raises(NumericalError, match="NaN"):
            engine.generate(PROMPTS[0], **params)
        assert not engine.busy


def test_bad_requests_are_refused() -> None:
    engine = Engine(_target(), budget=4)
    for prompt, params, match in (
        ([], {}, "empty"),
        ([5, 300], {}, "vocabulary"),
        ([5], {"temperature": -1.0}, "temperature"),
        ([5], {"temperature": float("nan")}, "temperature"),
        ([5], {"top_p": 0.0}, "top_p"),
        ([5], {"top_p": 1.5}, "top_p"),
        ([5], {"colour": 1}, "colour"),
        ([5], {"stop": ["x"]}, "tokenizer"),
        ([5], {"logit_bias": {999: 1.0}}, "logit_bias"),
        ("text", {}, "tokenizer"),
    ):
        with pytest.raises(ArgumentError, match=match):
            engine.generate(prompt, **params)  # type: ignore[call-overload]
    with pytest.raises(CapacityError, match="context"):
        engine.generate([5] * 256)
    with pytest.raises(CapacityError, match="budget"):
        Engine(_target(), budget=257)
    with pytest.raises(ArgumentError, match="budget"):
        Engine(_target(), budget=0)
    assert not engine.busy


def test_load_answers_text_and_chat_and_streams(
    tiny_model_folder: Path, tiny_draft_folder: Path
) -> None:
    engine = redwood.load(
        str(tiny_model_folder), f"ngram+{tiny_draft_folder}", budget=9, progress=False
    )
    output = engine.generate("Tom went to the market.", max_tokens=20)
    pieces = list(engine.stream("Tom went to the market.", max_tokens=20))
    assert "".join(pieces) == output.text
    assert [t for piece in pieces for t in piece.token_ids] == output.token_ids
    assert pieces[-1].finish_reason == output.finish_reason
    chat = [{"role": "user", "content": "Tom?"}]
    assert engine.encode(chat) == engine.encode("<s>user: Tom?</s><s>assistant: ")
    both = engine.generate(["Tom", chat], max_tokens=3)
    assert isinstance(both, list) and len(both) == 2


def test_stop_strings_end_the_text_with_every_drafter(tiny_model_folder: Path) -> None:
    plain = redwood.load(str(tiny_model_folder))
    full = plain.generate("Tom went", max_tokens=40, ignore_eos=True)
    stop = full.text[9:12]
    want = plain.generate("Tom went", max_tokens=40, ignore_eos=True, stop=stop)
    assert want.text == full.text[: full.text.index(stop)] and want.finish_reason == "stop"
    twin = redwood.load(str(tiny_model_folder), str(tiny_model_folder), budget=16)
    got = twin.generate("Tom went", max_tokens=40, ignore_eos=True, stop=[stop])
    assert (got.text, got.token_ids) == (want.text, want.token_ids)


def test_other_tokens_are_refused_by_name(tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "shifted", tiny_llama(), tiny_tokenizer())
    file = folder / "tokenizer.json"
    data = json.loads(file.read_text())
    vocabulary = data["model"]["vocab"]
    a, b = sorted(vocabulary, key=vocabulary.get)[20:22]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    file.write_text(json.dumps(data))
    with pytest.raises(TokenizerMismatchError, match="token 20 is"):
        redwood.load(str(tiny_model_folder), str(folder))
