"""How configurations state Mamba-2 layers, and what goes with them."""

from __future__ import annotations

import math
from typing import Any

from redwood.backends.native.config_fields import Fields
from redwood.backends.native.rope import float32
from redwood.backends.native.spec import Multipliers, Recurrent
from redwood.errors import ModelError, UnsupportedError

GRANITE = ("granite", "granitemoe", "granitemoeshared", "granitemoehybrid")
"""Model types whose residual, embedding, attention and logits have multipliers."""
ENDLESS = 1 << 20
"""Positions of a model without any: what converters write."""

_BAMBA = {
    "heads": "mamba_n_heads",
    "key_heads": "mamba_n_groups",
    "key_dim": "mamba_d_state",
    "value_dim": "mamba_d_head",
    "width": "mamba_d_conv",
    "bias": "mamba_proj_bias",
    "output_bias": "mamba_proj_bias",
    "conv_bias": "mamba_conv_bias",
}
_BIASES = {"bias": "use_bias", "output_bias": "use_bias", "conv_bias": "use_conv_bias"}
_NAMES: dict[str, dict[str, str]] = {
    "granitemoehybrid": _BAMBA,
    "falcon_h1": {**_BAMBA, "output_bias": "projectors_bias"},
    "nemotron_h": {
        "heads": "mamba_num_heads",
        "key_heads": "n_groups",
        "key_dim": "ssm_state_size",
        "value_dim": "mamba_head_dim",
        "width": "conv_kernel",
        **_BIASES,
    },
    "mamba2": {
        "heads": "num_heads",
        "key_heads": "n_groups",
        "key_dim": "state_size",
        "value_dim": "head_dim",
        "width": "conv_kernel",
        **_BIASES,
    },
}
# What trained a model, chose its sizes, or says again what others say.
_SILENT = (
    *("chunk_size", "mamba_chunk_size", "expand", "mamba_expand", "mamba_d_ssm", "time_step_rank"),
    *("time_step_min", "time_step_max", "time_step_floor", "rescale_prenorm_residual"),
    *("residual_in_fp32", "use_mamba_kernels", "mamba_ssm_cache_dtype", "num_logits_to_keep"),
    *("mamba_proj_bias", "hidden_dropout", "mtp_layers_block_type", "attn_layer_indices"),
    *("moe_shared_expert_overlap", "layers_block_type"),
)


def mamba_of(fields: Fields) -> Recurrent | None:
    """Returns the Mamba-2 layers that a configuration states, or None.

    Raises: ModelError and UnsupportedError, naming the setting.
    """
    kind = str(fields.get("model_type"))
    names = _NAMES[kind]
    for name in _SILENT:
        fields.get(name)
    activation = "mamba_hidden_act" if kind == "nemotron_h" else "hidden_act"
    if fields.get(activation) not in ("silu", "swish"):
        raise UnsupportedError(
            f"{fields.where}: {activation} {str(fields.get(activation))[:80]!r} of recurrent "
            "layers is not supported, only silu"
        )
    counts = ("heads", "key_heads", "key_dim", "value_dim", "width")
    made: dict[str, Any] = {name: fields.count(names[name]) for name in counts}
    made |= {name: fields.flag(names[name]) for name in _BIASES}
    norm, layers = "last", tuple(half == "linear_attention" for half in _blocks(fields))
    if kind == "falcon_h1":
        layers = (True,) * len(layers)
        first = fields.flag("mamba_norm_before_gate")
        norm = ("first" if first else "last") if fields.flag("mamba_rms_norm") else ""
    if not any(layers):  # as Granite 4's dense models have it
        return None
    # Transformers holds the times of Nemotron-H above the least one of its training.
    stated = fields.get("time_step_limit")
    times = (fields.number("time_step_min"), math.inf) if kind == "nemotron_h" else stated
    numbers = isinstance(times, list | tuple) and all(type(t) in (int, float) for t in times)
    if not numbers or len(times) != 2:
        raise ModelError(f"{fields.where}: time_step_limit {str(times)[:80]} is no pair of limits")
    keys = 2 * made["key_heads"] * made["key_dim"]
    return Recurrent(
        kind="mamba",
        layers=layers,
        channels=made["heads"] * made["value_dim"] + keys,
        beside=kind == "falcon_h1",
        log_decay=True,
        norm=norm,
        times=(float32(times[0]), float32(times[1])),
        **made,
    )


