"""What the decoder wants to know of layers that lack a half, of multipliers and of Mamba-2."""

from __future__ import annotations

from redwood.backends.native.spec import DecoderSpec, Recurrent

_PARTS = ("state_gate", "state_value", "state_key", "state_query", "state_time")


def parts_of(spec: DecoderSpec) -> dict[str, object]:
    """Returns entries of the decoder's configuration, by their names there."""
    by, made = spec.multipliers, spec.recurrent or Recurrent("", (), 0, 0)
    return {
        "squared": spec.activation == "relu2",
        "attention": [spec.has_attention(layer) for layer in range(spec.layers)],
        "attention_out": by.attention,
        "state_out": by.state,
        "mlp_out": by.mlp,
        "mlp_gate": by.mlp_gate,
        "state_norm_first": made.norm == "first",
        "least_time": made.times[0],
        "most_time": made.times[1],
        "state_input": by.state_input,
        **dict(zip(_PARTS, by.state_parts, strict=True)),
    }
