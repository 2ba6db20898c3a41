"""The roles of weights: which a model has, their shapes, and the names that files give them."""

from __future__ import annotations

from typing import NamedTuple

from redwood.backends.native.families import FAMILIES, Family
from redwood.backends.native.spec import LANES, DecoderSpec

__all__ = ["GLOBAL_ROLES", "LANES", "LAYER_ROLES", "MATRICES", "Shape", "family_of"]
__all__ += ["folder_name", "gguf_name", "shapes"]

GLOBAL_ROLES = ("embed", "output_norm", "output_norm_bias", "output")
LAYER_ROLES = (
    *("attn_norm", "attn_norm_bias", "q", "kv_a", "kv_a_norm", "kv_b", "k", "v"),
    *("q_bias", "k_bias", "v_bias"),
    *("q_norm", "k_norm", "sinks", "o", "o_bias", "post_attn_norm", "ffn_norm", "ffn_norm_bias"),
    *("router", "router_bias", "choice_bias", "shared_switch"),
    *("gate", "up", "down", "gate_bias", "up_bias", "down_bias", "post_ffn_norm"),
    *("expert_gate", "expert_up", "expert_down"),
    *("expert_gate_bias", "expert_up_bias", "expert_down_bias"),
    *("o_gate", "mix", "mix_bias", "out_gate", "beta", "alpha"),
    *("conv", "conv_bias", "dt_bias", "decay", "state_norm", "state_o", "state_o_bias"),
    *("out_gate_bias", "alpha_bias", "skip"),
)
MATRICES = (
    *("q", "kv_a", "kv_b", "k", "v", "o", "gate", "up", "down", "embed", "output"),
    *("router", "shared_switch", "expert_gate", "expert_up", "expert_down"),
    *("o_gate", "mix", "out_gate", "beta", "alpha", "state_o"),
)
"""Roles that are matrices; the others are vectors in float32."""


class Shape(NamedTuple):
    """Rows and columns of a weight; 0 rows mark a vector. `experts`: of how many."""

    rows: int
    cols: int
    experts: int = 1


def shapes(spec: DecoderSpec, layer: int | None) -> dict[str, Shape]:
    """Returns the shape of every role of a layer, or of the model outside its layers."""
    return _global_shapes(spec) if layer is None else _layer_shapes(spec, layer)


def _global_shapes(spec: DecoderSpec) -> dict[str, Shape]:
    made = {"embed": Shape(spec.vocab_size, spec.hidden), "output_norm": Shape(0, spec.hidden)}
    if spec.norm_bias:
        made["output_norm_bias"] = Shape(0, spec.hidden)
    if not spec.tied:
        made["output"] = Shape(spec.vocab_size, spec.hidden)
    return made


def _layer_shapes(spec: DecoderSpec, layer: int) -> dict[str, Shape]:
    hidden = spec.hidden
    norm = Shape(0, hidden)
    made = _recurrent_shapes(spec) if spec.is_recurrent(layer) else {}
    if spec.has_attention(layer):
        made |= _attention_shapes(spec)
    before = [] if not made else ["attn_norm"]
    if not spec.parallel and (spec.width(layer) or spec.has_experts(layer)):
        before.append("ffn_norm")
    for role in before if spec.pre_norms else ():
        made[role] = norm
        if spec.norm_bias:
            made[f"{role}_bias"] = norm
    if spec.post_norms:
        made |= {"post_attn_norm": norm, "post_ffn_norm": norm}
    width, dense = spec.width(layer), not spec.has_experts(layer)
    if width:
        made |= {"up": Shape(width, hidden), "down": Shape(hidden, width)}
        if spec.gated:
            made["gate"] = Shape(width, hidden)
        if spec.mlp_bias and dense:
            made |= {"up_bias": Shape(0, width), "down_bias": norm}
            made |= {"gate_bias": Shape(0, width)} if spec.gated else {}
    return made if dense else made | _expert_shapes(spec)


