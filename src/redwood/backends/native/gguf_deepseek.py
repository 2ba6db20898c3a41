"""How GGUF files state what DeepSeek's models and those after them have: latents, and mixtures with
shared experts, dense first layers, and layers that draft behind the others."""

from __future__ import annotations

import math

from redwood.backends.native.gguf_keys import Keys
from redwood.backends.native.rope import float32
from redwood.backends.native.spec import MOST_LAYERS, Experts
from redwood.backends.native.spec_latent import Latent

_SOFTMAX, _SIGMOID = 1, 2


def unread_layers(keys: Keys) -> int:
    """Returns how many of a file's last layers only draft.

    Raises: ModelError for what is no count, or a layer that does not look like it.
    """
    count = _count(keys, "nextn_predict_layers", MOST_LAYERS)
    layers = keys.count("block_count")
    if count and count >= layers:
        raise keys.fault("nextn_predict_layers", f"{count} of {layers} layers cannot be right")
    for layer in range(layers - count, layers):
        held = [name for name in keys.file.tensors if name.startswith(f"blk.{layer}.")]
        if held and f"blk.{layer}.nextn.eh_proj.weight" not in held:
            raise keys.fault(
                "nextn_predict_layers", f"{count}: blk.{layer} has no tensor nextn.eh_proj.weight"
            )
    return count


def latent_of_keys(keys: Keys, heads: int) -> Latent:
    """Returns the latent attention that a file states.

    Newer files state the lengths of the latents as key_length and value_length, with one head of
    keys, and those of keys and values under names of their own; older ones state these alone.

    Raises: ModelError and UnsupportedError, naming the key.
    """
    width, turning = keys.count("attention.kv_lora_rank"), keys.count("rope.dimension_count")
    apart = keys.get("attention.key_length_mla") is not None
    ending = "_mla" if apart else ""
    head_dim = keys.count(f"attention.key_length{ending}")
    value_dim = keys.count(f"attention.value_length{ending}")
    if apart:
        keys.refuse_other("attention.key_length", width + turning)
        keys.refuse_other("attention.value_length", width)
    if keys.count("attention.head_count_kv", heads) not in (1, heads):
        raise keys.fault("attention.head_count_kv", f"must be 1 or that of heads, {heads}")
    if turning >= head_dim:
        raise keys.fault("rope.dimension_count", f"{turning} does not fit keys of {head_dim}")
    if value_dim > head_dim:
        raise keys.fault(f"attention.value_length{ending}", f"{value_dim} is wider than keys")
    asked = _count(keys, "attention.q_lora_rank", 1 << 24)
    return Latent(width, head_dim, turning, value_dim, _scale(keys), asked)


def _scale(keys: Keys) -> float:
    """YaRN's share in the scale of attention; the key is a tenth of mscale_all_dim."""
    multiplier = keys.number("rope.scaling.yarn_log_multiplier", 0.0)
    factor = keys.number("rope.scaling.factor", 1.0)
    if keys.get("rope.scaling.type") != "yarn" or factor <= 1:
        return 1.0
    return (1 + multiplier * math.log(factor)) ** 2


def experts_with_shared(keys: Keys, layers: int) -> Experts:
    """Returns the mixture of such a file.

    A softmax router's group counts as its best expert (DeepSeek V2), a sigmoid's as its two best
    (V3). A file that names no groups has none.

    Raises: ModelError and UnsupportedError, naming the key or the tensor.
    """
    ffn, first = keys.count("expert_feed_forward_length"), _first(keys, layers)
    bias = f"blk.{first}.exp_probs_b.bias" in keys.file.tensors
    gating = keys.get("expert_gating_func")
    if gating in (None, 0) and _is_flash(keys):
        gating = _SIGMOID
    if gating in (None, 0):
        if keys.architecture == "deepseek2" and bias:
            raise keys.fault("expert_gating_func", "is missing, and exp_probs_b.bias is there")
        gating = _SOFTMAX if keys.architecture == "deepseek2" else _SIGMOID
    if gating not in (_SOFTMAX, _SIGMOID):
        raise keys.refused("expert_gating_func", "is a router that is not supported here")
    normalise = keys.get("expert_weights_norm")
    if normalise is None and gating == _SOFTMAX:
        normalise = False  # files of DeepSeek V2 do not say it
    if type(normalise) is not bool:
        raise keys.fault("expert_weights_norm", f"{str(normalise)[:80]} must be true or false")
    groups = _count(keys, "expert_group_count", 1 << 20) or 1
    used = _count(keys, "expert_group_used_count", 1 << 20)
    if groups > 1 and not used:
        raise keys.fault("expert_group_used_count", f"is missing, and there are {groups} groups")
    shared = ffn * _count(keys, "expert_shared_count", 1 << 20)
    if keys.get("expert_shared_feed_forward_length") not in (None, shared):
        raise keys.refused("expert_shared_feed_forward_length", f"is not {shared}")
    return Experts(
        count=keys.count("expert_count"),
        used=keys.count("expert_used_count"),
        ffn=ffn,
        layers=tuple(layer >= first for layer in range(layers)),
        scoring="sigmoid" if gating == _SIGMOID else "softmax",
        normalise=normalise,
        scale=float32(keys.number("expert_weights_scale", 0.0) or 1.0),
        groups=groups,
        groups_used=used if groups > 1 else 1,
        two_best=gating == _SIGMOID,
        choice_bias=bias,
        shared_ffn=shared,
    )


def _is_flash(keys: Keys) -> bool:
    """GLM-4.7-Flash, of which the first files did not say it, as llama.cpp knows it."""
    embedding = keys.file.tensors.get("token_embd.weight")
    tokens = embedding.shape[0] if embedding is not None and embedding.shape else 0
    return keys.get("block_count") in (47, 48) and tokens == 154880


def _first(keys: Keys, layers: int) -> int:
    """The first layer that is a mixture."""
    first = _count(keys, "leading_dense_block_count", MOST_LAYERS)
    return min(first, layers)


def _count(keys: Keys, name: str, most: int) -> int:
    """A whole number, 0 where the key is missing."""
    value = keys.get(name)
    if value is None:
        return 0
    if type(value) is not int or not 0 <= value <= most:
        raise keys.fault(name, f"{str(value)[:80]} is no count")
    return value
