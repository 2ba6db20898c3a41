"""Tiny random models with recurrent layers, one of every family that Transformers has."""

from __future__ import annotations

from typing import Any

import torch
import transformers

_SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MIXED = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
_DELTA = {
    "layer_types": _MIXED,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_EXPERTS = {
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
}
_MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}
HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lfm2": ("Lfm2", {"layer_types": ["conv", "conv", "full_attention", "conv"]}),
    "lfm2_moe": (
        "Lfm2Moe",
        {
            "layer_types": ["conv", "conv", "full_attention", "conv"],
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "num_dense_layers": 1,
        },
    ),
    "qwen3_next": ("Qwen3Next", {**_DELTA, **_EXPERTS}),
    "qwen3_5": ("Qwen3_5", _DELTA),
    "qwen3_5_moe": ("Qwen3_5Moe", {**_DELTA, **_EXPERTS}),
    "olmo_hybrid": ("OlmoHybrid", _DELTA),
    "granite_hybrid": (
        "GraniteMoeHybrid",
        {
            **_MAMBA,
            "layer_types": ["mamba", "mamba", "attention", "mamba"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 40,
        },
    ),
    "bamba": ("Bamba", {**_MAMBA, "attn_layer_indices": [2]}),
    "falcon_h1": ("FalconH1", {**_MAMBA, "mamba_d_ssm": 64, "head_dim": 8}),
    "nemotron_h": (
        "NemotronH",
        {
            "layer_types": ["mamba", "mlp", "attention", "mamba"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 2,
            "chunk_size": 8,
            "head_dim": 8,
        },
    ),
    "zamba2": (
        "Zamba2",
        {
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "mamba_d_state": 8,
            "mamba_ngroups": 2,
            "n_mamba_heads": 8,
            "chunk_size": 8,
        },
    ),
    "jamba": (
        "Jamba",
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 4,
            "mamba_d_state": 8,
            "use_mamba_kernels": False,
        },
    ),
    "mamba": ("Mamba", {"state_size": 8}),
    "mamba2": (
        "Mamba2",
        {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "chunk_size": 8},
    ),
    "falcon_mamba": ("FalconMamba", {"state_size": 8}),
    "lara_mini": ("LaraMini", {}),
    "lfm3": ("Lfm3", {}),
}
"""By name: what the classes of a family are called, and its settings beside the usual ones."""

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "kimi_linear": (
        "KimiLinear",
        {
            "layer_types": _MIXED,
            "linear_head_dim": 8,
            "linear_num_heads": 4,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
            "num_key_value_heads": 4,
        },
        "does not run with tree attention",  # latents are no keys
    ),
    "rwkv": (
        "Rwkv",
        {"attention_hidden_size": 32},
        "does not use Transformers' attention interface, nor does it keep states",
    ),
    "xlstm": ("xLSTM", {}, "no attribute 'rnn_state'"),
    "minimax": (
        "MiniMax",
        {"num_local_experts": 4, "block_size": 8},
        "uses cache of its own",
    ),
    "recurrent_gemma": (
        "RecurrentGemma",
        {"lru_width": 32, "attention_window_size": 8, "num_key_value_heads": 1, "head_dim": 8},
        "other logits in a tree than on its paths",  # its modules keep the states themselves
    ),
    "zaya": ("Zaya", {}, "called otherwise than with hidden states and a cache"),
}
"""Likewise, families that are refused, and what is said."""

if hasattr(transformers.Cache, "get_conv_state"):  # since about 5.20
    FORMS = {
        "falcon_mamba": "single",  # several tokens are read from nothing only
        "jamba": "single",
        "mamba": "single",
        "nemotron_h": "several",  # one token is read without the limit of its time step
        "zamba2": "several",
    }
else:  # the modules of older releases forget a state where they read several tokens
    for _family in ("falcon_mamba", "lara_mini", "lfm3", "mamba", "nemotron_h", "olmo_hybrid"):
        del HYBRIDS[_family]
    for _family in ("kimi_linear", "recurrent_gemma", "zamba2", "zaya"):
        (HYBRIDS if _family in HYBRIDS else REFUSED).pop(_family)
    FORMS = {name: "any" if name.startswith("qwen") else "single" for name in HYBRIDS}


def tiny_hybrid(family: str, seed: int = 0, **changes: Any) -> Any:
    """A random model in float32 whose logits are spread, and its rounding is small."""
    kind, settings = (HYBRIDS.get(family) or REFUSED[family])[:2]
    for suffix in ("TextConfig", "Config"):
        made = getattr(transformers, kind + suffix, None)
        if made is not None:
            break
    torch.manual_seed(seed)
    assert made is not None
    model: Any = getattr(transformers, f"{kind}ForCausalLM")(
        made(**{**_SMALL, **settings, **changes})
    )
    return model.eval()
