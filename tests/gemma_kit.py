"""Tiny random models of Gemma 3n and Gemma 4 with all their parts, as folders and GGUF files."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
import transformers

from decoder_kit import stored, write_gguf
from families_kit import varied

_S, _F = "sliding_attention", "full_attention"
_SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_FOUR: dict[str, Any] = {
    **_SMALL,
    "num_hidden_layers": 7,
    "layer_types": [_S, _S, _F, _S, _F, _S, _F],
    "global_head_dim": 32,
    "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 8.0,
}
_UNIFIED = {key: value for key, value in _FOUR.items() if "per_layer" not in key}
_UNIFIED |= {"num_kv_shared_layers": 2, "use_double_wide_mlp": True}
_EMBEDDED = {"hidden_size_per_layer_input": 12, "vocab_size_per_layer_input": 96}
_SHARED = {"num_kv_shared_layers": 2, "use_double_wide_mlp": True}
_SAME = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
_EXPERTS = {"enable_moe_block": True, "num_experts": 6, "top_k_experts": 3}
_EXPERTS |= {"moe_intermediate_size": 24}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma4-embedded": ("Gemma4", {**_FOUR, **_EMBEDDED, **_SHARED}),  # as E2B and E4B
    "gemma4-dense": ("Gemma4", {**_FOUR, **_SAME}),  # as 31B
    "gemma4-mixture": ("Gemma4", {**_FOUR, **_SAME, **_EXPERTS}),  # as 26B-A4B
    "gemma4-unified": ("Gemma4Unified", _UNIFIED),  # as 12B
    "gemma4-all": ("Gemma4", {**_FOUR, **_EMBEDDED, **_SHARED, **_SAME, **_EXPERTS}),
    "gemma3n": (
        "Gemma3n",
        {
            **_SMALL,
            "num_hidden_layers": 6,
            "layer_types": [_S, _S, _F, _S, _S, _F],
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 12,
            "vocab_size_per_layer_input": 90,
            "laurel_rank": 8,
            "intermediate_size": [64, 48, 64, 80, 64, 64],
            "activation_sparsity_pattern": [0.9, 0.5, 0.0, 0.3, 0.0, 0.0],
        },
    ),
}


def gemma_model(name: str, **changes: Any) -> Any:
    """A random model in float32."""
    torch.manual_seed(0)
    kind, fields = MODELS[name]
    config = getattr(transformers, f"{kind}TextConfig")(**copy.deepcopy({**fields, **changes}))
    config._attn_implementation = "eager"
    return varied(getattr(transformers, f"{kind}ForCausalLM")(config).eval())


def with_images(name: str) -> Any:
    """A random model with images whose text part is one of `MODELS`."""
    torch.manual_seed(0)
    kind, fields = MODELS[name]
    vision: Any = None
    if kind == "Gemma3n":
        vision = {"architecture": "mobilenetv5_300m_enc", "hidden_size": 16, "vocab_size": 4}
    config = getattr(transformers, f"{kind}Config")(
        text_config=copy.deepcopy(fields), vision_config=vision, audio_config=None
    )
    config._attn_implementation = "eager"
    return varied(getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval())


_NAMES = {
    "model.embed_tokens_per_layer": "per_layer_token_embd",
    "model.embed_tokens": "token_embd",
    "model.per_layer_model_projection": "per_layer_model_proj",
    "model.per_layer_projection_norm": "per_layer_proj_norm",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.": "blk.",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm_2": "pre_ffw_norm_2",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "per_layer_input_gate": "inp_gate",
    "per_layer_projection": "proj",
    "post_per_layer_input_norm": "post_norm",
    "layer_scalar": "layer_output_scale.weight",
    "self_attn.o_proj": "attn_output",
    **{f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"},
    **{f"self_attn.{part}_norm": f"attn_{part}_norm" for part in "qk"},
    **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
    "router.per_expert_scale": "ffn_down_exps.scale",
    "router.scale": "ffn_gate_inp.scale",
    "router.proj": "ffn_gate_inp",
    "experts.gate_up_proj": "ffn_gate_up_exps.weight",
    "experts.down_proj": "ffn_down_exps.weight",
    "altup.correct_output_scale": "altup_correct_scale.weight",
    "altup.correction_coefs": "altup_correct_coef",
    "altup.prediction_coefs": "altup_predict_coef",
    "altup.modality_router": "altup_router",
    "altup.router_norm": "altup_router_norm",
    "laurel.linear_left": "laurel_l",
    "laurel.linear_right": "laurel_r",
    "laurel.post_laurel_norm": "laurel_post_norm",
}


def gemma_tensors(model: Any) -> dict[str, np.ndarray[Any, Any]]:
    """The weights under the names of GGUF files, in the order of llama.cpp's converter."""
    made: dict[str, np.ndarray[Any, Any]] = {}
    stacked: dict[str, list[Any]] = {"altup_proj": [], "altup_unembd_proj": []}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        if "altup_projections" in name or "altup_unembed_projections" in name:
            stacked["altup_unembd_proj" if "unembed" in name else "altup_proj"].append(value)
            continue
        for theirs, ours in _NAMES.items():
            name = name.replace(theirs, ours)
        made[name] = value.numpy().copy()
    for name, values in stacked.items():
        if values:
            made[f"{name}.weight"] = torch.stack(values).numpy().copy()
    config = model.config
    if config.model_type != "gemma3n_text":
        _, dim = heads_of(config, config.layer_types.index(_F))
        rope = config.rope_parameters[_F]
        turning = int(dim * rope["partial_rotary_factor"] / 2)
        factors = [1.0] * turning + [1e30] * (dim // 2 - turning)
        made["rope_freqs.weight"] = np.array(factors, np.float32)
    elif made:  # tables are padded to the vocabulary
        table = made["per_layer_token_embd.weight"]
        missing = config.vocab_size - len(table)
        made["per_layer_token_embd.weight"] = np.pad(table, ((0, missing), (0, 0)))
    return made


def heads_of(config: Any, layer: int) -> tuple[int, int]:
    """Key-value heads of a layer, and their size."""
    if hasattr(config, "per_layer_config"):
        of = config.per_layer_config[layer]
        return of.num_key_value_heads, of.head_dim
    full = config.layer_types[layer] == _F  # Transformers before 5.24
    same = full and getattr(config, "attention_k_eq_v", False)
    kv_heads = (same and config.num_global_key_value_heads) or config.num_key_value_heads
    return kv_heads, (full and getattr(config, "global_head_dim", 0)) or config.head_dim


def gemma_settings(model: Any) -> dict[str, Any]:
    """The settings that llama.cpp's converter writes of a model."""
    config = model.config
    layers = config.num_hidden_layers
    slides = [kind == _S for kind in config.layer_types]
    kv_heads = [heads_of(config, layer)[0] for layer in range(layers)]
    local, full = (heads_of(config, slides.index(kind))[1] for kind in (True, False))
    settings = {
        "block_count": layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": kv_heads[slides.index(True)],
        "attention.key_length": full,
        "attention.value_length": full,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.sliding_window": config.sliding_window,
        "attention.sliding_window_pattern": slides,
        "attention.shared_kv_layers": config.num_kv_shared_layers,
        "embedding_length_per_layer_input": getattr(config, "hidden_size_per_layer_input", 0),
        "final_logit_softcapping": config.final_logit_softcapping,
        "rope.freq_base": config.rope_parameters[_F]["rope_theta"],
        "rope.freq_base_swa": config.rope_parameters[_S]["rope_theta"],
    }
    if config.model_type == "gemma3n_text":
        settings["altup.active_idx"] = config.altup_active_idx
        settings["altup.num_inputs"] = config.altup_num_inputs
        settings["activation_sparsity_scale"] = [
            NormalDist().inv_cdf(share) if share else -math.inf
            for share in config.activation_sparsity_pattern
        ]
        return settings
    settings |= {
        "attention.key_length_swa": local,
        "attention.value_length_swa": local,
        "rope.dimension_count": full,
        "rope.dimension_count_swa": local,
    }
    if len(set(kv_heads)) > 1:
        settings["attention.head_count_kv"] = kv_heads
    if config.use_double_wide_mlp:
        own, width = layers - config.num_kv_shared_layers, config.intermediate_size
        settings["feed_forward_length"] = [width * (1 + (i >= own)) for i in range(layers)]
    if getattr(config, "enable_moe_block", False):
        settings["expert_count"] = config.num_experts
        settings["expert_used_count"] = config.top_k_experts
        settings["expert_feed_forward_length"] = config.moe_intermediate_size
    return settings


def save_gemma(path: Path, model: Any, kind: str = "F32", **changes: Any) -> Path:
    """A model as a GGUF file; its big matrices in a ggml type. Changes of None leave keys out."""
    settings = {**gemma_settings(model), **changes}
    settings = {key: value for key, value in settings.items() if value is not None}
    tensors: dict[str, Any] = gemma_tensors(model)
    if kind != "F32":
        for name, x in tensors.items():
            if x.ndim > 1 and "_inp" not in name and "altup" not in name and "laurel" not in name:
                raw, held = stored(x.reshape(-1, x.shape[-1]), kind)
                tensors[name] = raw.reshape(*x.shape[:-1], -1), held
    architecture = "gemma3n" if model.config.model_type == "gemma3n_text" else "gemma4"
    return write_gguf(path, architecture, settings, tensors)
