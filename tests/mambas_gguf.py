"""The models of `mambas_kit` as GGUF files, as llama.cpp's converter writes them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from decoder_kit import permuted, stored, write_gguf

GGUF = {
    "mamba2": "mamba2",
    "granite-hybrid": "granitehybrid",
    "granite-hybrid-roped": "granitehybrid",
    "granite-hybrid-all-attention": "granite",
    "granite": "granite",
    "granitemoe": "granitemoe",
    "granitemoeshared": "granitemoe",
    "falcon-h1": "falcon-h1",
    "nemotron-h-narrow": "nemotron_h",
    "nemotron-h-moe": "nemotron_h_moe",
}
"""general.architecture of the models that GGUF files are read of."""
_NAMES = [
    ("model.embed_tokens", "token_embd"),
    ("(backbone|model).embeddings", "token_embd"),
    ("(backbone|model).norm_f", "output_norm"),
    ("model.(final_layer)?norm", "output_norm"),
    ("lm_head", "output"),
    ("(backbone|model).layers.", "blk."),
    (r"(\d)\.norm\.", r"\1.attn_norm."),
    ("input_layernorm", "attn_norm"),
    ("(post_attention_layernorm|pre_ff_layernorm)", "ffn_norm"),
    *((rf"(self_attn|mixer).{part}_proj", f"attn_{part}") for part in "qkv"),
    ("(self_attn|mixer).o_proj", "attn_output"),
    *((rf"(mlp|feed_forward|mixer).{part}_proj", f"ffn_{part}") for part in ("gate", "up", "down")),
    ("(mamba|mixer).in_proj", "ssm_in"),
    ("(mamba|mixer).out_proj", "ssm_out"),
    ("(mamba|mixer).conv1d", "ssm_conv1d"),
    ("(mamba|mixer).dt_bias", "ssm_dt.bias"),
    ("(mamba|mixer).A_log", "ssm_a"),
    ("(mamba|mixer).D$", "ssm_d"),
    ("(mamba|mixer).norm", "ssm_norm"),
    ("mixer.gate.weight", "ffn_gate_inp.weight"),
    ("mixer.gate.e_score_correction_bias", "exp_probs_b.bias"),
    ("mixer.experts.(up|down)_proj", r"ffn_\1_exps.weight"),
    (r"mixer.shared_experts.(up|down)_proj", r"ffn_\1_shexp"),
    ("block_sparse_moe.router.weight", "ffn_gate_inp.weight"),
    ("block_sparse_moe.experts.down_proj", "ffn_down_exps.weight"),
]


def _falcon(name: str, value: torch.Tensor, config: Any) -> torch.Tensor:
    """Falcon-H1's multipliers, which its files hold in the weights."""
    read = config.attention_in_multiplier
    by = {
        "down_proj": config.mlp_multipliers[1],
        "gate_proj": config.mlp_multipliers[0],
        "k_proj": config.key_multiplier * read,
        "q_proj": read,
        "v_proj": read,
        "o_proj": config.attention_out_multiplier,
        "out_proj": config.ssm_out_multiplier,
        "lm_head": config.lm_head_multiplier,
        "embed_tokens": config.embedding_multiplier,
    }
    for part, times in by.items():
        if f"{part}." in name and not (part == "o_proj" and "out_proj" in name):
            return value * times
    if "in_proj" in name:
        inner, keys = config.mamba_d_ssm, config.mamba_n_groups * config.mamba_d_state
        sizes = torch.tensor([inner, inner, keys, keys, config.mamba_n_heads])
        parts = torch.tensor(config.ssm_multipliers) * config.ssm_in_multiplier
        return value * parts.repeat_interleave(sizes)[:, None]
    return value


def _converted(name: str, value: torch.Tensor, config: Any, groups: int) -> dict[str, torch.Tensor]:
    kind = config.model_type
    if kind == "falcon_h1":
        value = _falcon(name, value, config)
    if "conv1d.weight" in name:
        value = value.squeeze(1)
    elif name.endswith("A_log"):
        value = -torch.exp(value)[:, None]
    elif name.endswith(".D"):
        value = value[:, None]
    elif name.endswith(("mamba.norm.weight", "mixer.norm.weight")):
        value = value.reshape(groups, -1)
    elif kind.startswith("granite") and re.search("self_attn.[qk]_proj", name):
        heads = config.num_attention_heads if ".q_proj" in name else config.num_key_value_heads
        value = permuted(value, heads)
    for theirs, ours in (("experts.gate_up_proj", "_exps"), ("input_linear.weight", "{}")):
        if not name.endswith(theirs):
            continue
        gate, up = value.chunk(2, -2)
        end = ours.format("_shexp" if getattr(config, "num_local_experts", 0) else "")
        stem = name[: name.index("block_sparse" if "block_sparse" in name else "shared_mlp")]
        return {f"{stem}ffn_gate{end}.weight": gate, f"{stem}ffn_up{end}.weight": up}
    if name.endswith("shared_mlp.output_linear.weight"):
        end = "_shexp" if config.num_local_experts else ""
        return {name.replace("shared_mlp.output_linear", f"ffn_down{end}"): value}
    return {name: value}