def _blocks(fields: Fields) -> list[str]:
    known = {"linear_attention", "full_attention", "hybrid"}
    if fields.get("model_type") == "nemotron_h":
        known |= {"mlp", "moe"}
    return layer_types(fields, known)


def layer_types(fields: Fields, known: set[str]) -> list[str]:
    """Returns the type of each layer.

    Raises: ModelError where some have none, UnsupportedError for one that is not known.
    """
    layers, stated = fields.count("num_hidden_layers"), fields.get("layer_types")
    if not isinstance(stated, list) or len(stated) != layers:
        raise ModelError(f"{fields.where}: layer_types {str(stated)[:80]} does not fit {layers}")
    odd = set(map(str, stated)) - known
    if odd:
        raise UnsupportedError(
            f"{fields.where}: layers of type {', '.join(sorted(odd))} are not supported here"
        )
    return stated


def halves_of(fields: Fields) -> tuple[str, ...]:
    """Returns which layers are mixers alone and which are MLPs alone; empty: all are both."""
    kind = fields.get("model_type")
    if kind == "mamba2":
        return ("mixer",) * fields.count("num_hidden_layers")
    if kind != "nemotron_h":
        return ()
    return tuple("mlp" if block in ("mlp", "moe") else "mixer" for block in _blocks(fields))


def multipliers_of(fields: Fields) -> Multipliers:
    """Returns what multiplies parts of every layer.

    Raises: ModelError for numbers that are not positive, naming the setting.
    """
    kind = fields.get("model_type")
    if kind in GRANITE:
        by = float32(fields.number("residual_multiplier"))
        return Multipliers(attention=by, state=by, mlp=by)
    if kind != "falcon_h1":
        return Multipliers()
    gate, mlp = _several(fields, "mlp_multipliers", 2)
    read = fields.number("attention_in_multiplier")
    return Multipliers(
        attention=float32(read * fields.number("attention_out_multiplier")),
        attention_input=float32(read),
        state=float32(fields.number("ssm_out_multiplier")),
        state_input=float32(fields.number("ssm_in_multiplier")),
        state_parts=tuple(map(float32, _several(fields, "ssm_multipliers", 5))),  # type: ignore[arg-type]
        mlp=float32(mlp),
        mlp_gate=float32(gate),
    )


def _several(fields: Fields, name: str, count: int) -> list[float]:
    stated = fields.get(name)
    numbers = isinstance(stated, list | tuple) and all(type(by) in (int, float) for by in stated)
    if not numbers or len(stated) != count or not all(0 < by < math.inf for by in stated):
        raise ModelError(f"{fields.where}: {name} {str(stated)[:80]} must be {count} numbers")
    return [float(by) for by in stated]


def scales_of(fields: Fields, head_dim: int) -> dict[str, float]:
    """Returns the scales of embedding, attention and logits where a family states them."""
    kind = fields.get("model_type")
    if kind in GRANITE:
        return {
            "embedding_scale": float32(fields.number("embedding_multiplier")),
            "attention_scale": float32(fields.number("attention_multiplier")),
            "logit_scale": float32(1 / fields.number("logits_scaling")),
        }
    if kind != "falcon_h1":
        return {}
    read = fields.number("attention_in_multiplier")
    score = read * read * fields.number("key_multiplier") / math.sqrt(head_dim)
    return {
        "embedding_scale": float32(fields.number("embedding_multiplier")),
        "attention_scale": float32(score),
        "logit_scale": float32(fields.number("lm_head_multiplier")),
    }
