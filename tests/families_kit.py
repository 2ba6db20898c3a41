"""Tiny random models of the families beside those of `decoder_kit`, as folders and GGUF files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import deepseek_kit as deepseek
from decoder_kit import gguf_settings, permuted, stored, write_gguf

_SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_QWEN_MOE = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 48}
_KINDS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
_SLIDING: dict[str, Any] = {"sliding_window": 4, "num_hidden_layers": 4, "layer_types": _KINDS}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 32,
}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "n_routed_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
    "rms_norm_eps": 1e-2,  # which norms of latents do not have
}
_DEEPSEEK_YARN = {"truncate": True, "mscale": 0.707, "mscale_all_dim": 0.707}
_GROUPS = {"n_routed_experts": 8, "n_group": 4, "topk_group": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2moe": ("Qwen2Moe", {**_QWEN_MOE, "shared_expert_intermediate_size": 80}),
    "qwen3moe": ("Qwen3Moe", {**_QWEN_MOE, "head_dim": 16, "norm_topk_prob": True}),
    "mixtral": ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "olmoe": ("Olmoe", {"num_experts": 6, "num_experts_per_tok": 3}),
    "glm4moe": (
        "Glm4Moe",
        {
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 16,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 1.7,
            "head_dim": 16,
            "attention_bias": True,
        },
    ),
    "deepseek2": ("DeepseekV2", _LATENT),
    "deepseek2q": (
        "DeepseekV2",
        {**_LATENT, **_GROUPS, "q_lora_rank": 40, "topk_method": "group_limited_greedy"},
    ),
    "deepseek3": (
        "DeepseekV3",
        {
            **_LATENT,
            **_GROUPS,
            "q_lora_rank": 20,
            "rope_parameters": {**_YARN, **_DEEPSEEK_YARN},
        },
    ),
    "glm4moelite": ("Glm4MoeLite", {**_LATENT, "q_lora_rank": 20}),
    "gptoss": (
        "GptOss",
        {
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "sliding_window": 4,
            "rope_parameters": _YARN,
        },
    ),
    "internlm3": ("InternLM3", {"head_dim": 16, "attention_bias": True, "mlp_bias": True}),
    "smollm3": (
        "SmolLM3",
        {"num_hidden_layers": 5, "no_rope_layer_interval": 4, "tie_word_embeddings": True},
    ),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", _SLIDING),
    "cohere": ("Cohere", {"logit_scale": 0.3}),
    "cohere2": ("Cohere2", {**_SLIDING, "logit_scale": 0.3, "head_dim": 16}),
    "glm": ("Glm", {"head_dim": 16}),
    "glm4": ("Glm4", {"head_dim": 16}),
    "starcoder2": ("Starcoder2", {"sliding_window": 5}),
    "exaone4": ("Exaone4", {**_SLIDING, "head_dim": 16}),
}
SHARED = ("glm4moe", *deepseek.LATENT)
MIXTURES = ("qwen2moe", "qwen3moe", "mixtral", "olmoe", *SHARED, "gptoss")


def family_config(family: str, **changes: Any) -> Any:
    name, own = FAMILIES[family]
    fields = {**_SMALL, **own, **changes}
    return getattr(transformers, f"{name}Config")(**copy.deepcopy(fields))


def family_model(family: str, **changes: Any) -> Any:
    """A random model in float32."""
    torch.manual_seed(0)
    config = family_config(family, **changes)
    config._attn_implementation = "eager"
    name = "Llama" if family == "internlm3" else FAMILIES[family][0]
    return varied(getattr(transformers, f"{name}ForCausalLM")(config).eval())


def varied(model: Any) -> Any:
    """The model with norms, biases and routers that are not all ones, zeros or alike."""
    with torch.no_grad():
        tensors = [*model.named_parameters(), *model.named_buffers()]
        for name, tensor in tensors:
            if tensor.dim() == 1 and "inv_freq" not in name:
                tensor += 0.2 * torch.randn_like(tensor)
            elif "gate.weight" in name or "router.weight" in name:
                tensor.copy_(0.4 * torch.randn_like(tensor))
            elif "_proj_bias" in name or "experts." in name:
                tensor.copy_(0.2 * torch.randn_like(tensor))
    return model


_TEXT: dict[str, Any] = {
    **_SMALL,
    "head_dim": 16,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [4, 2, 2],
        "mrope_interleaved": True,
    },
}
_VISION: dict[str, Any] = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
_VISION |= {"out_hidden_size": 32, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
IMAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3vl": ("Qwen3VL", _TEXT),
    "qwen3vlmoe": ("Qwen3VLMoe", {**_TEXT, **_QWEN_MOE}),
}


def _gemma3() -> Any:
    text = {**_SMALL, "head_dim": 16, "sliding_window": 4, "num_hidden_layers": 6}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    vision |= {"num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=90
    )
    config._attn_implementation = "eager"
    return transformers.Gemma3ForConditionalGeneration(config).eval()


def image_model(name: str) -> Any:
    """A random model with images; what it says of text alone is what is computed here."""
    torch.manual_seed(0)
    if name == "gemma3":
        return varied(_gemma3())
    kind, text = IMAGES[name]
    config = getattr(transformers, f"{kind}Config")(
        text_config=copy.deepcopy(text),
        vision_config=_VISION,
        tie_word_embeddings=False,
        **{f"{part}_token_id": 90 + i for i, part in enumerate(("image", "video"))},
        **{f"vision_{part}_token_id": 92 + i for i, part in enumerate(("start", "end"))},
    )
    config._attn_implementation = "eager"
    return varied(getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval())


GGUF = {
    "qwen2moe": "qwen2moe",
    "qwen3moe": "qwen3moe",
    "mixtral": "llama",
    "olmoe": "olmoe",
    "gptoss": "gpt-oss",
    "smollm3": "smollm3",
    "olmo2": "olmo2",
    "olmo3": "olmo2",
    "cohere": "command-r",
    "cohere2": "cohere2",
    "glm4": "glm4",
    "starcoder2": "starcoder2",
    "exaone4": "exaone4",
    "glm4moe": "glm4moe",
    **dict.fromkeys(deepseek.LATENT, "deepseek2"),
}
"""general.architecture of the families that GGUF files are read of."""
_PAIRED = ("mixtral", "smollm3")  # families whose rows the converter puts in another order
_POST = {"post_attention_layernorm": "post_attention_norm"}
_RENAMED = {
    "olmo2": _POST,
    "olmo3": _POST,
    "exaone4": _POST,
    "gptoss": _POST,
    "glm4moe": {**_POST, **deepseek.NAMES},
    **dict.fromkeys(deepseek.LATENT, deepseek.NAMES),
    "glm4": {
        "post_self_attn_layernorm": "post_attention_norm",
        "post_mlp_layernorm": "post_ffw_norm",
    },
}
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.": "blk.",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.sinks": "attn_sinks.weight",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate.": "ffn_gate_inp.",
    "mlp.router.": "ffn_gate_inp.",
}


def family_tensors(family: str, model: Any) -> dict[str, np.ndarray[Any, Any]]:
    """The weights of a model under the names and in the order of GGUF files."""
    config, made = model.config, {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for part, count in heads.items():
            if family in _PAIRED and part in name:
                value = permuted(value, count)
        for theirs, ours in {**_NAMES, **_RENAMED.get(family, {})}.items():
            name = name.replace(theirs, ours)
        if ".experts." in name:
            prefix = name[: name.index("mlp")]
            made |= _experts(prefix, name.split("experts.")[1], value, family)
        elif name.endswith("ffn_gate_inp_shexp.weight"):
            made[name] = value[0].numpy().copy()
        else:
            made[name] = value.numpy().copy()
    return deepseek.apart(made, config) if family in deepseek.LATENT else made


def _experts(prefix: str, name: str, value: torch.Tensor, family: str) -> dict[str, Any]:
    """All experts of a layer: [experts, outputs, inputs], and their biases [experts, outputs]."""
    end = "bias" if name.endswith("bias") else "weight"
    if family == "gptoss" and end == "weight":
        value = value.transpose(1, 2)
    if name.startswith("down_proj"):
        return {f"{prefix}ffn_down_exps.{end}": value.contiguous().numpy().copy()}
    half = value.shape[1] // 2
    gate, up = (
        (value[:, ::2], value[:, 1::2])
        if family == "gptoss"
        else (value[:, :half], value[:, half:])
    )
    parts = {"gate": gate, "up": up}
    return {f"{prefix}ffn_{k}_exps.{end}": v.contiguous().numpy().copy() for k, v in parts.items()}


def family_settings(family: str, model: Any) -> dict[str, Any]:
    """The settings that llama.cpp's converter writes of a model."""
    config = model.config
    if not hasattr(config, "rms_norm_eps"):
        config = copy.copy(config)
        config.rms_norm_eps = getattr(config, "layer_norm_eps", None) or config.norm_epsilon
    settings = gguf_settings(_Of(config))
    if family in ("cohere", "cohere2", "starcoder2"):
        settings["attention.layer_norm_epsilon"] = settings.pop("attention.layer_norm_rms_epsilon")
    if family.startswith("cohere"):
        settings["logit_scale"] = config.logit_scale
    if family in ("olmo3", "cohere2", "exaone4", "gptoss"):
        settings["attention.sliding_window"] = config.sliding_window
    if family in ("olmo3", "exaone4", "cohere2"):
        kinds = [kind == "sliding_attention" for kind in config.layer_types]
        settings["attention.sliding_window_pattern"] = kinds
    if family == "glm4":
        settings["rope.dimension_count"] = settings["attention.key_length"] // 2
    if family == "gptoss":
        rope = config.rope_parameters
        settings["rope.scaling.type"] = "yarn"
        settings["rope.scaling.factor"] = rope["factor"]
        settings["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    if family in SHARED:
        return settings | deepseek.deepseek_settings(config)
    if family in MIXTURES:
        settings["expert_count"] = getattr(config, "num_experts", None) or config.num_local_experts
        settings["expert_used_count"] = config.num_experts_per_tok
    if family in ("qwen2moe", "qwen3moe"):
        settings["expert_feed_forward_length"] = config.moe_intermediate_size
    if family == "gptoss":
        settings["expert_feed_forward_length"] = config.intermediate_size
    if family == "qwen2moe":
        settings["expert_shared_feed_forward_length"] = config.shared_expert_intermediate_size
    return settings


class _Of:
    """What `gguf_settings` wants of a model."""

    def __init__(self, config: Any) -> None:
        self.config = config


def save_family(path: Path, family: str, model: Any, kind: str = "F32", **changes: Any) -> Path:
    """A model as a GGUF file, its matrices in a ggml type but for those of routers."""
    settings = {**family_settings(family, model), **changes}
    settings = {key: value for key, value in settings.items() if value is not None}
    tensors: dict[str, Any] = family_tensors(family, model)
    if kind != "F32":
        for name, x in tensors.items():
            if x.ndim > 1 and "_inp" not in name and not name.endswith("bias"):
                raw, held = stored(x.reshape(-1, x.shape[-1]), kind)
                tensors[name] = raw.reshape(*x.shape[:-1], -1), held
    return write_gguf(path, GGUF[family], settings, tensors)
