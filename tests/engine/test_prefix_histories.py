"""Random histories of requests: tokens and log-probabilities, bit for bit, are those without reuse.

A history adds requests that go on from, branch off, or share a beginning with earlier texts, makes
steps, cancels, and throws kept texts out, under small bounds.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import redwood
from decoder_kit import tiny_model
from redwood.backends.native.load import load_native
from redwood.drafters.base import ModelDrafter, NgramDrafter, UnionDrafter
from redwood.engine.engine import RowEngine
from redwood.sampling import SamplingParams
from redwood.testing import TableBackend

Answer = list[tuple[int, float, tuple[tuple[int, float], ...]]]
PARAMS = (
    SamplingParams(max_tokens=4, ignore_eos=True, logprobs=2),
    SamplingParams(max_tokens=6, ignore_eos=True, logprobs=1, temperature=0.9, seed=5),
)


class Plain:
    """What a model says without reuse, each request once."""

    def __init__(self, target: Any) -> None:
        self.target = target
        self._known: dict[tuple[Any, ...], Answer] = {}

    def answer(self, prompt: tuple[int, ...], params: SamplingParams) -> Answer:
        key = (prompt, PARAMS.index(params))
        if key not in self._known:
            engine, made = RowEngine(self.target), []
            engine.add(prompt, params)
            while engine.busy:
                for step in engine.step():
                    made += told(step)
            self._known[key] = made
        return self._known[key]


def told(step: Any) -> Answer:
    assert step.error is None
    pairs = zip(step.token_ids, step.logprobs, strict=True)
    return [(token, each.logprob, tuple(each.top)) for token, each in pairs]


def history(
    engine: RowEngine, plain: Plain, rng: random.Random, roots: list[list[int]], moves: int
) -> int:
    """One history, checked; returns how many tokens of its prompts were not read again."""
    texts = [list(root) for root in roots]
    asked: dict[int, tuple[tuple[int, ...], SamplingParams]] = {}
    made: dict[int, Answer] = {}

    def step() -> None:
        for each in engine.step():
            made[each.request] += told(each)
            if each.finish_reason is not None:
                prompt = asked[each.request][0]
                texts.append([*prompt, *(token for token, _, _ in made[each.request])])

    for _ in range(moves):
        what = rng.random()
        if what < 0.4:
            text = rng.choice(texts)
            cut = len(text) if what < 0.2 else rng.randint(1, len(text))  # extend, or branch
            tail = [rng.choice(roots[0]) for _ in range(rng.choice([0, 1, 7]))]
            prompt = tuple([*text[:cut], *tail][: engine.target.capacity - 8])
            params = rng.choice(PARAMS)
            for _ in range(rng.choice([1, 1, 3])):
                key = engine.add(prompt, params)
                asked[key], made[key] = (prompt, params), []
        elif what < 0.5 and asked:
            engine.cancel(rng.choice(list(asked)))
        elif what < 0.53:
            engine.prefixes.clear()
        else:
            step()
    cancelled = {key for key in asked if key not in engine._requests} - {
        key for key in asked if len(made[key]) == asked[key][1].max_tokens
    }
    while engine.busy:
        step()
    for key, (prompt, params) in asked.items():
        right = plain.answer(prompt, params)
        got = made[key]
        assert got == (right[: len(got)] if key in cancelled else right)
    return engine.prefixes.num_hit_tokens


def _toy(seed: int) -> TableBackend:
    # All of the text decides, so that any wrong token in a row shows.
    return TableBackend(9, seed=seed, capacity=80, order=80)


def _on_toys(count: int) -> None:
    found = 0
    target, draft = _toy(1), _toy(1)
    plain = Plain(target)
    for seed in range(count):
        rng = random.Random(seed)
        model = ModelDrafter(draft, window=rng.choice([None, 8]))
        model.keep(rng.choice([0, 40, 4000]))
        drafter: Any = rng.choice([None, NgramDrafter(), model, UnionDrafter([model])])
        engine = RowEngine(
            target,
            drafter,
            budget=rng.choice([1, 5]),
            kv_cache=rng.choice([12, 60, 4000]),
            kv_tokens=rng.choice([None, 100]),
            prefill_chunk=rng.choice([3, 64]),
            prefill_beside=rng.choice([1, 64]),
            max_rows=rng.choice([1, 3, 8]),
        )
        roots = [[rng.randrange(4) for _ in range(rng.randint(2, 40))] for _ in range(3)]
        found += history(engine, plain, rng, roots, 14)
        engine.prefixes.clear()
        model.keep(0)
        assert target.num_rows == draft.num_rows == 0
        if seed % 100 == 99:  # nothing is shared from here on, and memory is not for ever
            plain, target._table, draft._table = Plain(target), {}, {}
    assert found > count


def test_histories_on_a_toy() -> None:
    _on_toys(300)


@pytest.mark.slow
def test_ten_thousand_histories_on_a_toy() -> None:
    _on_toys(10_000)


def _on_natives(
    target: Any, count: int, prompts: Callable[[random.Random], list[int]], most: int = 900
) -> None:
    plain, found = Plain(target), 0
    for seed in range(count):
        rng = random.Random(seed)
        page = 64 * target.token_bytes
        engine = RowEngine(
            target,
            NgramDrafter() if seed % 2 else None,
            budget=6,
            kv_cache=rng.choice([3, 20, 400]) * page,
            kv_tokens=rng.choice([None, most]),
            prefill_chunk=rng.choice([16, 128]),
            prefill_beside=rng.choice([8, 64]),
            max_rows=4,
        )
        found += history(engine, plain, rng, [prompts(rng) for _ in range(2)], 12)
        engine.prefixes.clear()
        assert target.cache_bytes == 0
    assert found > count


def test_histories_on_the_native_backend(tmp_path: Path) -> None:
    tiny_model("llama", max_position_embeddings=512).save_pretrained(tmp_path)
    target = load_native(tmp_path, None, threads=1)
    _on_natives(target, 30, lambda rng: [rng.randrange(90) for _ in range(rng.randint(2, 160))])


@pytest.mark.slow
def test_two_hundred_histories_on_smollm2() -> None:
    engine = redwood.load("smollm2-135m-instruct", None, kv_cache=0, capacity=512)
    text = engine.encode("Once a fox met a crow who held a piece of cheese in her beak. " * 12)

    def prompt(rng: random.Random) -> list[int]:
        start = rng.choice([0, 0, 5])
        return text[start : start + rng.choice([20, 66, 130])]

    _on_natives(engine.target, 200, prompt)
