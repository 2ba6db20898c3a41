"""What GGUF files state of Mamba-2 layers and of Granite's multipliers."""

from __future__ import annotations

from typing import Any

from redwood.backends.native.gguf_keys import Keys
from redwood.backends.native.rope import float32
from redwood.backends.native.spec import Experts, Multipliers, Recurrent
from redwood.errors import ModelError, UnsupportedError

GRANITE = ("granite", "granitemoe", "granitehybrid")
NEMOTRON = ("nemotronh", "nemotronhmoe")


def mamba_of_gguf(keys: Keys, layers: int) -> Recurrent | None:
    """Returns the Mamba-2 layers of a file, or None.

    Raises: ModelError and UnsupportedError, naming key or tensor.
    """
    heads, groups = keys.count("ssm.time_step_rank"), keys.count("ssm.group_count")
    inner, state = keys.count("ssm.inner_size"), keys.count("ssm.state_size")
    if inner % heads:
        raise keys.fault("ssm.inner_size", f"{inner} is no multiple of {heads} heads")
    tensors, beside = keys.file.tensors, keys.family == "falconh1"
    if beside and any(name.endswith(".ssm_norm.weight") for name in tensors):
        raise UnsupportedError(
            f"{keys.file.path}: blk.0.ssm_norm.weight: the file does not say whether its gate "
            "comes first; use a folder of safetensors"
        )
    if beside and "output.weight" not in tensors:
        raise UnsupportedError(
            f"{keys.file.path} lacks output.weight: the multiplier of logits is lost where the "
            "head is the embedding; use a folder of safetensors"
        )
    mixes = tuple(beside or block == "mamba" for block in blocks_of(keys, layers))
    if not any(mixes):
        return None
    return Recurrent(
        kind="mamba",
        layers=mixes,
        width=keys.count("ssm.conv_kernel"),
        channels=inner + 2 * groups * state,
        heads=heads,
        key_heads=groups,
        key_dim=state,
        value_dim=inner // heads,
        conv_bias=any(name.endswith(".ssm_conv1d.bias") for name in tensors),
        beside=beside,
        norm="" if beside else "last",
    )


def blocks_of(keys: Keys, layers: int) -> list[str]:
    """Returns what each layer mixes tokens with: "mamba", "attention", "both", or "mlp": none."""
    if keys.family == "mamba2":
        return ["mamba"] * layers
    if keys.family == "falconh1":
        return ["both"] * layers
    heads = _listed(keys, "attention.head_count_kv", layers)
    widths = [0] * layers
    if keys.family in NEMOTRON:
        widths = _listed(keys, "feed_forward_length", layers)
    if any(head and width for head, width in zip(heads, widths, strict=True)):
        raise keys.fault("feed_forward_length", "says layers with attention and MLP")
    return [
        "attention" if head else "mlp" if width else "mamba"
        for head, width in zip(heads, widths, strict=True)
    ]


def _listed(keys: Keys, name: str, layers: int) -> list[int]:
    stated = keys.get(name)
    if not isinstance(stated, list) or len(stated) != layers:
        raise keys.fault(name, f"does not say what each of {layers} layers has")
    if not all(type(count) is int and 0 <= count < 1 << 31 for count in stated):
        raise keys.fault(name, f"{str(stated)[:80]} must be whole numbers")
    return stated


def halves_of_gguf(keys: Keys, layers: int) -> tuple[str, ...]:
    """Returns which layers are mixers alone and which are MLPs alone; empty: all are both."""
    if keys.family not in ("mamba2", *NEMOTRON):
        return ()
    return tuple("mlp" if block == "mlp" else "mixer" for block in blocks_of(keys, layers))


def nemotron_experts(keys: Keys, layers: int) -> Experts:
    """Returns the mixture of Nemotron-H's files, whose router llama.cpp knows without a key.

    Raises: ModelError and UnsupportedError, naming the key.
    """
    for name in ("expert_group_count", "expert_group_used_count"):
        if keys.get(name) not in (None, 0, 1):
            raise keys.refused(name, f"is not supported for {keys.architecture}")
    keys.refuse_other("expert_gating_func", 2)  # sigmoids
    normalise = keys.get("expert_weights_norm")
    if normalise not in (None, True, False):
        raise keys.fault("expert_weights_norm", f"{str(normalise)[:80]} must be true or false")
    return Experts(
        count=keys.count("expert_count"),
        used=keys.count("expert_used_count"),
        ffn=keys.count("expert_feed_forward_length"),
        layers=tuple(block == "mlp" for block in blocks_of(keys, layers)),
        scoring="sigmoid",
        normalise=bool(normalise),
        scale=float32(keys.number("expert_weights_scale", 0.0) or 1.0),
        choice_bias=True,
        shared_ffn=keys.count("expert_shared_feed_forward_length"),
    )


def ffn_of_gguf(keys: Keys, layers: int, default: int | None) -> int:
    """Returns the width of a dense MLP; 0: there is none.

    Raises: ModelError for a key that is missing or makes no sense.
    """
    name = "feed_forward_length"
    if keys.family == "mamba2":
        keys.refuse_other(name, 0)
        return 0
    if keys.family not in NEMOTRON:
        return keys.count(name, default)
    widths = set(_listed(keys, name, layers)) - {0}
    if len(widths) > 1:
        raise keys.fault(name, f"{sorted(widths)} must be one width, and zeros")
    return widths.pop() if widths else 0


def positionless(keys: Keys) -> bool:
    """Whether no layer has rotary positions; Granite's files say it by a switch of its own."""
    if keys.family in ("mamba2", *NEMOTRON):
        return True
    switch = keys.get("rope.scaling.finetuned")
    if keys.family in GRANITE and switch not in (None, True, False):
        raise keys.fault("rope.scaling.finetuned", f"{switch!r} must be true or false")
    return keys.family in GRANITE and switch is False


def scales_of_gguf(keys: Keys) -> dict[str, Any]:
    """Returns the multipliers that Granite's files state; those of others are in their weights."""
    if keys.family not in GRANITE:
        return {}
    made = {}
    for name in ("residual_scale", "embedding_scale", "logit_scale"):
        made[name] = keys.number(name, 1.0) or 1.0  # 0: llama.cpp leaves it out
        if made[name] < 0:
            raise ModelError(f"{keys.file.path}: {keys.architecture}.{name} must be positive")
    by = float32(made["residual_scale"])
    return {
        "embedding_scale": float32(made["embedding_scale"]),
        "logit_scale": float32(1 / made["logit_scale"]),
        "multipliers": Multipliers(attention=by, state=by, mlp=by),
    }
