"""Engines on models with Mamba-2 layers: any drafter says what plain decoding says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_hybrid_engine import prompts_of, texts

from mambas_kit import mamba_model
from redwood.backends.native.backend import NativeBackend
from redwood.backends.native.load import load_native
from redwood.drafters.base import ModelDrafter, NgramDrafter, UnionDrafter
from redwood.engine.engine import RowEngine

pytest.importorskip("redwood._native", reason="installed without a compiler")


def loaded(name: str, path: Path, every: int = 32) -> NativeBackend:
    mamba_model(name).save_pretrained(path)
    return load_native(path, None, threads=1, checkpoint_tokens=every, capacity=512)


@pytest.mark.parametrize("name", ["mamba2", "granite-hybrid", "falcon-h1", "nemotron-h"])
@pytest.mark.parametrize("params", [{}, {"temperature": 0.9, "seed": 3}], ids=["greedy", "seeded"])
def test_every_drafter_says_what_plain_decoding_says(
    name: str, params: dict[str, Any], tmp_path: Path
) -> None:
    target = loaded(name, tmp_path / "target")
    draft = loaded("mamba2" if name != "mamba2" else "nemotron-h", tmp_path / "draft")
    want = texts(RowEngine(target), prompts_of(1), **params)
    for drafter in (
        NgramDrafter(),
        ModelDrafter(draft),
        ModelDrafter(target),  # drafts what is then accepted
        UnionDrafter([ModelDrafter(draft), NgramDrafter()]),
    ):
        engine = RowEngine(target, drafter, budget=7)
        assert texts(engine, prompts_of(1), **params) == want


def test_a_second_turn_reads_only_what_is_new(tmp_path: Path) -> None:
    target = loaded("mamba2", tmp_path)
    engine = RowEngine(target, NgramDrafter(), budget=5, kv_cache=1 << 24)
    first = [3 * t % 90 for t in range(150)]
    (answer,) = texts(engine, [first])
    second = [*first, *answer, 1, 2, 3]
    before = engine.prefixes.num_hit_tokens
    (again,) = texts(engine, [second])
    assert engine.prefixes.num_hit_tokens - before == len(first) + len(answer) - 1
    assert [again] == texts(RowEngine(target), [second])