def _attention_shapes(spec: DecoderSpec) -> dict[str, Shape]:
    q, kv, hidden = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim, spec.hidden
    made = {"q": Shape(q, hidden), "o": Shape(hidden, spec.heads * spec.values)}
    if spec.latent:
        turning = spec.ropes[0].rotary_dim
        made["kv_a"] = Shape(spec.latent + turning, hidden)
        made["kv_a_norm"] = Shape(0, spec.latent)
        made["kv_b"] = Shape(spec.heads * (spec.head_dim - turning + spec.values), spec.latent)
    else:
        made |= {"k": Shape(kv, hidden), "v": Shape(kv, hidden)}
    if spec.attention_gate:
        made["o_gate"] = Shape(q, hidden)
    if spec.attention_bias:
        made |= {"q_bias": Shape(0, q), "k_bias": Shape(0, kv), "v_bias": Shape(0, kv)}
    if spec.qk_norm:
        whole = spec.qk_norm_whole
        made["q_norm"] = Shape(0, q if whole else spec.head_dim)
        made["k_norm"] = Shape(0, kv if whole else spec.head_dim)
    if spec.sinks:
        made["sinks"] = Shape(0, spec.heads)
    if spec.output_bias:
        made["o_bias"] = Shape(0, hidden)
    return made


def _recurrent_shapes(spec: DecoderSpec) -> dict[str, Shape]:
    recurrent, hidden = spec.recurrent, spec.hidden
    assert recurrent is not None
    channels, heads = recurrent.channels, recurrent.heads
    made = {"conv": Shape(0, channels * recurrent.width)}
    if recurrent.kind == "short_conv":
        made |= {"mix": Shape(3 * channels, hidden), "state_o": Shape(hidden, channels)}
        return made | _recurrent_biases(spec)
    values = heads * recurrent.value_dim
    made |= {"mix": Shape(channels, hidden), "out_gate": Shape(values, hidden)}
    made |= {"alpha": Shape(heads, hidden), "state_o": Shape(hidden, values)}
    made |= {role: Shape(0, heads) for role in ("dt_bias", "decay")}
    if recurrent.kind == "delta":
        return made | {"beta": Shape(heads, hidden), "state_norm": Shape(0, recurrent.value_dim)}
    if recurrent.norm:
        made["state_norm"] = Shape(0, values)
    return made | {"skip": Shape(0, heads)} | _recurrent_biases(spec)


def _recurrent_biases(spec: DecoderSpec) -> dict[str, Shape]:
    recurrent = spec.recurrent
    assert recurrent is not None
    channels, made = recurrent.channels, dict[str, Shape]()
    if recurrent.bias and recurrent.kind == "mamba":
        made |= {"mix_bias": Shape(0, channels), "alpha_bias": Shape(0, recurrent.heads)}
        made["out_gate_bias"] = Shape(0, recurrent.heads * recurrent.value_dim)
    elif recurrent.bias:
        made["mix_bias"] = Shape(0, 3 * channels)
    if recurrent.conv_bias:
        made["conv_bias"] = Shape(0, channels)
    return made | ({"state_o_bias": Shape(0, spec.hidden)} if recurrent.output_bias else {})


def _expert_shapes(spec: DecoderSpec) -> dict[str, Shape]:
    experts, hidden = spec.experts, spec.hidden
    assert experts is not None
    count, ffn = experts.count, experts.ffn
    made = {
        "router": Shape(count, hidden),
        **({"expert_gate": Shape(ffn, hidden, count)} if spec.gated else {}),
        "expert_up": Shape(ffn, hidden, count),
        "expert_down": Shape(hidden, ffn, count),
    }
    if experts.choice_bias:
        made["choice_bias"] = Shape(0, count)
    if experts.shared_switch:
        made["shared_switch"] = Shape(1, hidden)
    if experts.biases:
        made |= {"router_bias": Shape(0, count), "expert_down_bias": Shape(0, hidden, count)}
        made |= {f"expert_{part}_bias": Shape(0, ffn, count) for part in ("gate", "up")}
    return made


