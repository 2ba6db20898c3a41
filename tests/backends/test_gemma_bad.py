"""Files of Gemma 3n and Gemma 4 whose parts do not fit together are refused, by name."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_families import rewritten
from test_native import folder_of

from decoder_kit import check_refused, tiny_model, write_gguf
from gemma_kit import gemma_model, gemma_settings, gemma_tensors, save_gemma
from redwood.backends.native.weights import open_folder, open_gguf
from redwood.errors import ModelError, RedwoodError, UnsupportedError

pytest.importorskip("redwood._native", reason="installed without a compiler")

SCALAR = "model.layers.0.layer_scalar"
NORM = "model.layers.2.router.scale"
COEFS = "model.layers.1.altup.prediction_coefs.weight"
TABLE = "model.embed_tokens_per_layer.weight"
_Tensors = dict[str, torch.Tensor | None]
BAD: list[tuple[str, _Tensors, dict[str, Any], type[RedwoodError], str]] = [
    ("gemma4-embedded", {}, {"num_kv_shared_layers": 7}, ModelError, "of which 7 share keys"),
    ("gemma4-embedded", {}, {"num_kv_shared_layers": 5}, ModelError, "no layer of type 'full_att"),
    ("gemma4-embedded", {}, {"num_kv_shared_layers": 1}, ModelError, "lacks the tensor"),
    ("gemma4-embedded", {}, {"vocab_size_per_layer_input": 90}, ModelError, "leaves tokens out"),
    ("gemma4-embedded", {}, {"vocab_size_per_layer_input": 100}, ModelError, TABLE),
    ("gemma4-embedded", {}, {"hidden_size_per_layer_input": 13}, ModelError, TABLE),
    ("gemma4-embedded", {}, {"hidden_size_per_layer_input": 0}, UnsupportedError, "per_layer"),
    ("gemma4-embedded", {}, {"use_double_wide_mlp": False}, ModelError, "has shape (128, 32)"),
    ("gemma4-embedded", {SCALAR: None}, {}, ModelError, f"lacks the tensor '{SCALAR}'"),
    ("gemma4-embedded", {SCALAR: torch.ones(2)}, {}, ModelError, f"'{SCALAR}' has shape (2,)"),
    (
        "gemma4-dense",
        {},
        {"per_layer_config": {"0": {"intermediate_size": 32}}},
        UnsupportedError,
        "per_layer_config sets intermediate_size",
    ),
    ("gemma4-dense", {}, {"per_layer_config": {"2": {"head_dim": 24}}}, ModelError, "q_proj"),
    (
        "gemma4-dense",
        {},
        {"per_layer_config": {"2": {"num_key_value_heads": 3}}},
        ModelError,
        "4 heads do not share 3 key-value heads",
    ),
    ("gemma4-dense", {}, {"attention_k_eq_v": False}, ModelError, "v_proj.weight"),
    ("gemma4-dense", {}, {"use_bidirectional_attention": "all"}, UnsupportedError, "bidirect"),
    ("gemma4-mixture", {}, {"top_k_experts": 7}, ModelError, "cannot have 7 experts of 6"),
    ("gemma4-mixture", {}, {"num_experts": 5}, ModelError, "instead of"),
    ("gemma4-mixture", {}, {"enable_moe_block": False}, UnsupportedError, "is no part of"),
    ("gemma4-mixture", {NORM: None}, {}, ModelError, f"lacks the tensor '{NORM}'"),
    ("gemma3n", {}, {"activation_sparsity_pattern": [2.0] * 6}, ModelError, "which is no share"),
    ("gemma3n", {}, {"activation_sparsity_pattern": [0.0] * 5}, ModelError, "sparsity"),
    ("gemma3n", {}, {"altup_num_inputs": 9}, ModelError, "make no sense"),
    ("gemma3n", {}, {"altup_num_inputs": 3}, ModelError, "has shape"),
    ("gemma3n", {}, {"altup_active_idx": 4}, ModelError, "make no sense"),
    ("gemma3n", {}, {"laurel_rank": 0}, ModelError, "laurel_rank 0"),
    ("gemma3n", {}, {"intermediate_size": 64}, ModelError, "has shape (48, 32)"),
    ("gemma3n", {COEFS: torch.ones(16, 3)}, {}, ModelError, f"'{COEFS}' has shape (16, 3)"),
]


@pytest.mark.parametrize("name, tensors, settings, error, message", BAD)
def test_what_does_not_fit_is_refused_by_name(
    name: str,
    tensors: _Tensors,
    settings: dict[str, Any],
    error: type[RedwoodError],
    message: str,
    tmp_path: Path,
) -> None:
    folder = rewritten(folder_of(tmp_path, gemma_model(name)), tensors, **settings)
    check_refused(open_folder, folder, error, message)


@pytest.mark.parametrize("name", ["gemma4-all", "gemma3n"])
def test_any_value_of_any_setting_is_read_or_refused(name: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, gemma_model(name))
    config = folder / "config.json"
    fields = json.loads(config.read_text())
    for key in fields:
        for value in (None, 0, -1, 7, 10**40, 0.5, math.nan, "x", [], [1], {}, True):
            config.write_text(json.dumps({**fields, key: value}))
            with contextlib.suppress(ModelError, UnsupportedError):
                open_folder(folder).close()


@pytest.mark.parametrize("override", [{"rms_norm_eps": 0.1}, {"intermediate_size": 32}])
def test_other_families_have_layers_that_are_alike(
    override: dict[str, Any], tmp_path: Path
) -> None:
    folder = folder_of(tmp_path, tiny_model("llama"))
    with pytest.raises(UnsupportedError, match="per_layer_config"):
        open_folder(rewritten(folder, {}, per_layer_config={"1": override}))


BAD_GGUF: list[tuple[str, dict[str, Any], type[RedwoodError], str]] = [
    ("gemma4-all", {"attention.shared_kv_layers": 7}, ModelError, "of which 7 share keys"),
    ("gemma4-all", {"attention.shared_kv_layers": 2.5}, ModelError, "shared_kv_layers 2.5"),
    ("gemma4-all", {"attention.shared_kv_layers": 1}, ModelError, "lacks the tensor"),
    ("gemma4-all", {"embedding_length_per_layer_input": 13}, ModelError, "per_layer_token_embd"),
    ("gemma4-all", {"embedding_length_per_layer_input": 0}, UnsupportedError, "inp_gate"),
    ("gemma4-all", {"feed_forward_length": [64] * 6}, ModelError, "no list of 7 whole numbers"),
    ("gemma4-all", {"feed_forward_length": 64}, ModelError, "has shape (128, 32)"),
    ("gemma4-all", {"attention.head_count_kv": [3] * 7}, ModelError, "do not share 3"),
    ("gemma4-all", {"attention.head_count_kv": 2}, ModelError, "has shape (32, 32)"),
    ("gemma4-all", {"attention.key_length_swa": None}, ModelError, "key_length_swa is missing"),
    ("gemma4-all", {"attention.value_length": 16}, UnsupportedError, "value_length 16"),
    ("gemma4-all", {"rope.dimension_count": 16}, UnsupportedError, "must be the head size 32"),
    ("gemma4-all", {"sliding_window_pattern": 3}, UnsupportedError, "sliding_window_pattern"),
    ("gemma4-all", {"expert_used_count": 7}, ModelError, "cannot have 7 experts of 6"),
    ("gemma4-all", {"expert_count": 0}, UnsupportedError, "is no part of"),
    ("gemma4-all", {"expert_gating_func": 2}, UnsupportedError, "expert_gating_func 2"),
    ("gemma4-all", {"altup.num_inputs": 4}, UnsupportedError, "altup.num_inputs"),
    ("gemma3n", {"altup.active_idx": 1}, UnsupportedError, "altup.active_idx 1"),
    ("gemma3n", {"altup.num_inputs": 3}, ModelError, "altup"),
    ("gemma3n", {"activation_sparsity_scale": [0.5]}, ModelError, "activation_sparsity_scale"),
    ("gemma3n", {"activation_sparsity_scale": [math.nan] * 6}, ModelError, "sparsity_scale"),
    ("gemma3n", {"attention.key_length_swa": 8}, UnsupportedError, "key_length_swa 8"),
    ("gemma3n", {"expert_count": 4}, UnsupportedError, "mixture of experts"),
]


@pytest.mark.parametrize("name, settings, error, message", BAD_GGUF)
def test_settings_of_a_file_that_do_not_fit_are_named(
    name: str, settings: dict[str, Any], error: type[RedwoodError], message: str, tmp_path: Path
) -> None:
    path = save_gemma(tmp_path / "m.gguf", gemma_model(name), **settings)
    check_refused(open_gguf, path, error, message)


@pytest.mark.parametrize(
    "name, tensor",
    [
        ("gemma4-all", "rope_freqs.weight"),
        ("gemma4-all", "per_layer_token_embd.weight"),
        ("gemma4-all", "blk.3.layer_output_scale.weight"),
        ("gemma4-all", "blk.1.ffn_down_exps.scale"),
        ("gemma3n", "blk.0.laurel_l.weight"),
        ("gemma3n", "altup_unembd_proj.weight"),
    ],
)
def test_a_tensor_that_is_missing_is_named(name: str, tensor: str, tmp_path: Path) -> None:
    model = gemma_model(name)
    tensors = gemma_tensors(model)
    del tensors[tensor]
    path = write_gguf(tmp_path / "m.gguf", name.split("-")[0], gemma_settings(model), tensors)
    with pytest.raises(ModelError) as caught:
        open_gguf(path)
    assert tensor in str(caught.value)
