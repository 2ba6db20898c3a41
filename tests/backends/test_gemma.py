"""Gemma 3n and Gemma 4: per-layer embeddings, heads of two sizes, shared keys and values, AltUp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_families import check_logits, rewritten
from test_native import check_bitwise, filled, folder_of

import redwood
from gemma_kit import MODELS, gemma_model, save_gemma, with_images
from redwood.backends.base import Nodes
from redwood.backends.eager.load import wrap_model
from redwood.backends.native.load import load_native
from redwood.backends.native.weights import open_folder
from redwood.errors import UnsupportedError

pytest.importorskip("redwood._native", reason="installed without a compiler")


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_gives_the_logits_of_transformers(name: str, tmp_path: Path) -> None:
    model = gemma_model(name)
    check_logits(load_native(folder_of(tmp_path, model), None, kv="f32", threads=2), model)


@pytest.mark.parametrize("name", MODELS)
def test_a_gguf_file_gives_the_logits_of_transformers(name: str, tmp_path: Path) -> None:
    model = gemma_model(name)
    path = save_gemma(tmp_path / "m.gguf", model)
    check_logits(load_native(folder_of(tmp_path, model), path, kv="f32", threads=3), model)


@pytest.mark.parametrize("weights", ["auto", "int8", "int4"])
@pytest.mark.parametrize("name", MODELS)
def test_a_node_has_the_same_bits_in_any_company(name: str, weights: str, tmp_path: Path) -> None:
    model = gemma_model(name, max_position_embeddings=2048)
    backend = load_native(folder_of(tmp_path, model), None, weights=weights, threads=2)
    check_bitwise(backend, seed=6)


@pytest.mark.parametrize("kind", ["Q4_K", "Q8_0", "BF16"])
@pytest.mark.parametrize("name", ["gemma4-all", "gemma3n"])
def test_quantised_files_keep_the_bits(name: str, kind: str, tmp_path: Path) -> None:
    wide: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
    wide |= {"hidden_size_per_layer_input": 256, "laurel_rank": 32}
    if name == "gemma4-all":
        wide |= {"global_head_dim": 128, "moe_intermediate_size": 256}
    model = gemma_model(
        name, **wide, initializer_range=0.05, max_position_embeddings=2048, vocab_size=96
    )
    path = save_gemma(tmp_path / "m.gguf", model, kind)
    backend = load_native(folder_of(tmp_path, model), path, threads=2)
    assert (backend.formats["ple_embed"] == "f32") is False  # packed, not held in float32
    check_bitwise(backend, seed=4)


@pytest.mark.parametrize("name", ["gemma4-embedded", "gemma4-mixture", "gemma4-unified"])
def test_the_text_part_of_a_model_with_images(name: str, tmp_path: Path) -> None:
    model = with_images(name)
    check_logits(load_native(folder_of(tmp_path, model), None, kv="f32", threads=1), model)


def test_what_images_and_sounds_need_is_left_unread(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, with_images("gemma4-embedded"))
    ones = torch.ones(2, 2)
    names = ("vision_tower.a", "audio_tower.b", "embed_vision.c", "embed_audio.d")
    rewritten(folder, {f"model.{name}.weight": ones.clone() for name in names})
    open_folder(folder).close()
    rewritten(folder, {"model.something.weight": ones})
    with pytest.raises(UnsupportedError, match=r"model\.something\.weight"):
        open_folder(folder)


def test_unused_keys_and_values_of_layers_that_share_are_left_unread(tmp_path: Path) -> None:
    # Files of Gemma 3n have them; Transformers leaves them unread, too.
    model = gemma_model("gemma3n")
    folder = folder_of(tmp_path / "folder", model)
    parts = {"k_proj": (32, 32), "v_proj": (32, 32), "k_norm": (16,)}
    more = {f"model.layers.5.self_attn.{k}.weight": torch.randn(v) for k, v in parts.items()}
    check_logits(load_native(rewritten(folder, {**more}), None, kv="f32", threads=1), model)


@pytest.mark.parametrize("streams, active", [(2, 1), (3, 0), (4, 2)])
def test_streams_of_any_number(streams: int, active: int, tmp_path: Path) -> None:
    model = gemma_model("gemma3n", altup_num_inputs=streams, altup_active_idx=active)
    check_logits(load_native(folder_of(tmp_path, model), None, kv="f32", threads=2), model)


def test_one_switch_at_a_time(tmp_path: Path) -> None:
    changes: dict[str, list[dict[str, Any]]] = {
        "gemma3n": [
            {"num_kv_shared_layers": 0},
            {"altup_correct_scale": False},
            {"activation_sparsity_pattern": [0.0] * 6},
            {"hidden_size": 24, "head_dim": 8},  # no whole blocks
            {"attention_bias": True},
        ],
        "gemma4-all": [
            {"attention_bias": True},
            {"hidden_size": 40, "moe_intermediate_size": 20, "num_experts": 5},
            {"final_logit_softcapping": None, "tie_word_embeddings": False},
            {"use_bidirectional_attention": "vision"},
        ],
    }
    for name, each in changes.items():
        for number, change in enumerate(each):
            model = gemma_model(name, **change)
            folder = folder_of(tmp_path / f"{name}{number}", model)
            check_logits(load_native(folder, None, kv="f32", threads=2), model)


def test_a_long_prompt_passes_in_pieces(tmp_path: Path) -> None:
    for name in ("gemma4-all", "gemma3n"):
        model = gemma_model(name, max_position_embeddings=2048)
        backend = load_native(folder_of(tmp_path / name, model), None, threads=2)
        text = [int(t) for t in torch.randint(0, 96, (600,))]
        (whole,) = backend.extend([Nodes(backend.open(), text)])
        (rest,) = backend.extend([Nodes(filled(backend, text[:150], chunk=50), text[150:])])
        assert torch.equal(whole[150:], rest)


def test_layers_that_share_take_no_memory(tmp_path: Path) -> None:
    def of(**changes: Any) -> int:
        model = gemma_model("gemma4-embedded", use_double_wide_mlp=False, **changes)
        backend = load_native(folder_of(tmp_path / str(changes), model), None, threads=1)
        backend.extend([Nodes(backend.open(), [1, 2, 3])])
        assert backend.page_bytes == backend.page_slots * backend.token_bytes
        assert backend.cache_bytes == backend.page_bytes
        return backend.token_bytes

    shared, own = of(num_kv_shared_layers=2), of(num_kv_shared_layers=0)
    assert own - shared == 2 * 2 * (16 + 32) * 2  # two heads, of 16 and of 32, fp16


@pytest.mark.parametrize("name", ["gemma4-all", "gemma3n"])
def test_every_drafter_says_what_plain_decoding_says(name: str, tmp_path: Path) -> None:
    folder = str(folder_of(tmp_path, gemma_model(name, initializer_range=0.05)))
    prompt, texts = [5, 9, 17, 33, 5, 9, 17, 33, 5, 9], []
    for drafter in (None, "ngram", folder):
        engine = redwood.load(folder, drafter, backend="native", threads=2)
        texts.append(engine.generate(prompt, max_tokens=24, temperature=0.0).token_ids)
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("name", MODELS)
def test_the_eager_backend_serves_trees(name: str) -> None:
    check_logits(wrap_model(gemma_model(name)), gemma_model(name), limit=2e-4)