_FOLDER = {
    "embed": "model.embed_tokens.weight",
    "output_norm": "model.norm.weight",
    "output_norm_bias": "model.norm.bias",
    "output": "lm_head.weight",
    "attn_norm": "input_layernorm.weight",
    "attn_norm_bias": "input_layernorm.bias",
    **{role: f"self_attn.{role}_proj.weight" for role in ("q", "k", "v", "o")},
    **{f"{role}_bias": f"self_attn.{role}_proj.bias" for role in ("q", "k", "v", "o")},
    **{role: f"self_attn.{role}.weight" for role in ("q_norm", "k_norm")},
    "kv_a": "self_attn.kv_a_proj_with_mqa.weight",
    "kv_a_norm": "self_attn.kv_a_layernorm.weight",
    "kv_b": "self_attn.kv_b_proj.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    "ffn_norm_bias": "post_attention_layernorm.bias",
    **{role: f"mlp.{role}_proj.weight" for role in ("gate", "up", "down")},
    **{f"{role}_bias": f"mlp.{role}_proj.bias" for role in ("gate", "up", "down")},
}
_GGUF = {
    "embed": "token_embd.weight",
    "output_norm": "output_norm.weight",
    "output_norm_bias": "output_norm.bias",
    "output": "output.weight",
    "attn_norm": "attn_norm.weight",
    "attn_norm_bias": "attn_norm.bias",
    **{role: f"attn_{role}.weight" for role in ("q", "k", "v", "q_norm", "k_norm")},
    **{f"{role}_bias": f"attn_{role}.bias" for role in ("q", "k", "v")},
    "o": "attn_output.weight",
    "o_bias": "attn_output.bias",
    "post_attn_norm": "post_attention_norm.weight",
    "ffn_norm": "ffn_norm.weight",
    "ffn_norm_bias": "ffn_norm.bias",
    **{role: f"ffn_{role}.weight" for role in ("gate", "up", "down")},
    **{f"{role}_bias": f"ffn_{role}.bias" for role in ("gate", "up", "down")},
    "post_ffn_norm": "post_ffw_norm.weight",
    "router": "ffn_gate_inp.weight",
    "router_bias": "ffn_gate_inp.bias",
    "choice_bias": "exp_probs_b.bias",
    "shared_switch": "ffn_gate_inp_shexp.weight",
    **{f"shared_{role}": f"ffn_{role}_shexp.weight" for role in ("gate", "up", "down")},
    **{f"expert_{role}": f"ffn_{role}_exps.weight" for role in ("gate", "up", "down")},
    **{f"expert_{role}_bias": f"ffn_{role}_exps.bias" for role in ("gate", "up", "down")},
}


def family_of(spec: DecoderSpec) -> Family:
    """Returns the description of a spec's family."""
    return FAMILIES[spec.architecture]


def _shared(spec: DecoderSpec, role: str, layer: int | None) -> str:
    mixture = layer is not None and spec.has_experts(layer)
    return f"shared_{role}" if mixture and role in ("gate", "up", "down") else role


def folder_name(spec: DecoderSpec, role: str, layer: int | None) -> str:
    """Returns the tensor of a role in a folder of safetensors; {} stands for an expert."""
    names = {**_FOLDER, **family_of(spec).names}
    prefix = "" if layer is None else f"model.layers.{layer}."
    return prefix + names[_shared(spec, role, layer)]


def gguf_name(spec: DecoderSpec, role: str, layer: int | None) -> str:
    """Returns the tensor of a role in a GGUF file."""
    names = {**_GGUF, **family_of(spec).gguf_names}
    prefix = "" if layer is None else f"blk.{layer}."
    return prefix + names[_shared(spec, role, layer)]
