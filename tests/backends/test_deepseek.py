"""DeepSeek's latents, and the mixtures of those after it: old and new files, kinds, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from test_families import check_logits, rewritten, saved
from test_native import check_bitwise, folder_of

from decoder_kit import check_refused, numbers, write_gguf
from deepseek_kit import LATENT, apart, whole
from families_kit import family_model, family_settings, family_tensors, save_family
from redwood.backends.base import Nodes
from redwood.backends.native.load import load_native
from redwood.backends.native.weights import open_folder, open_gguf
from redwood.errors import ModelError, RedwoodError, UnsupportedError

WIDE = {
    "hidden_size": 256,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "kv_lora_rank": 256,
    "q_lora_rank": 256,
    "moe_intermediate_size": 256,
    "intermediate_size": 256,
    "max_position_embeddings": 2048,
    "initializer_range": 0.05,
}


def joined(tensors: dict[str, Any], config: Any) -> dict[str, Any]:
    """Keys and values in one tensor, as older files have them: the inverse of `apart`."""
    made = {name: value for name, value in tensors.items() if "_b.weight" not in name}
    made |= {name: value for name, value in tensors.items() if "q_b" in name}
    for layer in range(config.num_hidden_layers):
        keys = tensors[f"blk.{layer}.attn_k_b.weight"].transpose(0, 2, 1)
        both = np.concatenate((keys, tensors[f"blk.{layer}.attn_v_b.weight"]), 1)
        made[f"blk.{layer}.attn_kv_b.weight"] = both.reshape(-1, config.kv_lora_rank).copy()
    return made


@pytest.mark.parametrize("family", LATENT)
def test_older_files_keep_keys_and_values_together(family: str, tmp_path: Path) -> None:
    model = family_model(family)
    settings = {**family_settings(family, model), **whole(model.config)}
    settings = {key: value for key, value in settings.items() if value is not None}
    tensors = joined(family_tensors(family, model), model.config)
    assert sorted(apart(tensors, model.config)) == sorted(family_tensors(family, model))
    path = write_gguf(tmp_path / "m.gguf", "deepseek2", settings, tensors)
    check_logits(load_native(folder_of(tmp_path, model), path, kv="f32", threads=2), model)


@pytest.mark.parametrize("family", ["deepseek2", "deepseek3"])
def test_yarn_of_latents(family: str, tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "beta_fast": 32, "beta_slow": 1}
    rope |= {"mscale": 0.707, "mscale_all_dim": 0.707, "original_max_position_embeddings": 64}
    model = family_model(family, rope_parameters=rope)
    check_logits(load_native(saved(tmp_path, model), None, kv="f32", threads=1), model)
    path = save_family(tmp_path / "m.gguf", family, model)
    check_logits(load_native(tmp_path, path, kv="f32", threads=1), model)


def test_the_two_scales_of_yarn_may_differ_in_a_folder(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "mscale": 1.0}
    rope |= {"mscale_all_dim": 0.5, "original_max_position_embeddings": 32}
    model = family_model("deepseek3", rope_parameters=rope)
    check_logits(load_native(saved(tmp_path, model), None, kv="f32", threads=1), model)


@pytest.mark.parametrize("change", [{"q_lora_rank": None}, {"n_group": 1, "topk_group": 1}])
def test_shapes_of_kimi_and_moonlight(change: dict[str, Any], tmp_path: Path) -> None:
    model = family_model("deepseek3", **change, first_k_dense_replace=0)
    check_logits(load_native(saved(tmp_path, model), None, kv="f32", threads=2), model)
    path = save_family(tmp_path / "m.gguf", "deepseek3", model)
    check_logits(load_native(tmp_path, path, kv="f32", threads=2), model)


@pytest.mark.parametrize("kind", ["Q4_K", "Q8_0", "F16", "BF16"])
def test_quantised_latents_keep_the_bits(kind: str, tmp_path: Path) -> None:
    wide = {**WIDE, "qk_nope_head_dim": 256, "v_head_dim": 64} if kind == "Q4_K" else WIDE
    model = family_model("deepseek3", **wide)
    path = save_family(tmp_path / "m.gguf", "deepseek3", model, kind)
    check_bitwise(load_native(folder_of(tmp_path, model), path, threads=2), seed=4)


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0", "F16", "F32"])
def test_keys_that_stand_turned_are_read_exactly(kind: str, tmp_path: Path) -> None:
    model = family_model("deepseek3", **WIDE)
    config, tensors = model.config, family_tensors("deepseek3", model)
    name = "blk.1.attn_k_b.weight"
    given = tensors[name]
    raw = quantize(given.reshape(-1, given.shape[-1]), GGMLQuantizationType[kind])
    want = dequantize(raw, GGMLQuantizationType[kind]).reshape(given.shape).transpose(0, 2, 1)
    tensors[name] = raw.reshape(*given.shape[:-1], -1), kind
    path = write_gguf(
        tmp_path / "m.gguf", "deepseek2", family_settings("deepseek3", model), tensors
    )
    with open_gguf(path) as source:
        weight = source.get("k_b", 1)
        assert weight is not None and weight.kind == ("F32" if kind[0] == "Q" else kind)
        got = numbers(weight).reshape(config.num_attention_heads, -1, config.kv_lora_rank)
        assert np.array_equal(got, want)


def test_norms_of_queries_of_glm(tmp_path: Path) -> None:
    model = family_model("glm4moe", use_qk_norm=True)
    check_logits(load_native(saved(tmp_path, model), None, kv="f32", threads=1), model)
    path = save_family(tmp_path / "m.gguf", "glm4moe", model)
    check_logits(load_native(tmp_path, path, kv="f32", threads=1), model)


@pytest.mark.parametrize("family", ["deepseek3", "glm4moe"])
def test_layers_that_draft_are_left_where_they_are(family: str, tmp_path: Path) -> None:
    model = family_model(family, num_nextn_predict_layers=1)
    more = {
        f"model.layers.3.{name}": torch.ones(4, 4)
        for name in ("eh_proj.weight", "mlp.experts.0.up_proj.weight")
    }
    folder = rewritten(saved(tmp_path, model), more)
    check_logits(load_native(folder, None, kv="f32", threads=1), model)
    beyond = {"model.layers.4.eh_proj.weight": torch.ones(4, 4)}
    with pytest.raises(ModelError, match=r"layers\.4.* and says it has 3 layers"):
        open_folder(rewritten(folder, beyond))
    few = rewritten(saved(tmp_path / "few", model), {}, num_hidden_layers=2)
    check_refused(open_folder, few, ModelError, "says it has 2 layers")  # none of these drafts
    with pytest.raises(ModelError, match="num_nextn_predict_layers -1 is no count"):
        open_folder(rewritten(folder, {}, num_nextn_predict_layers=-1))


def test_layers_that_draft_in_a_file(tmp_path: Path) -> None:
    model = family_model("glm4moe")
    tensors = family_tensors("glm4moe", model)
    tensors |= {f"blk.3.nextn.{name}.weight": np.ones((4, 4), np.float32) for name in ("eh_proj",)}
    settings = family_settings("glm4moe", model) | {"block_count": 4, "nextn_predict_layers": 1}
    path = write_gguf(tmp_path / "m.gguf", "glm4moe", settings, tensors)
    check_logits(load_native(folder_of(tmp_path, model), path, kv="f32", threads=1), model)
    settings["nextn_predict_layers"] = 4
    with pytest.raises(ModelError, match="nextn_predict_layers 4 of 4 layers"):
        open_gguf(write_gguf(path, "glm4moe", settings, tensors))


def test_dynamic_scaling_changes_nothing_up_to_the_context(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 6.0, "rope_theta": 1e4}
    model = family_model("internlm3", rope_parameters=rope)
    folder = saved(tmp_path, model)
    check_logits(load_native(folder, None, kv="f32", threads=1), model)
    context = model.config.max_position_embeddings
    row = [int(t) for t in torch.randint(0, 96, (context,))]
    backend = load_native(folder, None, kv="f32", threads=1)
    (got,) = backend.extend([Nodes(backend.open(), row)])
    with torch.inference_mode():
        want = model(input_ids=torch.tensor([row]), use_cache=False).logits[0]
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    with pytest.raises(UnsupportedError, match="dynamic NTK .* past 128 positions"):
        load_native(folder, None, capacity=context + 1)


BAD: list[tuple[str, dict[str, Any], type[RedwoodError], str]] = [
    ("deepseek3", {"attention.kv_lora_rank": None}, ModelError, "kv_lora_rank is missing"),
    ("deepseek3", {"attention.q_lora_rank": 16}, ModelError, "attn_q_b.weight' has shape (80, 20)"),
    ("deepseek3", {"attention.q_lora_rank": 1 << 30}, ModelError, "is no count"),
    ("deepseek3", {"attention.q_lora_rank": None}, ModelError, "attn_q.weight"),
    ("deepseek3", {"attention.key_length_mla": 24}, ModelError, "has shape"),
    ("deepseek3", {"attention.key_length_mla": 8}, ModelError, "rope.dimension_count 8"),
    ("deepseek3", {"attention.value_length_mla": 30}, ModelError, "value_length_mla 30 is wider"),
    ("deepseek3", {"attention.value_length_mla": None}, ModelError, "value_length_mla is missing"),
    ("deepseek3", {"attention.key_length": 20}, UnsupportedError, "key_length 20"),
    ("deepseek3", {"attention.head_count_kv": 2}, ModelError, "head_count_kv must be 1"),
    ("deepseek3", {"attention.temperature_scale": 0.1}, UnsupportedError, "temperature_scale"),
    ("deepseek3", {"rope.dimension_count": 7}, UnsupportedError, "key_length"),
    ("deepseek3", {"leading_dense_block_count": 2}, ModelError, "lacks the tensor 'blk.1.ffn_up"),
    ("deepseek3", {"leading_dense_block_count": 0}, ModelError, "lacks the tensor 'blk.0"),
    ("deepseek3", {"leading_dense_block_count": 1 << 20}, ModelError, "is no count"),
    ("deepseek3", {"expert_gating_func": 3}, UnsupportedError, "expert_gating_func 3 is a router"),
    ("deepseek3", {"expert_gating_func": None}, ModelError, "expert_gating_func is missing"),
    ("deepseek3", {"expert_weights_norm": None}, ModelError, "expert_weights_norm"),
    ("deepseek3", {"expert_weights_norm": 3}, ModelError, "expert_weights_norm 3"),
    ("deepseek3", {"expert_weights_scale": -1.0}, ModelError, "scale -1.0"),
    ("deepseek3", {"expert_group_count": 3}, ModelError, "8 experts are not 3 groups"),
    ("deepseek3", {"expert_group_used_count": 5}, ModelError, "4 groups, of which 5"),
    ("deepseek3", {"expert_group_used_count": None}, ModelError, "there are 4 groups"),
    ("deepseek3", {"expert_group_used_count": 1}, ModelError, "cannot have 3 experts of 8"),
    ("deepseek3", {"expert_used_count": 9}, ModelError, "cannot have 9 experts of 8"),
    ("deepseek3", {"expert_count": 12}, ModelError, "ffn_gate_inp.weight' has shape (8, 32)"),
    ("deepseek3", {"expert_shared_count": 1}, ModelError, "shexp.weight' has shape"),
    ("deepseek3", {"expert_shared_count": 0}, UnsupportedError, "shexp.weight' is no part"),
    ("glm4moe", {"expert_used_count": 0}, ModelError, "expert_used_count 0"),
    ("glm4moe", {"attention.kv_lora_rank": 4}, UnsupportedError, "kv_lora_rank"),
    ("glm4moe", {"nextn_predict_layers": 1}, ModelError, "blk.2 has no tensor nextn"),
]


@pytest.mark.parametrize("family, settings, error, message", BAD)
def test_settings_that_do_not_fit_are_named(
    family: str, settings: dict[str, Any], error: type[RedwoodError], message: str, tmp_path: Path
) -> None:
    path = save_family(tmp_path / "m.gguf", family, family_model(family), **settings)
    check_refused(open_gguf, path, error, message)


def test_layers_named_dense_or_sparse(tmp_path: Path) -> None:
    kinds = ["sparse", "dense", "sparse"]
    model = family_model("glm4moelite", mlp_layer_types=kinds)
    folder = saved(tmp_path, model)
    check_logits(load_native(folder, None, kv="f32", threads=1), model)
    with pytest.raises(ModelError, match="mlp_layer_types .* does not fit 3 layers"):
        open_folder(rewritten(folder, {}, mlp_layer_types=kinds[:2]))
    with pytest.raises(UnsupportedError, match="only dense and sparse are known"):
        open_folder(rewritten(folder, {}, mlp_layer_types=["hash", *kinds[1:]]))
    with pytest.raises(ModelError, match="lacks the tensor"):
        open_folder(rewritten(folder, {}, mlp_layer_types=["dense"] * 3))


BAD_TENSORS: list[tuple[str, tuple[int, ...] | None, str]] = [
    ("blk.1.attn_k_b.weight", (4, 12, 24), "has shape (4, 12, 24) instead of (4, 24, 12)"),
    ("blk.1.attn_v_b.weight", (4, 24, 10), "has shape (4, 24, 10) instead of (4, 10, 24)"),
    ("blk.1.attn_v_b.weight", None, "lacks the tensor 'blk.1.attn_v_b.weight'"),
    ("blk.1.attn_q_a_norm.weight", (21,), "attn_q_a_norm.weight' has shape (21,)"),
    ("blk.1.exp_probs_b.bias", (7,), "exp_probs_b.bias' has shape (7,)"),
    ("blk.2.exp_probs_b.bias", None, "lacks the tensor 'blk.2.exp_probs_b.bias'"),
    ("blk.2.ffn_up_exps.weight", (7, 16, 32), "ffn_up_exps.weight' has shape (7, 16, 32)"),
    ("blk.2.ffn_down_exps.weight", (8, 16, 32), "ffn_down_exps.weight' has shape (8, 16, 32)"),
    ("blk.1.attn_kv_b.weight", (88, 24), "'blk.1.attn_"),
]


@pytest.mark.parametrize("name, shape, message", BAD_TENSORS)
def test_tensors_that_do_not_fit_are_named(
    name: str, shape: tuple[int, ...] | None, message: str, tmp_path: Path
) -> None:
    model = family_model("deepseek3")
    tensors = {k: v for k, v in family_tensors("deepseek3", model).items() if k != name}
    if shape is not None:
        tensors[name] = np.ones(shape, np.float32)
    path = write_gguf(
        tmp_path / "m.gguf", "deepseek2", family_settings("deepseek3", model), tensors
    )
    with pytest.raises((ModelError, UnsupportedError)) as caught:
        open_gguf(path)
    assert message in str(caught.value)


BAD_FOLDERS: list[tuple[dict[str, Any], type[RedwoodError], str]] = [
    ({"q_lora_rank": 0}, ModelError, "q_lora_rank 0"),
    ({"q_lora_rank": 16}, ModelError, "q_b_proj.weight' has shape (80, 20)"),
    ({"q_lora_rank": None}, ModelError, "lacks the tensor 'model.layers.0.self_attn.q_proj"),
    ({"rope_interleave": False}, UnsupportedError, "rope_interleave False"),
    ({"attention_bias": True}, UnsupportedError, "attention_bias"),
    ({"n_group": 3}, ModelError, "8 experts are not 3 groups"),
    ({"topk_group": 5}, ModelError, "of which 5"),
    ({"scoring_func": "softmax"}, UnsupportedError, "scoring_func 'softmax'"),
    ({"topk_method": "greedy"}, UnsupportedError, "topk_method 'greedy'"),
    ({"moe_layer_freq": 2}, UnsupportedError, "moe_layer_freq '2'"),
    ({"num_experts_per_tok": 9}, ModelError, "cannot have 9 experts of 8"),
    ({"v_head_dim": 30}, UnsupportedError, "v_head_dim 30 is wider"),
]


@pytest.mark.parametrize("settings, error, message", BAD_FOLDERS)
def test_settings_of_a_folder_that_do_not_fit_are_named(
    settings: dict[str, Any], error: type[RedwoodError], message: str, tmp_path: Path
) -> None:
    folder = rewritten(saved(tmp_path, family_model("deepseek3")), {}, **settings)
    check_refused(open_folder, folder, error, message)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "deepseek_v3"


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"scoring_func": "sigmoid"}, "scoring_func 'sigmoid'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq '2'"),
        ({"topk_method": "noaux_tc"}, "topk_method 'noaux_tc'"),
    ],
)
def test_a_router_that_is_not_that_of_deepseek_2_is_named(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = rewritten(saved(tmp_path, family_model("deepseek2")), {}, **settings)
    check_refused(open_folder, folder, UnsupportedError, message)
