"""Texts of models with recurrent layers on the eager backend: every door equals plain decoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import redwood
from conftest import save_model, tiny_tokenizer
from eager_hybrids_kit import FORMS, HYBRIDS, tiny_hybrid
from redwood import hf
from redwood.backends.base import AcceptedPath, Nodes
from redwood.backends.eager.backend import EagerBackend
from redwood.backends.load import load_eager, wrap_model
from redwood.drafters.base import Drafter, ModelDrafter, NgramDrafter, NoDrafter, UnionDrafter
from redwood.engine.text import Engine
from redwood.models._transformers_states import state_bytes

PROMPTS = [[5, 9, 17, 33, 5, 9, 17], [33, 65, 29, 2] * 5, [7]]
FAMILIES = sorted(set(HYBRIDS) - {"bamba", "lara_mini", "lfm2_moe", "lfm3", "falcon_mamba"})


def _text(target: Any, drafter: Drafter, budget: int, **params: Any) -> list[list[int]]:
    engine = Engine(target, drafter, budget=budget, prefill_chunk=5)
    outputs: Any = engine.generate(PROMPTS, **{"max_tokens": 16, **params})
    return [output.token_ids for output in outputs]


@pytest.mark.parametrize("family", FAMILIES)
def test_text_with_any_drafter_equals_plain_decoding(family: str) -> None:
    target = wrap_model(tiny_hybrid(family))
    near = tiny_hybrid(family)
    with torch.no_grad():  # a draft model that is right at times
        for weight in near.parameters():
            weight.mul_(1 + 0.05 * torch.randn(weight.shape, generator=torch.Generator()))
    other = wrap_model(near)
    for params in ({"temperature": 0.0}, {"temperature": 0.9, "seed": 3}):
        want = _text(target, NoDrafter(), 1, **params)
        drafters = {
            "ngram": NgramDrafter(),
            "model": ModelDrafter(other, width=32),
            "union": UnionDrafter([NgramDrafter(), ModelDrafter(other, width=32)]),
        }
        for name, drafter in drafters.items():
            assert _text(target, drafter, 8, **params) == want, (name, params)


def test_a_hybrid_may_draft_for_itself_and_most_is_accepted() -> None:
    model = tiny_hybrid("qwen3_5")
    engine = Engine(wrap_model(model), ModelDrafter(wrap_model(model), width=32), budget=6)
    output: Any = engine.generate(PROMPTS[0], max_tokens=20, temperature=0.0)
    assert output.stats.target_passes < 10


@pytest.mark.parametrize("family", ["lfm2", "mamba2", "qwen3_next"])
def test_generate_of_transformers_gives_the_same_text(family: str) -> None:
    model = tiny_hybrid(family)
    inputs = {"input_ids": torch.tensor([PROMPTS[1]])}
    want = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    got = hf.tree_generate(model, **inputs, max_new_tokens=16, do_sample=False)
    assert torch.equal(want, got)


@pytest.mark.parametrize("family", ["jamba", "qwen3_next"])
def test_folders_load_with_packed_weights(family: str, tmp_path: Path) -> None:
    model = tiny_hybrid(family, vocab_size=300)
    backend = load_eager(save_model(tmp_path, model, tiny_tokenizer()))
    assert backend.recurrent.modules
    (got,) = backend.extend([Nodes(backend.open(), PROMPTS[1])])
    with torch.inference_mode():
        want = model(input_ids=torch.tensor([PROMPTS[1]])).logits[0]
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["granite_hybrid", "jamba", "qwen3_next", "zamba2"])
def test_other_dtypes_serve_trees(family: str, dtype: torch.dtype) -> None:
    model = tiny_hybrid(family).to(dtype)
    backend = wrap_model(model)
    assert backend.recurrent.form == FORMS.get(family, "any")
    (logits,) = backend.extend([Nodes(backend.open(), [5, 9, 17, 33], [-1, 0, 0, 2])])
    (path,) = backend.extend([Nodes(backend.open(), [5, 17, 33])])
    limit = {torch.bfloat16: 0.2, torch.float16: 0.03}[dtype]
    assert float((logits[3] - path[2]).abs().max()) < limit * float(path.float().std())


def test_load_answers_with_and_without_drafts(tmp_path: Path) -> None:
    folder = save_model(tmp_path, tiny_hybrid("falcon_h1", vocab_size=300), tiny_tokenizer())
    texts = set()
    for drafter in ("none", "ngram", "auto", str(folder)):
        engine = redwood.load(str(folder), backend="eager", drafter=drafter)
        output: Any = engine.generate("Tom went to the market.", max_tokens=12, temperature=0.0)
        texts.add(tuple(output.token_ids))
        engine.close()
    assert len(texts) == 1


# What stays of a row


def _read(backend: EagerBackend, tokens: list[int]) -> int:
    row = backend.open()
    for start in range(0, len(tokens), 8):
        part = tokens[start : start + 8]
        backend.extend([Nodes(row, part, num_logits=0)])
        backend.commit([AcceptedPath(row, range(len(part)))])
    return row


@pytest.mark.parametrize("distance", [0, 8, 20])
def test_rows_begin_anew_at_the_states_that_were_kept(distance: int) -> None:
    backend = wrap_model(tiny_hybrid("qwen3_next"))
    backend.checkpoint_tokens = distance
    text = [(5 * i) % 96 for i in range(64)]
    row = _read(backend, text)
    read: list[int] = []
    plain = backend._forward
    backend._forward = lambda rows: (
        read.extend(  # type: ignore[method-assign]
            [len(nodes.token_ids) for nodes in rows]
        )
        or plain(rows)
    )
    for length in (64, 63, 48, 47, 8, 3, 0):
        held = backend.reusable(row, length)
        step = {0: 0, 8: 8, 20: 24}[distance]
        assert held == (64 if length == 64 else length // step * step if step else 0)
        read.clear()
        made = backend.fork(row, length)
        assert (sum(read), backend.length(made)) == (length - held, length)
        (got,) = backend.extend([Nodes(made, [1, 2])])
        (want,) = backend.extend([Nodes(_read(backend, text[:length]), [1, 2])])
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    kept = len(backend._row(row).recurrent.marks)
    assert kept == {0: 0, 8: 8, 20: 2}[distance]


def test_memory_of_a_row_is_known_at_load_and_taken() -> None:
    backend = wrap_model(tiny_hybrid("qwen3_next"))
    state = 3 * 4 * ((2 * 16 + 32) * 4 + 4 * 8 * 8)  # 3 layers, float32: convolutions, matrices
    assert (backend.state_bytes, backend.token_bytes) == (state, 2 * 2 * 2 * 16 * 4)
    assert backend.row_bytes(1024) == 1024 * backend.token_bytes + 4 * state
    backend.checkpoint_tokens = 16
    row = _read(backend, [(5 * i) % 96 for i in range(64)])
    held = {id(each): each for each in backend._row(row).recurrent.states()}
    assert sum(map(state_bytes, held.values())) == 4 * state <= backend.row_bytes(64)
    assert backend.pages([row]) == 4 + -(-4 * state // (64 * backend.token_bytes))
    only = wrap_model(tiny_hybrid("mamba2"))
    assert only.state_bytes and only.token_bytes == -(-only.state_bytes // 512)


def test_a_conversation_reads_only_what_is_new() -> None:
    target = wrap_model(tiny_hybrid("lfm2"))
    engine = Engine(target, NgramDrafter(), budget=4, kv_cache=1 << 20)
    first: Any = engine.generate(PROMPTS[1], max_tokens=20, temperature=0.0)
    text = [*PROMPTS[1], *first.token_ids, 4, 5, 6]
    again: Any = engine.generate(text, max_tokens=8, temperature=0.0)
    assert again.stats.num_cached_tokens >= len(text) - 5
    want: Any = Engine(target, budget=1).generate(text, max_tokens=8, temperature=0.0)
    assert again.token_ids == want.token_ids