def mamba_tensors(model: Any) -> dict[str, np.ndarray[Any, Any]]:
    """The weights of a model under the names and in the order of GGUF files."""
    made, config = {}, model.config
    groups = getattr(config, "n_groups", None) or getattr(config, "mamba_n_groups", 1)
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for part, numbers in _converted(name, value, config, groups).items():
            for theirs, ours in _NAMES:
                part = re.sub(theirs, ours, part)
            made[part] = numbers.contiguous().numpy().copy()
    return made


def mamba_settings(model: Any) -> dict[str, Any]:
    """The settings that llama.cpp's converter writes of a model."""
    config, kind = model.config, model.config.model_type
    made: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": 2048,
        "embedding_length": config.hidden_size,
        "vocab_size": config.vocab_size,
        "attention.layer_norm_rms_epsilon": getattr(config, "rms_norm_eps", None)
        or config.layer_norm_epsilon,
    }
    if kind == "mamba2":
        heads, width = config.num_heads, config.head_dim
        made |= {"feed_forward_length": 0, "attention.head_count": 0}
    else:
        heads = getattr(config, "mamba_n_heads", 0) or getattr(config, "mamba_num_heads", 0)
        width = getattr(config, "mamba_d_head", 0) or getattr(config, "mamba_head_dim", 0)
        made |= {
            "feed_forward_length": config.intermediate_size,
            "attention.head_count": config.num_attention_heads,
            "attention.head_count_kv": config.num_key_value_heads,
        }
    if heads:
        state = ("state_size", "ssm_state_size", "mamba_d_state")
        made |= {
            "ssm.conv_kernel": getattr(config, "conv_kernel", 0) or config.mamba_d_conv,
            "ssm.state_size": next(getattr(config, s) for s in state if hasattr(config, s)),
            "ssm.group_count": getattr(config, "n_groups", 0) or config.mamba_n_groups,
            "ssm.inner_size": heads * width,
            "ssm.time_step_rank": heads,
        }
    if kind.startswith("granite"):
        made |= {
            "attention.scale": config.attention_multiplier,
            "embedding_scale": config.embedding_multiplier,
            "residual_scale": config.residual_multiplier,
            "logit_scale": config.logits_scaling,
        }
        if hasattr(config, "num_local_experts"):
            made["expert_count"] = config.num_local_experts
            made["expert_used_count"] = config.num_experts_per_tok
        if hasattr(config, "shared_intermediate_size"):
            made["expert_shared_feed_forward_length"] = config.shared_intermediate_size
    if kind == "granitemoehybrid":
        full = [block == "full_attention" for block in config.layer_types]
        made["attention.head_count_kv"] = [config.num_key_value_heads * each for each in full]
        made["rope.scaling.finetuned"] = config.position_embedding_type == "rope"
    if kind == "nemotron_h":
        blocks = config.layers_block_type
        made["attention.head_count_kv"] = [
            config.num_key_value_heads * (block == "full_attention") for block in blocks
        ]
        made["feed_forward_length"] = [config.intermediate_size * (b == "mlp") for b in blocks]
    if kind == "nemotron_h" and "moe" in blocks:
        width = config.moe_intermediate_size
        made |= {
            "feed_forward_length": [width * (block == "moe") for block in blocks],
            "expert_count": config.n_routed_experts,
            "expert_used_count": config.num_experts_per_tok,
            "expert_feed_forward_length": width,
            "expert_shared_feed_forward_length": config.moe_shared_expert_intermediate_size,
            "expert_shared_count": config.n_shared_experts,
            "expert_weights_norm": config.norm_topk_prob,
            "expert_weights_scale": config.routed_scaling_factor,
            "expert_group_count": config.n_group,
        }
    if kind in ("falcon_h1", "nemotron_h"):
        made |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    if getattr(config, "rope_parameters", None) and kind != "nemotron_h":
        made["rope.freq_base"] = float(config.rope_parameters["rope_theta"])
    return made


def save_mamba(path: Path, name: str, model: Any, kind: str = "F32", **changes: Any) -> Path:
    """A model as a GGUF file, its matrices in a ggml type; a setting of None is left out."""
    settings = {**mamba_settings(model), **changes}
    settings = {key: value for key, value in settings.items() if value is not None}
    tensors: dict[str, Any] = mamba_tensors(model)
    for each, x in tensors.items() if kind != "F32" else ():
        if x.ndim > 1 and "_inp" not in each and not re.search(r"ssm_(a|d|norm|conv1d)", each):
            raw, held = stored(x.reshape(-1, x.shape[-1]), kind)
            tensors[each] = raw.reshape(*x.shape[:-1], -1), held
    return write_gguf(path, GGUF[name], settings, tensors)
