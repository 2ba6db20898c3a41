"""Engines on models with recurrent layers: any drafter says what plain decoding says."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from test_prefix_histories import _on_natives

from hybrids_kit import hybrid_model
from redwood.backends.native.backend import NativeBackend
from redwood.backends.native.load import load_native
from redwood.drafters.base import ModelDrafter, NgramDrafter, UnionDrafter
from redwood.engine.engine import RowEngine
from redwood.engine.scheduler import extra_tokens
from redwood.sampling import SamplingParams

pytest.importorskip("redwood._native", reason="installed without a compiler")


def loaded(name: str, path: Path, every: int = 32) -> NativeBackend:
    hybrid_model(name).save_pretrained(path)
    return load_native(path, None, threads=1, checkpoint_tokens=every, capacity=512)


def texts(engine: RowEngine, prompts: list[list[int]], **params: Any) -> list[list[int]]:
    made = dict[int, list[int]]()
    for prompt in prompts:
        made[engine.add(prompt, SamplingParams(max_tokens=24, ignore_eos=True, **params))] = []
    while engine.busy:
        for step in engine.step():
            assert step.error is None
            made[step.request] += step.token_ids
    return list(made.values())


def prompts_of(seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    some = [rng.randrange(90) for _ in range(12)]
    return [(some * 8)[: rng.randint(2, 90)] for _ in range(3)]


@pytest.mark.parametrize("name", ["lfm2", "qwen35", "qwen35moe"])
@pytest.mark.parametrize("params", [{}, {"temperature": 0.9, "seed": 3}], ids=["greedy", "seeded"])
def test_every_drafter_says_what_plain_decoding_says(
    name: str, params: dict[str, Any], tmp_path: Path
) -> None:
    target = loaded(name, tmp_path / "target")
    draft = loaded("lfm2" if name != "lfm2" else "qwen35", tmp_path / "draft")
    want = texts(RowEngine(target), prompts_of(1), **params)
    same = ModelDrafter(target)  # drafts what is then accepted
    for drafter in (
        NgramDrafter(),
        ModelDrafter(draft),
        same,
        UnionDrafter([ModelDrafter(draft), NgramDrafter()]),
    ):
        engine = RowEngine(target, drafter, budget=7)
        assert texts(engine, prompts_of(1), **params) == want


@pytest.mark.parametrize("name", ["lfm2", "qwen35"])
def test_histories_with_reuse(name: str, tmp_path: Path) -> None:
    target = loaded(name, tmp_path, every=16)
    most = 900 + 4 * extra_tokens(target, NgramDrafter(), 200)
    prompts = [[random.Random(i).randrange(90) for _ in range(160)] for i in range(2)]
    _on_natives(target, 10, lambda rng: prompts[rng.randrange(2)][: rng.randint(20, 160)], most)


def test_a_second_turn_reads_only_what_is_new(tmp_path: Path) -> None:
    target = loaded("qwen35", tmp_path)
    engine = RowEngine(target, NgramDrafter(), budget=5, kv_cache=1 << 24)
    first = [random.Random(5).randrange(90) for _ in range(150)]
    (answer,) = texts(engine, [first])
    second = [*first, *answer, 1, 2, 3]
    before = engine.prefixes.num_hit_tokens
    (again,) = texts(engine, [second])
    assert engine.prefixes.num_hit_tokens - before == len(first) + len(answer) - 1
    assert [again] == texts(RowEngine(target), [second])


def test_states_are_admitted(tmp_path: Path) -> None:
    """What rows take beside keys and values counts against the tokens that may be held."""
    target = loaded("qwen35", tmp_path)
    extra = target.row_bytes(100) - 100 * target.token_bytes
    engine = RowEngine(target, kv_tokens=2 * (100 + -(-extra // target.token_bytes)))
    assert extra_tokens(target, engine.drafter, 100) == -(-extra // target.token_bytes) > 0
    params = SamplingParams(max_tokens=50, ignore_eos=True)
    for _ in range(3):
        engine.add([3] * 50, params)
    engine.step()
    assert len(engine._active) == 2


@pytest.mark.parametrize("every", [0, 16])
def test_a_text_stays_as_far_as_its_states_fit_too(every: int, tmp_path: Path) -> None:
    target = loaded("qwen35", tmp_path, every=every)
    engine = RowEngine(target, NgramDrafter(), budget=5, kv_cache=8 * target.page_bytes)
    text = [random.Random(5).randrange(90) for _ in range(400)]
    texts(engine, [text])
    assert engine.prefixes.num_pages <= engine.prefixes.max_pages == 8
    assert target.cache_bytes <= 8 * target.page_bytes
    texts(engine, [text])
    assert (engine.prefixes.num_hit_tokens > 0) == bool(every)
