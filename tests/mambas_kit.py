"""Tiny random models with Mamba-2 layers, and Granite's others, as folders and GGUF files."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import transformers

from families_kit import varied

_OUTSIDE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SMALL: dict[str, Any] = {
    **_OUTSIDE,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
_STATE: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 16,
    "mamba_d_head": 8,
    "mamba_d_conv": 4,
    "mamba_chunk_size": 16,
}
_GRANITE: dict[str, Any] = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 1.5,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.31,
}
_MIXED = ["linear_attention", "linear_attention", "full_attention", "linear_attention"]
_HYBRID = {**_SMALL, **_STATE, **_GRANITE, "layer_types": _MIXED, "shared_intermediate_size": 40}
_FALCON: dict[str, Any] = {
    **_SMALL,
    **_STATE,
    "mamba_d_ssm": 64,
    "num_hidden_layers": 3,
    "head_dim": 8,
    "lm_head_multiplier": 0.8,
    "embedding_multiplier": 2.5,
    "mlp_multipliers": [0.7, 1.3],
    "key_multiplier": 0.6,
    "attention_out_multiplier": 0.9,
    "attention_in_multiplier": 1.2,
    "ssm_multipliers": [0.7, 0.8, 1.2, 1.3, 0.9],
    "ssm_in_multiplier": 1.4,
    "ssm_out_multiplier": 0.6,
}
_MAMBA2: dict[str, Any] = {
    **_OUTSIDE,
    "num_hidden_layers": 3,
    "num_heads": 8,
    "head_dim": 8,
    "state_size": 16,
    "n_groups": 2,
    "conv_kernel": 4,
    "chunk_size": 16,
}
_BLOCKS = ["linear_attention", "mlp", "full_attention", "moe", "linear_attention", "moe", "mlp"]
_NEMOTRON: dict[str, Any] = {
    **_OUTSIDE,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "layers_block_type": _BLOCKS,
    "mamba_num_heads": 6,
    "mamba_head_dim": 12,
    "ssm_state_size": 16,
    "n_groups": 3,
    "conv_kernel": 3,
    "chunk_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 40,
    "routed_scaling_factor": 1.7,
}
MAMBAS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba2": ("Mamba2", _MAMBA2),
    "mamba2-biased": (
        "Mamba2",
        {
            **_MAMBA2,
            "use_bias": True,
            "n_groups": 1,
            "tie_word_embeddings": True,
            "time_step_limit": (0.4, 0.9),
        },
    ),
    "granite-hybrid": ("GraniteMoeHybrid", {**_HYBRID, "num_local_experts": 6}),
    "granite-hybrid-dense": (
        "GraniteMoeHybrid",
        {
            **_HYBRID,
            "num_local_experts": 0,
            "position_embedding_type": "rope",
            "mamba_proj_bias": True,
            "mamba_conv_bias": False,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "granite-hybrid-all-attention": (
        "GraniteMoeHybrid",
        {
            **_HYBRID,
            "layer_types": ["full_attention"] * 4,
            "num_local_experts": 0,
            "shared_intermediate_size": 48,
            "position_embedding_type": "rope",
        },
    ),
    "granite-hybrid-roped": (
        "GraniteMoeHybrid",
        {
            **_HYBRID,
            "num_local_experts": 0,
            "shared_intermediate_size": 48,
            "position_embedding_type": "rope",
        },
    ),
    "granite": ("Granite", {**_SMALL, **_GRANITE, "attention_bias": True, "mlp_bias": True}),
    "granitemoe": ("GraniteMoe", {**_SMALL, **_GRANITE}),
    "granitemoeshared": (
        "GraniteMoeShared",
        {**_SMALL, **_GRANITE, "shared_intermediate_size": 40},
    ),
    "falcon-h1": ("FalconH1", {**_FALCON}),
    "falcon-h1-normed": (
        "FalconH1",
        {
            **_FALCON,
            "mamba_rms_norm": True,
            "mamba_norm_before_gate": False,
            "mamba_proj_bias": True,
            "projectors_bias": True,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "time_step_limit": [0.5, 1.5],
        },
    ),
    "falcon-h1-norm-first": (
        "FalconH1",
        {**_FALCON, "mamba_rms_norm": True, "mamba_norm_before_gate": True, "mamba_n_groups": 1},
    ),
    "nemotron-h": ("NemotronH", _NEMOTRON),
    "nemotron-h-narrow": (
        "NemotronH",
        {
            **_NEMOTRON,
            "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"],
            "time_step_min": 1e-12,
        },
    ),
    "nemotron-h-moe": (
        "NemotronH",
        {
            **_NEMOTRON,
            "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
            "n_group": 1,
            "time_step_min": 1e-12,
        },
    ),
    "nemotron-h-dense": (
        "NemotronH",
        {
            **_NEMOTRON,
            "layers_block_type": ["mlp", "linear_attention", "full_attention", "mlp"],
            "mlp_bias": True,
            "use_bias": True,
            "time_step_min": 0.6,
        },
    ),
}


def mamba_model(name: str, **changes: Any) -> Any:
    """A random model in float32."""
    torch.manual_seed(0)
    kind, own = MAMBAS[name]
    config = getattr(transformers, f"{kind}Config")(**copy.deepcopy({**own, **changes}))
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    model = varied(model)
    with torch.no_grad():
        for part, tensor in model.named_parameters():
            if part.endswith("A_log"):  # so that something is remembered
                tensor.copy_(math.log(0.2) + torch.rand_like(tensor))
            elif part.endswith("dt_bias"):
                tensor.copy_(torch.randn_like(tensor))
            elif part.endswith(("conv1d.weight", "out_proj.weight", "in_proj.weight")):
                tensor.copy_(0.3 * torch.randn_like(tensor))
    return model
