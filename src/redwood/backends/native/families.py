"""What each family of models is, as a description that the readers of files and the decoder share.

A family says under which names files keep its weights and its settings, and which parts of
`DecoderSpec` hold for all of its models. Nothing here computes: a new family of known parts is a
new entry (`docs/models.md`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from redwood.backends.native.gemma_names import ALTUP, GEMMA4_EXPERTS, PER_LAYER
from redwood.backends.native.hybrids import hybrids
from redwood.backends.native.mambas import mambas

QKV, _GATE_UP = ("q", "k", "v"), ("gate", "up")


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        model_type, model_class: of config.json; none: folders are not read.
        gguf: general.architecture of GGUF files; none: they are not read.
        images: model_type and class of a model with images whose text part is of this family, and
            general.architecture of GGUF files of that part. Images are not read.
        traits: fields of `DecoderSpec` that all models of the family share.
        bias: setting that gives queries, keys and values a bias; "always": they have one.
        output_bias: the same setting gives one to the projection after attention.
        mlp_bias: setting that gives the MLP biases.
        windows: which layers see a window: "none", "all" (if one is set), or those that
            "layer_types" names.
        window_switch: setting without which there is no window.
        positionless: layers without rotary positions: "" (none), "all", "full_attention" (those
            beside windows), or the setting that lists 1 for layers with positions, or says "rope".
        eps: setting of the norms' epsilon.
        partial: a share of a head turns (partial_rotary_factor).
        experts: how settings state a mixture of experts; see `spec_experts`.
        recurrent: kind of the recurrent layers, if there are any; see `spec_recurrent`.
        activation: of the MLP, where no setting says it.
        centred: safetensors hold norms less 1, but for those of recurrent layers' states.
        grouped, gguf_grouped: recurrent layers stack by key head what files of other families hold
            apart, all of it or what decays and writes.
        ignored: how names of tensors begin that the text's logits do not need.
        neighbours: rotary positions turn neighbours, and files hold rows in that order.
        gguf_neighbours: so do GGUF files.
        names, gguf_names: where roles are kept under other names than Llama's.
        fused, gguf_fused: tensors that stack the rows of several roles.
        gguf_traits: what GGUF files add to the traits, or say by no setting.
    """

    model_type: str = ""
    model_class: str = ""
    gguf: str = ""
    traits: Mapping[str, Any] = field(default_factory=dict)
    bias: str = ""
    output_bias: bool = False
    mlp_bias: str = ""
    windows: str = "none"
    window_switch: str = ""
    positionless: str = ""
    eps: str = "rms_norm_eps"
    partial: bool = False
    experts: str = ""
    recurrent: str = ""
    activation: str = ""
    centred: bool = False
    grouped: bool = False
    gguf_grouped: bool = False
    ignored: tuple[str, ...] = ()
    neighbours: bool = False
    gguf_neighbours: bool = False
    images: tuple[str, str, str] = ("", "", "")
    names: Mapping[str, str] = field(default_factory=dict)
    gguf_names: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    gguf_fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    gguf_traits: Mapping[str, Any] = field(default_factory=dict)


