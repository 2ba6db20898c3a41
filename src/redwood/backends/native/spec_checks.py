"""Whether what a spec says fits together: models come from files that anyone may have written."""

from __future__ import annotations

import math
from pathlib import Path

from redwood.backends.native.rope import MOST_HEAD_DIM
from redwood.backends.native.spec import DecoderSpec, Experts, Recurrent
from redwood.errors import ModelError, check_count

MOST_EXPERTS = 1024
MOST_STREAMS = 8
MOST_WIDTH = 16
"""Tokens that a short convolution sees."""
MOST_STATE = 4096
"""Heads of a recurrent layer, and components of their keys and values."""


def check_capacity(capacity: int | None) -> None:
    """Raises ArgumentError unless `capacity` is None or at least 1."""
    if capacity is not None:
        check_count("capacity", capacity)


def check_spec(spec: DecoderSpec, where: Path) -> DecoderSpec:
    """Returns the spec if its fields fit together.

    Raises: ModelError if they do not; the message names `where`.
    """
    counts = ["vocab_size", "hidden", "layers", "heads", "kv_heads", "head_dim", "ffn", "context"]
    if set(spec.halves) == {"mixer"}:
        counts.remove("ffn")
    for name in counts:
        if getattr(spec, name) < 1:
            raise ModelError(f"{where}: {name} {getattr(spec, name)} must be at least 1")
    for kv_heads in {spec.kv_heads, *spec.kv_heads_of}:
        if kv_heads < 1 or spec.heads % kv_heads:
            raise ModelError(
                f"{where}: {spec.heads} heads do not share {kv_heads} key-value heads evenly"
            )
    floats = {"norm_eps": spec.norm_eps, "attention_scale": spec.attention_scale}
    floats |= {"embedding_scale": spec.embedding_scale, "logit_scale": spec.logit_scale}
    floats |= {"glu_alpha": spec.glu_alpha}
    factors = [rope.attention_factor for rope in spec.ropes]
    floats |= {"attention_factor": min(factors, default=1.0)} | _multipliers(spec)
    for name, value in floats.items():
        if not (0 < value < math.inf or (name == "norm_eps" and value == 0)):
            raise ModelError(f"{where}: {name} {value} must be positive and finite")
    for cap in (spec.attention_softcap, spec.logit_softcap, spec.glu_limit):
        if not 0 <= cap < math.inf:
            raise ModelError(f"{where}: a soft cap of {cap} must be positive and finite")
    if not len(spec.windows) == len(spec.rope_of_layer) == spec.layers or min(spec.windows) < 0:
        raise ModelError(f"{where}: the windows {spec.windows} do not fit {spec.layers} layers")
    if spec.experts is not None:
        _check_experts(spec.experts, spec.layers, where)
    if spec.recurrent is not None:
        _check_recurrent(spec.recurrent, spec.layers, where)
    _check_layers(spec, where)
    for index, rope in enumerate(spec.ropes):
        heads = [spec.heads_of(layer)[1] for layer in range(spec.layers)]
        turned = [dim for dim, of in zip(heads, spec.rope_of_layer, strict=True) if of == index]
        smallest = min(turned, default=MOST_HEAD_DIM)
        if not 2 <= rope.rotary_dim <= smallest:
            raise ModelError(
                f"{where}: rotary positions of {rope.rotary_dim} components do not fit a head of "
                f"{smallest}"
            )
        if not all(0 <= freq < math.inf for freq in rope.inv_freq):
            raise ModelError(f"{where}: the rotary frequencies are not all finite and positive")
    return spec


