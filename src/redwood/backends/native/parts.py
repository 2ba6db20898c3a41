"""What the decoder wants to know of layers: heads, experts, halves, multipliers and states."""

from __future__ import annotations

import math

from redwood.backends.native.spec import DecoderSpec

_MOST_DISTANCE = 1 << 31  # tokens; more than any row has
_PARTS = ("state_gate", "state_value", "state_key", "state_query", "state_time")


def parts_of(spec: DecoderSpec) -> dict[str, object]:
    """Returns entries of the decoder's configuration, by their names there."""
    by = spec.multipliers
    return {
        "squared": spec.activation == "relu2",
        "attention": [spec.has_attention(layer) for layer in range(spec.layers)],
        "attention_out": by.attention,
        "state_out": by.state,
        "mlp_out": by.mlp,
        "mlp_gate": by.mlp_gate,
    }


def recurrent_of(spec: DecoderSpec, checkpoint_tokens: int) -> dict[str, object]:
    """Returns entries for recurrent layers; `checkpoint_tokens`: see `NativeBackend`."""
    by, made = spec.multipliers, spec.recurrent
    if made is None:
        return {"recurrent": [""] * spec.layers, "log_decay": False}
    return {
        "recurrent": [made.kind if recurrent else "" for recurrent in made.layers],
        "log_decay": made.log_decay,
        "conv_width": made.width,
        "conv_channels": made.channels,
        "state_heads": made.heads,
        "state_key_heads": made.key_heads,
        "state_key_dim": made.key_dim,
        "state_value_dim": made.value_dim,
        "state_tiled": made.tiled,
        "state_norm_first": made.norm == "first",
        "least_time": made.times[0],
        "most_time": made.times[1],
        "state_input": by.state_input,
        **dict(zip(_PARTS, by.state_parts, strict=True)),
        "checkpoint_tokens": min(checkpoint_tokens, _MOST_DISTANCE),
    }


def layers_of(spec: DecoderSpec) -> dict[str, object]:
    """Returns entries of what layers have each for themselves, and their streams of residuals."""
    heads, streams = [spec.heads_of(layer) for layer in range(spec.layers)], spec.streams
    return {
        "kv_heads": [kv_heads for kv_heads, _, _ in heads],
        "head_dims": [head_dim for _, head_dim, _ in heads],
        "value_dims": [value_dim for _, _, value_dim in heads],
        "sources": [spec.source(layer) for layer in range(spec.layers)],
        "values_are_keys": any(spec.keys_as_values),
        "cutoffs": list(spec.cutoffs) or [-math.inf] * spec.layers,
        "streams": streams.count if streams else 0,
        "active_stream": streams.active if streams else 0,
        "laurel_rank": streams.rank if streams else 0,
    }


def experts_of(spec: DecoderSpec) -> dict[str, object]:
    """Returns entries of a mixture of experts."""
    experts = spec.experts
    if experts is None:
        return {"experts": 0}
    return {
        "experts": experts.count,
        "experts_used": experts.used,
        "expert_ffn": experts.ffn,
        "expert_sigmoid": experts.scoring == "sigmoid",
        "expert_normalise": experts.normalise,
        "expert_scale": experts.scale,
        "expert_groups": experts.groups,
        "expert_groups_used": experts.groups_used,
        "expert_two_best": experts.two_best,
    }