_GEMMA_NAMES = {
    "post_attn_norm": "post_attention_layernorm.weight",
    "ffn_norm": "pre_feedforward_layernorm.weight",
    "post_ffn_norm": "post_feedforward_layernorm.weight",
}
_POST_ONLY = {
    "post_attn_norm": "post_attention_layernorm.weight",
    "post_ffn_norm": "post_feedforward_layernorm.weight",
}
_MOE = {
    "router": "mlp.gate.weight",
    "choice_bias": "mlp.gate.e_score_correction_bias",
    "expert_gate": "mlp.experts.{}.gate_proj.weight",
    "expert_up": "mlp.experts.{}.up_proj.weight",
    "expert_down": "mlp.experts.{}.down_proj.weight",
}
_SHARED = {f"shared_{r}": f"mlp.shared_experts.{r}_proj.weight" for r in ("gate", "up", "down")}
_GEMMA_TRAITS = {"post_norms": True, "qk_norm": True, "value_norm": True}
_GLM_NAMES = {
    "post_attn_norm": "post_self_attn_layernorm.weight",
    "post_ffn_norm": "post_mlp_layernorm.weight",
}
_FUSED_MLP = {"mlp.gate_up_proj.weight": _GATE_UP}
_COHERE: dict[str, Any] = {"layer_norm": True, "parallel": True}
_OLMO: dict[str, Any] = {
    "qk_norm": True,
    "qk_norm_whole": True,
    "pre_norms": False,
    "post_norms": True,
}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        *("llama", "LlamaForCausalLM", "llama"),
        bias="attention_bias",
        output_bias=True,
        mlp_bias="mlp_bias",
        gguf_neighbours=True,
    ),
    "mistral": Family("mistral", "MistralForCausalLM", windows="all"),
    "qwen2": Family(*("qwen2", "Qwen2ForCausalLM", "qwen2"), bias="always", windows="layer_types"),
    "qwen3": Family(
        *("qwen3", "Qwen3ForCausalLM", "qwen3", {"qk_norm": True}),
        images=("qwen3_vl", "Qwen3VLForConditionalGeneration", "qwen3vl"),
        bias="attention_bias",
        output_bias=True,
        windows="layer_types",
    ),
    "gemma2": Family(
        *("gemma2", "Gemma2ForCausalLM", "gemma2", {"post_norms": True}),
        bias="attention_bias",
        output_bias=True,
        windows="layer_types",
        names=_GEMMA_NAMES,
    ),
    "gemma3": Family(
        *("gemma3_text", "Gemma3ForCausalLM", "gemma3", {"post_norms": True, "qk_norm": True}),
        images=("gemma3", "Gemma3ForConditionalGeneration", ""),
        bias="attention_bias",
        output_bias=True,
        windows="layer_types",
        names=_GEMMA_NAMES,
    ),
    "gemma3n": Family(
        *("gemma3n_text", "Gemma3nForCausalLM", "gemma3n", _GEMMA_TRAITS),
        images=("gemma3n", "Gemma3nForConditionalGeneration", ""),
        bias="attention_bias",
        output_bias=True,
        windows="layer_types",
        names={**_GEMMA_NAMES, **PER_LAYER, **ALTUP},
    ),
    "gemma4": Family(
        *("gemma4_text", "Gemma4ForCausalLM", "gemma4", _GEMMA_TRAITS),
        images=("gemma4", "Gemma4ForConditionalGeneration", ""),
        bias="attention_bias",
        output_bias=True,
        windows="layer_types",
        experts="gemma4",
        names={**_GEMMA_NAMES, **PER_LAYER, **GEMMA4_EXPERTS, "layer_scale": "layer_scalar"},
        gguf_names={f"shared_{part}": f"ffn_{part}.weight" for part in ("gate", "up", "down")},
    ),
    "gemma4unified": Family(  # Gemma 4 12B; as GGUF files it is gemma4
        *("gemma4_unified_text", "Gemma4UnifiedForCausalLM", "", _GEMMA_TRAITS),
        images=("gemma4_unified", "Gemma4UnifiedForConditionalGeneration", ""),
        bias="attention_bias",
        output_bias=True,
        windows="layer_types",
        names={**_GEMMA_NAMES, "layer_scale": "layer_scalar"},
    ),
    "phi3": Family(
        *("phi3", "Phi3ForCausalLM", "phi3"),
        windows="all",
        partial=True,
        fused={"self_attn.qkv_proj.weight": QKV, **_FUSED_MLP},
        gguf_fused={"attn_qkv.weight": QKV, "ffn_up.weight": _GATE_UP},
    ),
    "qwen2moe": Family(
        *("qwen2_moe", "Qwen2MoeForCausalLM", "qwen2moe"),
        bias="qkv_bias",
        windows="layer_types",
        experts="qwen",
        names={
            **_MOE,
            **{f"shared_{r}": f"mlp.shared_expert.{r}_proj.weight" for r in ("gate", "up", "down")},
            "shared_switch": "mlp.shared_expert_gate.weight",
        },
    ),
    "qwen3moe": Family(
        *("qwen3_moe", "Qwen3MoeForCausalLM", "qwen3moe", {"qk_norm": True}),
        images=("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration", "qwen3vlmoe"),
        bias="attention_bias",
        output_bias=True,
        windows="all",
        experts="qwen",
        names=_MOE,
    ),
    "mixtral": Family(
        *("mixtral", "MixtralForCausalLM"),
        windows="all",
        experts="mixtral",
        gguf_neighbours=True,
        names={
            "router": "block_sparse_moe.gate.weight",
            "expert_gate": "block_sparse_moe.experts.{}.w1.weight",
            "expert_up": "block_sparse_moe.experts.{}.w3.weight",
            "expert_down": "block_sparse_moe.experts.{}.w2.weight",
        },
    ),
    "olmoe": Family(
        *("olmoe", "OlmoeForCausalLM", "olmoe", {"qk_norm": True, "qk_norm_whole": True}),
        bias="attention_bias",
        output_bias=True,
        experts="olmoe",
        names=_MOE,
    ),
    "glm4moe": Family(
        *("glm4_moe", "Glm4MoeForCausalLM", "glm4moe"),
        bias="attention_bias",
        partial=True,
        experts="deepseek",
        names={**_MOE, **_SHARED},
        gguf_names={"ffn_norm": "post_attention_norm.weight"},
    ),
    "deepseek2": Family(
        *("deepseek_v2", "DeepseekV2ForCausalLM", "deepseek2"),
        experts="deepseek2",
        neighbours=True,
        gguf_neighbours=True,
        names={**_MOE, **_SHARED},
    ),
    "deepseek3": Family(  # in GGUF files it is deepseek2
        *("deepseek_v3", "DeepseekV3ForCausalLM"),
        experts="deepseek",
        neighbours=True,
        names={**_MOE, **_SHARED},
    ),
    "glm4moelite": Family(  # the same there
        *("glm4_moe_lite", "Glm4MoeLiteForCausalLM"),
        experts="deepseek",
        neighbours=True,
        names={**_MOE, **_SHARED},
    ),
    "gptoss": Family(
        *("gpt_oss", "GptOssForCausalLM", "gpt-oss", {"sinks": True}),
        bias="attention_bias",
        output_bias=True,
        windows="layer_types",
        experts="gpt_oss",
        names={
            "sinks": "self_attn.sinks",
            "router": "mlp.router.weight",
            "router_bias": "mlp.router.bias",
            "expert_gate": "mlp.experts.gate_up_proj",
            "expert_up": "mlp.experts.gate_up_proj",
            "expert_down": "mlp.experts.down_proj",
            "expert_gate_bias": "mlp.experts.gate_up_proj_bias",
            "expert_up_bias": "mlp.experts.gate_up_proj_bias",
            "expert_down_bias": "mlp.experts.down_proj_bias",
        },
        gguf_names={"ffn_norm": "post_attention_norm.weight", "sinks": "attn_sinks.weight"},
        gguf_traits={"glu_limit": 7.0, "glu_alpha": 1.702},
    ),
    "internlm3": Family(
        *("internlm3", "InternLM3ForCausalLM"),
        bias="attention_bias",
        output_bias=True,
        mlp_bias="mlp_bias",
    ),
    "smollm3": Family(
        *("smollm3", "SmolLM3ForCausalLM", "smollm3"),
        bias="attention_bias",
        output_bias=True,
        mlp_bias="mlp_bias",
        windows="layer_types",
        window_switch="use_sliding_window",
        positionless="no_rope_layers",
        gguf_neighbours=True,
    ),
    "olmo2": Family(
        *("olmo2", "Olmo2ForCausalLM", "olmo2", _OLMO),
        bias="attention_bias",
        output_bias=True,
        names=_POST_ONLY,
    ),
    "olmo3": Family(
        *("olmo3", "Olmo3ForCausalLM", "", _OLMO),
        bias="attention_bias",
        output_bias=True,
        windows="layer_types",
        names=_POST_ONLY,
    ),
    "cohere": Family(
        *("cohere", "CohereForCausalLM", "command-r", _COHERE),
        bias="attention_bias",
        output_bias=True,
        eps="layer_norm_eps",
        neighbours=True,
        gguf_neighbours=True,
    ),
    "cohere2": Family(
        *("cohere2", "Cohere2ForCausalLM", "cohere2", _COHERE),
        bias="attention_bias",
        output_bias=True,
        windows="layer_types",
        positionless="full_attention",
        eps="layer_norm_eps",
        neighbours=True,
        gguf_neighbours=True,
    ),
    "glm": Family(
        *("glm", "GlmForCausalLM"),
        bias="attention_bias",
        partial=True,
        neighbours=True,
        fused=_FUSED_MLP,
    ),
    "glm4": Family(
        *("glm4", "Glm4ForCausalLM", "glm4", {"post_norms": True}),
        bias="attention_bias",
        partial=True,
        neighbours=True,
        gguf_neighbours=True,
        names=_GLM_NAMES,
        fused=_FUSED_MLP,
        gguf_fused={"ffn_up.weight": _GATE_UP},
    ),
    "starcoder2": Family(
        *("starcoder2", "Starcoder2ForCausalLM", "starcoder2"),
        traits={"layer_norm": True, "norm_bias": True, "gated": False},
        bias="use_bias",
        output_bias=True,
        mlp_bias="use_bias",
        windows="all",
        eps="norm_epsilon",
        names={
            "up": "mlp.c_fc.weight",
            "up_bias": "mlp.c_fc.bias",
            "down": "mlp.c_proj.weight",
            "down_bias": "mlp.c_proj.bias",
        },
    ),
    "exaone4": Family(
        *("exaone4", "Exaone4ForCausalLM", "exaone4"),
        traits={"qk_norm": True, "pre_norms": False, "post_norms": True},
        windows="layer_types",
        positionless="full_attention",
        names=_POST_ONLY,
    ),
}
FAMILIES |= {**hybrids(Family, _MOE), **mambas(Family)}
GEMMA = ("gemma2", "gemma3", "gemma3n", "gemma4", "gemma4unified")
NORMS_LESS_ONE = ("gemma2", "gemma3")
"""Families whose folders keep norms less 1."""
LATENT = ("deepseek2", "deepseek3", "glm4moelite")
"""Families of latent attention."""


def by_model_type(model_type: object) -> str | None:
    """Returns the family of a config.json's model_type, or None."""
    for name, family in FAMILIES.items():
        if model_type in (family.model_type, family.images[0]):
            return name if model_type else None
    return None


def by_gguf(architecture: object) -> str | None:
    """Returns the family of a general.architecture, or None; llama's without experts."""
    for name, family in FAMILIES.items():
        if architecture in (family.gguf, family.images[2]):
            return name if architecture else None
    return None


def model_types() -> list[str]:
    """Returns every model_type that is read."""
    named = [(family.model_type, family.images[0]) for family in FAMILIES.values()]
    return [kind for kinds in named for kind in kinds if kind]


def gguf_architectures() -> list[str]:
    """Returns every general.architecture that is read; Mistral and Mixtral are llama there."""
    named = [(family.gguf, family.images[2]) for family in FAMILIES.values()]
    return [kind for kinds in named for kind in kinds if kind]