def _check_layers(spec: DecoderSpec, where: Path) -> None:
    """Raises ModelError if what is said layer by layer does not fit together."""
    for name in ("kv_heads_of", "head_dims", "ffns", "sources", "keys_as_values", "cutoffs"):
        values = getattr(spec, name)
        if values and len(values) != spec.layers:
            raise ModelError(f"{where}: {name} {str(values)[:80]} do not fit {spec.layers} layers")
    if any(not 1 <= dim <= MOST_HEAD_DIM for dim in spec.head_dims):
        raise ModelError(f"{where}: heads of {str(spec.head_dims)[:80]} components")
    if any(width < 1 for width in spec.ffns) or any(math.isnan(cut) for cut in spec.cutoffs):
        raise ModelError(f"{where}: MLPs of widths {str(spec.ffns)[:80]}, {str(spec.cutoffs)[:80]}")
    for layer, source in enumerate(spec.sources):
        fits = 0 <= source <= layer and spec.sources[source] == source
        if not fits or spec.heads_of(source) != spec.heads_of(layer):
            raise ModelError(
                f"{where}: layer {layer} cannot read keys and values of layer {source}"
            )
    streams = spec.streams
    if streams is not None and not (
        2 <= streams.count <= MOST_STREAMS and 0 <= streams.active < streams.count and spec.ple
    ):
        raise ModelError(
            f"{where}: {streams} with per-layer embeddings of {spec.ple} make no sense"
        )


def _multipliers(spec: DecoderSpec) -> dict[str, float]:
    held = dict(vars(spec.multipliers))
    parts = held.pop("state_parts")
    held |= {f"state_parts {part}": by for part, by in enumerate(parts)}
    return {f"the multiplier {name}": by for name, by in held.items()}


def _check_recurrent(recurrent: Recurrent, layers: int, where: Path) -> None:
    if len(recurrent.layers) != layers or not any(recurrent.layers):
        raise ModelError(f"{where}: the recurrent layers do not fit {layers} layers")
    if not 1 < recurrent.width <= MOST_WIDTH:
        raise ModelError(
            f"{where}: a convolution over {recurrent.width} tokens; 2 to {MOST_WIDTH} are supported"
        )
    if recurrent.kind == "short_conv":
        return
    for name in ("heads", "key_heads", "key_dim", "value_dim"):
        if not 1 <= getattr(recurrent, name) <= MOST_STATE:
            raise ModelError(
                f"{where}: recurrent layers: {name} {getattr(recurrent, name)} must be in "
                f"1..{MOST_STATE}"
            )
    if recurrent.heads % recurrent.key_heads:
        raise ModelError(
            f"{where}: recurrent layers: {recurrent.heads} heads do not share "
            f"{recurrent.key_heads} key heads evenly"
        )
    if not (0 <= recurrent.times[0] <= recurrent.times[1] and recurrent.times[0] < math.inf):
        raise ModelError(f"{where}: recurrent layers: no time is within {recurrent.times}")
    keys = 2 * recurrent.key_heads * recurrent.key_dim
    if recurrent.channels != keys + recurrent.heads * recurrent.value_dim:
        raise ModelError(
            f"{where}: recurrent layers: {recurrent.channels} channels are not those of the heads"
        )


def _check_experts(experts: Experts, layers: int, where: Path) -> None:
    for name in ("count", "used", "ffn", "groups", "groups_used"):
        if getattr(experts, name) < 1:
            raise ModelError(
                f"{where}: experts: {name} {getattr(experts, name)} must be at least 1"
            )
    count, groups = experts.count, experts.groups
    if count > MOST_EXPERTS:
        raise ModelError(f"{where}: {count} experts; at most {MOST_EXPERTS} are supported")
    if count % groups or experts.groups_used > groups:
        raise ModelError(
            f"{where}: {count} experts are not {groups} groups, of which "
            f"{experts.groups_used} count"
        )
    if experts.used > count // groups * experts.groups_used:
        raise ModelError(f"{where}: a token cannot have {experts.used} experts of {count}")
    if not 0 < experts.scale < math.inf:
        raise ModelError(f"{where}: the experts' scale {experts.scale} must be positive and finite")
    if experts.shared_ffn < 0 or len(experts.layers) != layers:
        raise ModelError(f"{where}: the experts {experts} do not fit {layers} layers")
