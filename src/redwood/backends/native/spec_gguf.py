"""DecoderSpec of a GGUF file.

What a file leaves out is what llama.cpp assumes: most files were written for it. A setting that is
not known here is refused, since it may change what the model computes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from redwood.backends.native.families import FAMILIES, GEMMA, LATENT
from redwood.backends.native.gguf_deepseek import (
    experts_with_shared,
    latent_of_keys,
    unread_layers,
)
from redwood.backends.native.gguf_keys import Keys
from redwood.backends.native.gguf_mamba import (
    NEMOTRON,
    ffn_of_gguf,
    halves_of_gguf,
    nemotron_experts,
    positionless,
    scales_of_gguf,
)
from redwood.backends.native.gguf_ropes import ropes_of
from redwood.backends.native.rope import float32
from redwood.backends.native.spec import LANES, MOST_LAYERS, DecoderSpec, Experts
from redwood.backends.native.spec_checks import check_capacity, check_spec
from redwood.backends.native.spec_gemma import layers_of_gguf
from redwood.backends.native.spec_recurrent import recurrent_of_gguf
from redwood.errors import ModelError
from redwood.models._gguf import GGUFFile
from redwood.models._gguf_parts import GGUFModel

_BIGGEST = {"gemma2": 46, "gemma3": 62}
"""Layers of the 27B models: their query scale is hidden / heads, which no key says."""


_PATTERNS = {"gemma2": 2, "gemma3": 6, "phi3": 0, "gptoss": 2, "cohere2": 4, "exaone4": 4}
_PATTERNS |= {"gemma3n": 5}
"""Every so many layers one is not sliding, where a file does not say it; 0: all slide."""
_GRANITE = ("granitemoe", "granitehybrid")
_NORMALISED = ("mixtral", "qwen3moe", "gptoss", "gemma4", "qwen3next", "qwen35moe", *_GRANITE)
"""Mixtures whose weights add up to 1, which no key says."""


def spec_from_gguf(file: GGUFFile | GGUFModel, capacity: int | None = None) -> DecoderSpec:
    """Returns the spec of the model in a GGUF file.

    Args:
        capacity: positions that will be used, see `make_rope`; None: the model's context.

    Raises:
        ModelError: a key that is missing or makes no sense.
        UnsupportedError: a model that this decoder does not compute, with the reason.
        ArgumentError: a capacity below 1.
    """
    check_capacity(capacity)
    keys = Keys(file)
    keys.refuse()
    arch, gemma = keys.family, keys.family in GEMMA
    family, tensors = FAMILIES[arch], file.tensors
    layers, attends = keys.count("block_count"), arch != "mamba2"
    heads = keys.count("attention.head_count") if attends else 1
    if layers > MOST_LAYERS:
        raise keys.fault("block_count", f"{layers} cannot be right")
    unread = unread_layers(keys)
    layers -= unread
    hidden = keys.count("embedding_length")
    latent = latent_of_keys(keys, heads) if arch in LATENT else None
    windows = _windows(keys, layers)
    if latent is not None:
        head_dim = latent.head_dim
    elif arch == "gemma4":
        head_dim = keys.count("attention.key_length_swa")
        keys.refuse_other("attention.value_length", keys.count("attention.key_length"))
        keys.refuse_other("attention.value_length_swa", head_dim)
    else:
        head_dim = keys.count("attention.key_length", hidden // heads) if attends else LANES
        for name in ("value_length", "key_length_swa", "value_length_swa"):
            keys.refuse_other(f"attention.{name}", head_dim)
    turning = latent.turning if latent else head_dim
    ropes = () if positionless(keys) else ropes_of(keys, turning, capacity, windows)
    traits: dict[str, Any] = {"qk_norm": False, "post_norms": False}
    traits |= {**family.traits, **family.gguf_traits}
    if arch == "glm4moe":
        traits["qk_norm"] = "blk.0.attn_q_norm.weight" in tensors
    experts = _experts(keys, layers)
    per_layer: dict[str, Any] = {}
    if arch in ("gemma3n", "gemma4"):
        per_layer = layers_of_gguf(keys, tensors, windows, head_dim)
    epsilon = "layer_norm" if traits.get("layer_norm") else "layer_norm_rms"
    gelu = gemma or not traits.get("gated", True)
    values: dict[str, Any] = dict(
        architecture=arch,
        vocab_size=_vocab_size(file),
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=heads if latent else _kv_heads(keys, per_layer, heads) if attends else 1,
        head_dim=head_dim,
        ffn=(
            max(per_layer["ffns"])
            if per_layer
            else ffn_of_gguf(keys, layers, experts.ffn if experts else None)
        ),
        context=keys.count("context_length"),
        norm_eps=float32(keys.number(f"attention.{epsilon}_epsilon")),
        activation="relu2" if arch in NEMOTRON else "gelu_tanh" if gelu else "silu",
        attention_scale=float32(
            latent.scale / math.sqrt(head_dim)
            if latent
            else _attention_scale(keys, hidden, heads, head_dim, layers)
        ),
        attention_softcap=float32(
            keys.number("attn_logit_softcapping", 50.0) if arch == "gemma2" else 0
        ),
        logit_softcap=float32(
            keys.number("final_logit_softcapping", 0.0 if arch == "gemma3" or not gemma else 30.0)
        ),
        embedding_scale=float32(math.sqrt(hidden)) if gemma else 1.0,
        windows=windows,
        rope_of_layer=_rope_of_layer(arch, windows, len(ropes)),
        ropes=ropes,
        tied="output.weight" not in tensors,
        attention_bias=(
            family.bias == "always"
            or _any(tensors, "attn_q.bias")
            or _any(tensors, "attn_qkv.bias")
        ),
        output_bias=_any(tensors, "attn_output.bias"),
        logit_scale=float32(keys.number("logit_scale") if traits.get("parallel") else 1.0),
        mlp_bias=bool(family.mlp_bias) and _any(tensors, "ffn_up.bias"),
        experts=experts,
        latent=latent.width if latent else 0,
        value_dim=latent.value_dim if latent else 0,
        query_latent=latent.query_width if latent else 0,
        unread_layers=unread,
        recurrent=recurrent_of_gguf(keys, family, layers),
        halves=halves_of_gguf(keys, layers),
        **per_layer,
        **traits,
    )
    return check_spec(DecoderSpec(**(values | scales_of_gguf(keys))), file.path)


def _any(tensors: Iterable[str], end: str) -> bool:
    """Whether a layer has a tensor; the first of them may be of another kind."""
    return any(name.startswith("blk.") and name.endswith(f".{end}") for name in tensors)


def _rope_of_layer(family: str, windows: tuple[int, ...], ropes: int) -> tuple[int, ...]:
    if ropes == 0:
        return (-1,) * len(windows)
    if ropes > 1:
        return tuple(int(bool(window)) for window in windows)
    if family == "smollm3":
        return tuple(-1 if (layer + 1) % 4 == 0 else 0 for layer in range(len(windows)))
    if family == "cohere2" or (family == "exaone4" and any(windows)):
        return tuple(0 if window else -1 for window in windows)
    return (0,) * len(windows)


def _kv_heads(keys: Keys, per_layer: Mapping[str, Any], heads: int) -> int:
    of_layers = per_layer.get("kv_heads_of")
    return of_layers[0] if of_layers else keys.kv_heads(heads)


def _experts(keys: Keys, layers: int) -> Experts | None:
    """The mixture of experts that a file states, or None."""
    family = keys.family
    some = (*_GRANITE, "nemotronh", "gemma4")  # of which others have none
    if not FAMILIES[family].experts or (family in some and not keys.get("expert_count")):
        return None
    if FAMILIES[family].experts in ("deepseek", "deepseek2"):
        return experts_with_shared(keys, layers)
    if family in NEMOTRON:
        return nemotron_experts(keys, layers)
    used, gating = keys.count("expert_used_count"), keys.get("expert_gating_func")
    # 1 is softmax, and 3 softmax over the chosen ones: the same once they add up to 1.
    if gating not in (None, 1) and not (gating == 3 and family in _NORMALISED):
        raise keys.refused("expert_gating_func", "is a router that is not supported here")
    normalised = family in _NORMALISED
    keys.refuse_other("expert_weights_norm", normalised)
    for name in ("expert_group_count", "expert_group_used_count"):
        if keys.get(name) not in (None, 0, 1):
            raise keys.refused(name, f"is not defined for {keys.architecture}")
    dense = 0  # of gemma4 its layers say
    if family != "gemma4":
        dense = keys.count("feed_forward_length", keys.get("expert_feed_forward_length"))
    width = dense if family in ("mixtral", "olmoe", "gptoss", *_GRANITE) else dense // used
    shared: dict[str, Any] = {}
    if family in ("qwen2moe", "qwen3next", "qwen35moe"):
        shared = {"shared_ffn": keys.count("expert_shared_feed_forward_length", dense)}
        shared["shared_switch"] = True
    elif family in _GRANITE and keys.get("expert_shared_feed_forward_length"):
        shared = {"shared_ffn": keys.count("expert_shared_feed_forward_length")}
    elif keys.get("expert_shared_count") or keys.get("expert_shared_feed_forward_length"):
        raise keys.refused("expert_shared_count", f"is not defined for {keys.architecture}")
    return Experts(
        count=keys.count("expert_count"),
        used=used,
        ffn=keys.count("expert_feed_forward_length", width or None),
        layers=(True,) * layers,
        normalise=normalised,
        scale=float32(keys.number("expert_weights_scale", 0.0) or 1.0),
        biases=family == "gptoss",
        beside=family == "gemma4",
        **shared,
    )


def _vocab_size(file: GGUFFile | GGUFModel) -> int:
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelError(f"{file.path} has no matrix token_embd.weight")
    return embedding.shape[0]


def _attention_scale(keys: Keys, hidden: int, heads: int, head_dim: int, layers: int) -> float:
    given = keys.number("attention.scale", 0.0)
    if given:
        return given
    if keys.family in ("gemma3n", "gemma4"):
        return 1.0
    if _BIGGEST.get(keys.family) == layers:
        return 1 / math.sqrt(hidden // heads)
    return 1 / math.sqrt(head_dim)


def _windows(keys: Keys, layers: int) -> tuple[int, ...]:
    """Windows per layer, 0 for full attention."""
    gemma2 = keys.family == "gemma2"
    window = keys.get("attention.sliding_window")
    if window is None:
        whole = keys.family == "exaone4" and layers == 64  # EXAONE 4 32B, as llama.cpp knows it
        window = 4096 if gemma2 or whole else 128 if keys.family == "gptoss" else 0
    if type(window) is not int or window < 0:
        raise keys.fault("attention.sliding_window", f"{window!r} must be a whole number")
    default = _PATTERNS.get(keys.family)
    pattern = keys.get("attention.sliding_window_pattern")
    pattern = default if pattern is None else pattern
    if window == 0:
        return (0,) * layers
    if pattern is None:
        raise keys.refused("attention.sliding_window", "does not say to which layers it applies")
    if type(pattern) is int and pattern >= 0:
        slides = [pattern == 0 or (layer + 1) % pattern != 0 for layer in range(layers)]
    elif isinstance(pattern, list) and len(pattern) == layers:
        slides = [bool(value) for value in pattern]
    else:
        raise keys.fault("attention.sliding_window_pattern", f"does not fit {layers} layers")
    return tuple(window if slide else 0 for slide in slides)
