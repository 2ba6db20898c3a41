"""How configurations and GGUF files state recurrent layers."""

from __future__ import annotations

from redwood.backends.native.config_fields import Fields
from redwood.backends.native.families import Family
from redwood.backends.native.gguf_keys import Keys
from redwood.backends.native.gguf_mamba import mamba_of_gguf
from redwood.backends.native.spec import Recurrent
from redwood.backends.native.spec_mamba import layer_types, mamba_of
from redwood.errors import ModelError

_KINDS = {"short_conv": "conv", "delta": "linear_attention"}  # in layer_types


def recurrent_of(fields: Fields, family: Family) -> Recurrent | None:
    """Returns the recurrent layers that a configuration of a family states, or None.

    Raises: ModelError and UnsupportedError, naming the setting.
    """
    if not family.recurrent:
        return None
    if family.recurrent == "mamba":
        return mamba_of(fields)
    layers = _layers(fields, _KINDS[family.recurrent])
    if family.recurrent == "short_conv":
        biased = fields.flag("conv_bias")
        return Recurrent(
            kind="short_conv",
            layers=layers,
            width=fields.count("conv_L_cache"),
            channels=fields.count("hidden_size"),
            bias=biased,
            conv_bias=biased,
            output_bias=biased,
        )
    sizes = {
        "heads": fields.count("linear_num_value_heads"),
        "key_heads": fields.count("linear_num_key_heads"),
        "key_dim": fields.count("linear_key_head_dim"),
        "value_dim": fields.count("linear_value_head_dim"),
    }
    width = fields.count("linear_conv_kernel_dim")
    return _delta(layers, width, sizes, log_decay=True)


def ffn_of(fields: Fields, family: Family) -> int:
    """Returns the width of a dense MLP; LFM2's is adjusted, as its own code does it."""
    if family.model_type == "granitemoehybrid" and not fields.get("num_local_experts"):
        fields.get("intermediate_size")  # of experts, which it has not
        return fields.count("shared_intermediate_size")
    if family.model_type == "qwen3_5_moe_text":  # no layer has one
        return fields.count("moe_intermediate_size")
    ffn = fields.count("intermediate_size")
    if family.model_type != "lfm2":
        return ffn
    multiplier, multiple = fields.get("block_ffn_dim_multiplier"), fields.count("block_multiple_of")
    if not fields.flag("block_auto_adjust_ff_dim"):
        return ffn
    ffn = int(2 * ffn / 3)
    if multiplier is not None:
        wanted = fields.number("block_ffn_dim_multiplier") * ffn
        if not 1 <= wanted < 1 << 31:
            raise ModelError(f"{fields.where}: block_ffn_dim_multiplier makes MLPs of {wanted}")
        ffn = int(wanted)
        ffn = multiple * ((ffn + multiple - 1) // multiple)
    return ffn


def recurrent_of_gguf(keys: Keys, family: Family, layers: int) -> Recurrent | None:
    """Returns the recurrent layers that a GGUF file states, or None.

    Raises: ModelError and UnsupportedError, naming the key.
    """
    if not family.recurrent:
        return None
    if family.recurrent == "mamba":
        return mamba_of_gguf(keys, layers)
    if family.recurrent == "short_conv":
        heads = keys.get("attention.head_count_kv")
        if not isinstance(heads, list) or len(heads) != layers:
            raise keys.fault("attention.head_count_kv", f"does not say which of {layers} have none")
        return Recurrent(
            kind="short_conv",
            layers=tuple(head == 0 for head in heads),
            width=keys.count("shortconv.l_cache"),
            channels=keys.count("embedding_length"),
        )
    every = keys.count("full_attention_interval", 4)
    heads = keys.count("ssm.time_step_rank")
    inner = keys.count("ssm.inner_size")
    if inner % heads:
        raise keys.fault("ssm.inner_size", f"{inner} is no multiple of {heads} heads")
    sizes = {
        "heads": heads,
        "key_heads": keys.count("ssm.group_count"),
        "key_dim": keys.count("ssm.state_size"),
        "value_dim": inner // heads,
    }
    states = tuple((layer + 1) % every != 0 for layer in range(layers))
    # Converters of Qwen3.5 and later put value heads in the order of ggml's broadcasts.
    tiled = keys.architecture != "qwen3next"
    return _delta(states, keys.count("ssm.conv_kernel"), sizes, tiled=tiled)


def _delta(
    layers: tuple[bool, ...],
    width: int,
    sizes: dict[str, int],
    *,
    tiled: bool = False,
    log_decay: bool = False,
) -> Recurrent:
    heads, key_heads = sizes["heads"], sizes["key_heads"]
    key_dim, value_dim = sizes["key_dim"], sizes["value_dim"]
    return Recurrent(
        kind="delta",
        layers=layers,
        width=width,
        channels=2 * key_heads * key_dim + heads * value_dim,
        heads=heads,
        key_heads=key_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        tiled=tiled,
        log_decay=log_decay,
    )


def _layers(fields: Fields, kind: str) -> tuple[bool, ...]:
    fields.get("full_attn_idxs"), fields.get("full_attention_interval")  # what made the list
    return tuple(each == kind for each in layer_types(fields, {kind, "full_attention"}))
