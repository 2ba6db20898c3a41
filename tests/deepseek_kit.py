"""What GGUF files of DeepSeek's models and of those after them hold beside the others'."""

from __future__ import annotations

from typing import Any

import numpy as np

NAMES = {
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
    "ffn_gate_inp.e_score_correction_bias": "exp_probs_b.bias",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
}
LATENT = ("deepseek2", "deepseek2q", "deepseek3", "glm4moelite")


def deepseek_settings(config: Any) -> dict[str, Any]:
    """What llama.cpp's converter writes of a mixture with shared experts, and of latents."""
    sigmoid = config.model_type != "deepseek_v2"
    groups = (config.n_group or 1, config.topk_group or 1)
    kinds = getattr(config, "mlp_layer_types", None)
    dense = config.first_k_dense_replace if kinds is None else kinds.count("dense")
    settings: dict[str, Any] = {
        "leading_dense_block_count": dense,
        "expert_count": config.n_routed_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_count": config.n_shared_experts,
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_weights_norm": sigmoid,
        "expert_gating_func": 2 if sigmoid else 1,
        "expert_group_count": groups[0],
        "expert_group_used_count": groups[1],
    }
    rope = config.rope_parameters
    if config.model_type == "glm4_moe":
        share = rope["partial_rotary_factor"]
        return settings | {"rope.dimension_count": int(config.head_dim * share)}
    width, turning = config.kv_lora_rank, config.qk_rope_head_dim
    settings |= {
        "attention.kv_lora_rank": width,
        "attention.head_count_kv": 1,
        "attention.key_length": width + turning,
        "attention.value_length": width,
        "attention.key_length_mla": config.qk_nope_head_dim + turning,
        "attention.value_length_mla": config.v_head_dim,
        "rope.dimension_count": turning,
    }
    if config.q_lora_rank is not None:
        settings["attention.q_lora_rank"] = config.q_lora_rank
    if rope["rope_type"] == "yarn":
        settings |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": rope["factor"],
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
            "rope.scaling.yarn_beta_fast": rope["beta_fast"],
            "rope.scaling.yarn_beta_slow": rope["beta_slow"],
            "rope.scaling.yarn_log_multiplier": 0.1 * rope["mscale_all_dim"],
        }
    return settings


def whole(config: Any) -> dict[str, Any]:
    """What older files said in place of that, where keys and values stand in one tensor."""
    return {
        "attention.head_count_kv": config.num_attention_heads,
        "attention.key_length": config.qk_nope_head_dim + config.qk_rope_head_dim,
        "attention.value_length": config.v_head_dim,
        "attention.key_length_mla": None,
        "attention.value_length_mla": None,
    }


def apart(tensors: dict[str, Any], config: Any) -> dict[str, Any]:
    """The tensors with keys and values of latents apart, those of keys turned around."""
    made = {}
    for name, value in tensors.items():
        if "attn_kv_b" not in name:
            made[name] = value
            continue
        both = value.reshape(config.num_attention_heads, -1, config.kv_lora_rank)
        keys, values = np.split(both, [config.qk_nope_head_dim], axis=1)
        made[name.replace("kv_b", "k_b")] = np.ascontiguousarray(keys.transpose(0, 2, 1))
        made[name.replace("kv_b", "v_b")] = np.ascontiguousarray(values)
    return made
