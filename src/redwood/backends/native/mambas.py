"""Families with Mamba-2 layers, and Granite's others, as `families` describes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_PARTS = ("out_gate", "mix", "alpha")


def _fused(stem: str) -> dict[str, tuple[str, ...]]:
    biases = tuple(f"{part}_bias" for part in _PARTS)
    return {f"{stem}.in_proj.weight": _PARTS, f"{stem}.in_proj.bias": biases}


def _names(stem: str) -> dict[str, str]:
    return {
        "conv": f"{stem}.conv1d.weight",
        "conv_bias": f"{stem}.conv1d.bias",
        "dt_bias": f"{stem}.dt_bias",
        "decay": f"{stem}.A_log",
        "skip": f"{stem}.D",
        "state_norm": f"{stem}.norm.weight",
        "state_o": f"{stem}.out_proj.weight",
        "state_o_bias": f"{stem}.out_proj.bias",
    }


_OUTSIDE = {"embed": "model.embeddings.weight", "output_norm": "model.norm_f.weight"}
_NORM = {"attn_norm": "norm.weight", "ffn_norm": "norm.weight"}
_GRANITE_MLP = {
    "down": "shared_mlp.output_linear.weight",
    "shared_down": "shared_mlp.output_linear.weight",
    "router": "block_sparse_moe.router.layer.weight",
    "expert_gate": "block_sparse_moe.input_linear.weight",
    "expert_up": "block_sparse_moe.input_linear.weight",
    "expert_down": "block_sparse_moe.output_linear.weight",
}
_SHARED_MLP = {"shared_mlp.input_linear.weight": ("gate", "up")}
_GGUF: dict[str, Any] = {
    "gguf_names": {
        "conv": "ssm_conv1d.weight",
        "conv_bias": "ssm_conv1d.bias",
        "dt_bias": "ssm_dt.bias",
        "decay": "ssm_a",
        "skip": "ssm_d",
        "state_norm": "ssm_norm.weight",
        "state_o": "ssm_out.weight",
    },
    "gguf_fused": {"ssm_in.weight": _PARTS},
}
_NEMOTRON: dict[str, Any] = {
    **_GGUF,
    "traits": {"gated": False},
    "gguf_names": {**_GGUF["gguf_names"], "ffn_norm": "attn_norm.weight"},
    "recurrent": "mamba",
    "experts": "nemotron",
}
_BIASED: dict[str, Any] = {"bias": "attention_bias", "output_bias": True}


def mambas(family: Any) -> Mapping[str, Any]:
    """Returns the families by name.

    Args:
        family: `families.Family`.
    """
    mixer = {role: f"mixer.{role}_proj.weight" for role in ("q", "k", "v", "o", "up", "down")}
    biases = {f"{role}_bias": f"mixer.{role}_proj.bias" for role in ("up", "down")}
    shared = {
        f"shared_{role}": f"mixer.shared_experts.{role}_proj.weight" for role in ("up", "down")
    }
    return {
        "mamba2": family(
            *("mamba2", "Mamba2ForCausalLM", "mamba2"),
            **_GGUF,
            recurrent="mamba",
            eps="layer_norm_epsilon",
            positionless="all",
            names={**_names("mixer"), **_OUTSIDE, **_NORM},
            fused=_fused("mixer"),
        ),
        "granitehybrid": family(
            *("granitemoehybrid", "GraniteMoeHybridForCausalLM", "granitehybrid"),
            **_BIASED,
            **_GGUF,
            gguf_neighbours=True,
            recurrent="mamba",
            experts="granite",
            positionless="position_embedding_type",
            names={**_names("mamba"), **_GRANITE_MLP},
            fused={**_fused("mamba"), **_SHARED_MLP},
        ),
        "granite": family(
            *("granite", "GraniteForCausalLM", "granite"),
            **_BIASED,
            mlp_bias="mlp_bias",
            gguf_neighbours=True,
        ),
        "granitemoe": family(
            *("granitemoe", "GraniteMoeForCausalLM", "granitemoe"),
            **_BIASED,
            gguf_neighbours=True,
            experts="granite",
            names=_GRANITE_MLP,
        ),
        "granitemoeshared": family(
            *("granitemoeshared", "GraniteMoeSharedForCausalLM"),
            **_BIASED,
            experts="granite",
            names=_GRANITE_MLP,
            fused=_SHARED_MLP,
        ),
        "falconh1": family(
            *("falcon_h1", "FalconH1ForCausalLM", "falcon-h1"),
            **_BIASED,
            **_GGUF,
            mlp_bias="mlp_bias",
            recurrent="mamba",
            names={
                **_names("mamba"),
                "output_norm": "model.final_layernorm.weight",
                "ffn_norm": "pre_ff_layernorm.weight",
                **{role: f"feed_forward.{role}_proj.weight" for role in ("gate", "up", "down")},
                **{
                    f"{role}_bias": f"feed_forward.{role}_proj.bias"
                    for role in ("gate", "up", "down")
                },
            },
            fused=_fused("mamba"),
        ),
        "nemotronh": family(
            *("nemotron_h", "NemotronHForCausalLM", "nemotron_h"),
            **_NEMOTRON,
            mlp_bias="mlp_bias",
            eps="layer_norm_epsilon",
            positionless="all",
            ignored=("mtp.",),
            names={
                **_names("mixer"),
                **_OUTSIDE,
                **_NORM,
                **mixer,
                **biases,
                **shared,
                "router": "mixer.gate.weight",
                "choice_bias": "mixer.gate.e_score_correction_bias",
                "expert_up": "mixer.experts.{}.up_proj.weight",
                "expert_down": "mixer.experts.{}.down_proj.weight",
            },
            fused=_fused("mixer"),
        ),
        "nemotronhmoe": family(gguf="nemotron_h_moe", **_NEMOTRON),
    }
