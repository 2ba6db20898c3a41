"""Tiny random models with recurrent layers, as folders and GGUF files."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from decoder_kit import write_gguf
from families_kit import varied

_SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_DELTA: dict[str, Any] = {
    "head_dim": 16,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 4,
    "num_hidden_layers": 5,
}
_MOE = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 48}
_MOE |= {"shared_expert_intermediate_size": 40}
_CONV = {"layer_types": ["conv", "full_attention", "conv", "conv"], "block_multiple_of": 16}
HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lfm2": ("Lfm2", {**_CONV, "conv_L_cache": 3, "tie_word_embeddings": False}),
    "lfm2-biased": ("Lfm2", {**_CONV, "conv_L_cache": 4, "conv_bias": True}),
    "qwen3next": ("Qwen3Next", {**_DELTA, **_MOE, "mlp_only_layers": [1]}),
    "qwen35": ("Qwen3_5", {**_DELTA}),
    "qwen35moe": ("Qwen3_5Moe", {**_DELTA, **_MOE, "tie_word_embeddings": True}),
}


def hybrid_model(name: str, **changes: Any) -> Any:
    """A random model in float32."""
    torch.manual_seed(0)
    kind, own = HYBRIDS[name]
    fields = copy.deepcopy({**_SMALL, **own, **changes})
    text = "Text" if kind.startswith("Qwen3_5") else ""
    config = getattr(transformers, f"{kind}{text}Config")(**fields)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    return varied(model)


GGUF = {"lfm2": "lfm2", "qwen3next": "qwen3next", "qwen35": "qwen35", "qwen35moe": "qwen35moe"}
"""general.architecture of the models that GGUF files are read of."""
_NAMES = [
    ("model.embed_tokens", "token_embd"),
    ("model.embedding_norm", "token_embd_norm"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
    ("model.layers.", "blk."),
    ("operator_norm", "attn_norm"),
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "post_attention_norm"),
    *((f"self_attn.{part}_proj", f"attn_{part}") for part in "qkv"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.out_proj", "attn_output"),
    *((f"self_attn.{part}_layernorm", f"attn_{part}_norm") for part in "qk"),
    *((f"self_attn.{part}_norm", f"attn_{part}_norm") for part in "qk"),
    *(
        (f"feed_forward.{k}.", f"ffn_{v}.")
        for k, v in (("w1", "gate"), ("w2", "down"), ("w3", "up"))
    ),
    ("conv.conv.", "shortconv.conv."),
    *((f".conv.{part}.", f".shortconv.{part}.") for part in ("in_proj", "out_proj")),
    ("linear_attn.in_proj_qkv.", "attn_qkv."),
    ("linear_attn.in_proj_z.", "attn_gate."),
    ("linear_attn.in_proj_b.", "ssm_beta."),
    ("linear_attn.in_proj_a.", "ssm_alpha."),
    ("linear_attn.in_proj_ba.", "ssm_ba."),
    ("linear_attn.conv1d", "ssm_conv1d"),
    ("linear_attn.dt_bias", "ssm_dt.bias"),
    ("linear_attn.A_log", "ssm_a"),
    ("linear_attn.norm", "ssm_norm"),
    ("linear_attn.out_proj", "ssm_out"),
    ("mlp.shared_expert_gate", "ffn_gate_inp_shexp"),
    *((f"mlp.shared_expert.{p}_proj", f"ffn_{p}_shexp") for p in ("gate", "up", "down")),
    ("mlp.experts.down_proj", "ffn_down_exps.weight"),
    *((f"mlp.{part}_proj", f"ffn_{part}") for part in ("gate", "up", "down")),
    ("mlp.gate.", "ffn_gate_inp."),
]


def _tiled(value: torch.Tensor, config: Any, dim: int, first: int, size: int) -> torch.Tensor:
    """Value heads as llama.cpp's converter orders them: one of every key head, and so on."""
    keys, heads = config.linear_num_key_heads, config.linear_num_value_heads
    order = (
        torch.arange(heads * size).reshape(keys, heads // keys, size).transpose(0, 1).reshape(-1)
    )
    whole = torch.cat((torch.arange(first), first + order))
    return value.index_select(dim, whole)


def _converted(name: str, kind: str, value: torch.Tensor, config: Any) -> dict[str, torch.Tensor]:
    """What the converter makes of a tensor, under the names of Transformers."""
    if "conv" in name and value.dim() == 3:
        value = value.squeeze(1)
    if kind == "lfm2":
        return {name: value}
    if name.endswith("norm.weight") and "linear_attn" not in name:
        value = value + 1
    if name.endswith("A_log"):
        value = -torch.exp(value)
    if kind == "qwen3next" and "in_proj_qkvz" in name:
        each = config.linear_num_value_heads // config.linear_num_key_heads
        key, inner = config.linear_key_head_dim, each * config.linear_value_head_dim
        groups = value.reshape(config.linear_num_key_heads, 2 * key + 2 * inner, -1)
        parts = [p.reshape(-1, value.shape[1]) for p in groups.split([key, key, inner, inner], 1)]
        stem = name.replace("qkvz", "{}")
        return {stem.format("qkv"): torch.cat(parts[:3]), stem.format("z"): parts[3]}
    if kind != "qwen3next" and "linear_attn." in name:
        size, keys = config.linear_value_head_dim, config.linear_key_head_dim
        first = 2 * keys * config.linear_num_key_heads
        if "in_proj_qkv" in name or "conv1d" in name:
            value = _tiled(value, config, 0, first, size)
        elif "in_proj_z" in name:
            value = _tiled(value, config, 0, 0, size)
        elif "out_proj" in name:
            value = _tiled(value, config, 1, 0, size)
        elif not name.endswith("norm.weight"):
            value = _tiled(value, config, 0, 0, 1)
    if name.endswith("experts.gate_up_proj"):
        gate, up = value.chunk(2, 1)
        stem = name.replace("mlp.experts.gate_up_proj", "ffn_{}_exps.weight")
        return {stem.format("gate"): gate, stem.format("up"): up}
    return {name: value[0] if name.endswith("shared_expert_gate.weight") else value}


def hybrid_tensors(kind: str, model: Any) -> dict[str, np.ndarray[Any, Any]]:
    """The weights of a model under the names and in the order of GGUF files."""
    made = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        for part, numbers in _converted(name, kind, value, model.config).items():
            for theirs, ours in _NAMES:
                part = part.replace(theirs, ours)
            made[part] = numbers.contiguous().numpy().copy()
    return made


def hybrid_settings(kind: str, model: Any) -> dict[str, Any]:
    """The settings that llama.cpp's converter writes of a model."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    made: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "rope.freq_base": config.rope_parameters["rope_theta"],
    }
    if kind == "lfm2":
        full = [each == "full_attention" for each in config.layer_types]
        made |= {
            "feed_forward_length": model.model.layers[0].feed_forward.w1.weight.shape[0],
            "attention.head_count_kv": [config.num_key_value_heads * each for each in full],
            "attention.layer_norm_rms_epsilon": config.norm_eps,
            "shortconv.l_cache": config.conv_L_cache,
            "vocab_size": config.vocab_size,
        }
        return made
    heads = config.linear_num_value_heads
    made |= {
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "ssm.conv_kernel": config.linear_conv_kernel_dim,
        "ssm.state_size": config.linear_key_head_dim,
        "ssm.group_count": config.linear_num_key_heads,
        "ssm.time_step_rank": heads,
        "ssm.inner_size": heads * config.linear_value_head_dim,
        "full_attention_interval": 4,
        "rope.dimension_count": head_dim // 4,
    }
    if kind != "qwen35moe":
        made["feed_forward_length"] = config.intermediate_size
    if kind != "qwen35":
        made["expert_count"] = config.num_experts
        made["expert_used_count"] = config.num_experts_per_tok
        made["expert_feed_forward_length"] = config.moe_intermediate_size
        made["expert_shared_feed_forward_length"] = config.shared_expert_intermediate_size
    if kind != "qwen3next":
        made["rope.dimension_sections"] = [11, 11, 10, 0]
    return made


def save_hybrid(
    path: Path, kind: str, model: Any, beside: Mapping[str, Any] | None = None, **changes: Any
) -> Path:
    """A model as a GGUF file in float32, with tensors beside its own; None leaves a setting out."""
    settings = {**hybrid_settings(kind, model), **changes}
    settings = {key: value for key, value in settings.items() if value is not None}
    return write_gguf(path, GGUF[kind], settings, {**hybrid_tensors(kind, model), **(beside or {})})
