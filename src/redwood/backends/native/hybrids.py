"""Families with recurrent layers beside those of attention, as `families` describes others."""

from __future__ import annotations

from typing import Any

_GATED: dict[str, Any] = {"qk_norm": True, "attention_gate": True}
_SHARED = {f"shared_{r}": f"mlp.shared_expert.{r}_proj.weight" for r in ("gate", "up", "down")}
_DELTA = {
    "o_gate": "self_attn.q_proj.weight",
    "mix": "linear_attn.in_proj_qkv.weight",
    "out_gate": "linear_attn.in_proj_z.weight",
    "beta": "linear_attn.in_proj_b.weight",
    "alpha": "linear_attn.in_proj_a.weight",
    "conv": "linear_attn.conv1d.weight",
    "dt_bias": "linear_attn.dt_bias",
    "decay": "linear_attn.A_log",
    "state_norm": "linear_attn.norm.weight",
    "state_o": "linear_attn.out_proj.weight",
}
_DELTA_GGUF = {
    "o_gate": "attn_q.weight",
    "mix": "attn_qkv.weight",
    "out_gate": "attn_gate.weight",
    "beta": "ssm_beta.weight",
    "alpha": "ssm_alpha.weight",
    "conv": "ssm_conv1d.weight",
    "dt_bias": "ssm_dt.bias",
    "decay": "ssm_a",
    "state_norm": "ssm_norm.weight",
    "state_o": "ssm_out.weight",
    "ffn_norm": "post_attention_norm.weight",
}
_DELTA_ALL: dict[str, Any] = {
    "traits": _GATED,
    "recurrent": "delta",
    "partial": True,
    "centred": True,
    "ignored": ("mtp.",),
}
_QWEN3_NEXT: dict[str, Any] = {
    "mix": "linear_attn.in_proj_qkvz.weight",
    "out_gate": "linear_attn.in_proj_qkvz.weight",
    "beta": "linear_attn.in_proj_ba.weight",
    "alpha": "linear_attn.in_proj_ba.weight",
}


def hybrids(family: Any, experts: dict[str, str]) -> dict[str, Any]:
    """Returns the families by name.

    Args:
        family: `families.Family`.
        experts: names of the tensors of a mixture.
    """
    mixture = {**experts, **_SHARED, "shared_switch": "mlp.shared_expert_gate.weight"}
    return {
        "lfm2": family(
            *("lfm2", "Lfm2ForCausalLM", "lfm2", {"qk_norm": True}),
            recurrent="short_conv",
            activation="silu",
            eps="norm_eps",
            names={
                "output_norm": "model.embedding_norm.weight",
                "attn_norm": "operator_norm.weight",
                "ffn_norm": "ffn_norm.weight",
                "q_norm": "self_attn.q_layernorm.weight",
                "k_norm": "self_attn.k_layernorm.weight",
                "o": "self_attn.out_proj.weight",
                "gate": "feed_forward.w1.weight",
                "up": "feed_forward.w3.weight",
                "down": "feed_forward.w2.weight",
                "mix": "conv.in_proj.weight",
                "mix_bias": "conv.in_proj.bias",
                "conv": "conv.conv.weight",
                "conv_bias": "conv.conv.bias",
                "state_o": "conv.out_proj.weight",
                "state_o_bias": "conv.out_proj.bias",
            },
            gguf_names={
                "output_norm": "token_embd_norm.weight",
                "mix": "shortconv.in_proj.weight",
                "conv": "shortconv.conv.weight",
                "state_o": "shortconv.out_proj.weight",
            },
        ),
        "qwen3next": family(
            *("qwen3_next", "Qwen3NextForCausalLM", "qwen3next"),
            **_DELTA_ALL,
            experts="qwen",
            grouped=True,
            gguf_grouped=True,
            names={**_DELTA, **_QWEN3_NEXT, **mixture},
            gguf_names={**_DELTA_GGUF, "beta": "ssm_ba.weight", "alpha": "ssm_ba.weight"},
        ),
        "qwen35": family(
            *("qwen3_5_text", "Qwen3_5ForCausalLM", "qwen35"),
            **_DELTA_ALL,
            images=("qwen3_5", "Qwen3_5ForConditionalGeneration", ""),
            names=_DELTA,
            gguf_names=_DELTA_GGUF,
        ),
        "qwen35moe": family(
            *("qwen3_5_moe_text", "Qwen3_5MoeForCausalLM", "qwen35moe"),
            **_DELTA_ALL,
            images=("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration", ""),
            experts="qwen35",
            names={**_DELTA, **mixture},
            gguf_names=_DELTA_GGUF,
        ),
    }
