"""What configurations and GGUF files of Gemma 3n and Gemma 4 say layer by layer.

Source: transformers.models.gemma3n and gemma4, version 5.24.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import NormalDist
from types import SimpleNamespace
from typing import Any

from redwood.backends.native.config_fields import Fields
from redwood.backends.native.gguf_keys import Keys
from redwood.backends.native.rope import float32
from redwood.backends.native.spec import MOST_LAYERS, Streams
from redwood.errors import ModelError, UnsupportedError

_BY_LAYER = {"head_dim", "num_key_value_heads"}


def layers_of(fields: Fields, head_dim: int) -> dict[str, Any]:
    """Returns the fields of `DecoderSpec` that these families have beside others.

    Args:
        head_dim: components of a head where no layer says otherwise.

    Raises: ModelError and UnsupportedError, naming the setting.
    """
    layers = fields.count("num_hidden_layers")
    if layers > MOST_LAYERS:
        raise ModelError(f"{fields.where}: num_hidden_layers {layers} cannot be right")
    kinds = [str(kind) for kind in fields.get("layer_types") or []]
    shared = _whole(fields, "num_kv_shared_layers")
    widths = fields.get("intermediate_size")
    if not isinstance(widths, list):
        widths = [fields.count("intermediate_size")] * layers
    if len(widths) != layers or any(type(w) is not int or not 1 <= w < 1 << 31 for w in widths):
        raise ModelError(
            f"{fields.where}: intermediate_size {str(widths)[:80]} does not fit {layers} layers"
        )
    made: dict[str, Any] = {
        "sources": _sources(fields.where, kinds, layers, shared),
        "ple": _whole(fields, "hidden_size_per_layer_input"),
    }
    if made["ple"]:
        made["ple_vocab"] = fields.count("vocab_size_per_layer_input")
    fields.get("vocab_size_per_layer_input")
    if fields.get("model_type") != "gemma3n_text":
        if made["ple"] and made["ple_vocab"] < fields.count("vocab_size"):
            raise ModelError(
                f"{fields.where}: vocab_size_per_layer_input {made['ple_vocab']} leaves tokens out"
            )
        if fields.flag("use_double_wide_mlp"):
            widths = [w * 2 if i >= layers - shared else w for i, w in enumerate(widths)]
        made |= _two_sizes(fields, kinds, head_dim)
        made["layer_scaled"] = True
    else:
        made |= _streams(fields, layers)
    return made | {"ffns": tuple(widths)}


def _whole(fields: Fields, name: str) -> int:
    """A whole number; none is 0."""
    value = fields.get(name)
    if value is None:
        return 0
    if type(value) is not int or not 0 <= value < 1 << 31:
        raise ModelError(f"{fields.where}: {name} {str(value)[:80]} must be a whole number")
    return value


def _sources(where: Any, kinds: list[str], layers: int, shared: int) -> tuple[int, ...]:
    """The last layers read the keys and values of the last one of their kind before them."""
    if len(kinds) != layers or not 0 <= shared < layers:
        raise ModelError(
            f"{where}: {layers} layers, of which {shared} share keys and values, do not fit "
            f"{len(kinds)} layer_types"
        )
    own = kinds[: layers - shared]
    for kind in kinds[layers - shared :]:
        if kind not in own:
            raise ModelError(f"{where}: no layer of type {kind!r} has keys and values to share")
    last = {kind: i for i, kind in enumerate(own)}
    return tuple(i if i < len(own) else last[kind] for i, kind in enumerate(kinds))


def _two_sizes(fields: Fields, kinds: list[str], head_dim: int) -> dict[str, Any]:
    """Gemma 4: full layers may have other heads, and values that are keys."""
    config, same = fields.get("per_layer_config"), fields.flag("attention_k_eq_v")
    # Transformers before 5.24 has settings of full layers in place of those of each layer.
    full = {
        "head_dim": fields.get("global_head_dim"),
        "num_key_value_heads": fields.get("num_global_key_value_heads") if same else None,
    }
    kv_heads = fields.count("num_key_value_heads")
    heads, dims = [], []
    for layer, kind in enumerate(kinds):
        named = {k: v for k, v in full.items() if v and kind == "full_attention"}
        of = SimpleNamespace(**named) if config is None else config[layer]
        heads.append(_of_layer(fields, of, layer, "num_key_value_heads", kv_heads))
        dims.append(_of_layer(fields, of, layer, "head_dim", head_dim))
    odd = {name for layer in _overrides(fields) for name in layer} - _BY_LAYER
    if odd:
        raise UnsupportedError(
            f"{fields.where}: per_layer_config sets {', '.join(sorted(map(str, odd)))} layer by "
            "layer, which is not computed here"
        )
    own = len(kinds) - _whole(fields, "num_kv_shared_layers")
    return {
        "kv_heads_of": tuple(heads),
        "head_dims": tuple(dims),
        "keys_as_values": tuple(
            same and kind == "full_attention" and layer < own for layer, kind in enumerate(kinds)
        ),
    }


def _overrides(fields: Fields) -> list[dict[str, Any]]:
    stated = fields.stated().get("per_layer_config") or {}
    values = list(stated.values()) if isinstance(stated, dict) else [stated]
    if not all(isinstance(value, dict) for value in values):
        raise ModelError(f"{fields.where}: per_layer_config {str(stated)[:80]} is not understood")
    return values


def _of_layer(fields: Fields, config: Any, layer: int, name: str, default: int) -> int:
    value = getattr(config, name, default)
    if type(value) is not int or not 1 <= value < 1 << 31:
        raise ModelError(f"{fields.where}: {name} {str(value)[:80]} of layer {layer}")
    return value


def _streams(fields: Fields, layers: int) -> dict[str, Any]:
    """Gemma 3n: AltUp, Laurel, and gates of which few are open."""
    fields.get("altup_coef_clip")  # of training alone
    active = _whole(fields, "altup_active_idx")
    if not _whole(fields, "hidden_size_per_layer_input"):
        raise ModelError(f"{fields.where}: hidden_size_per_layer_input must be at least 1")
    shares = fields.get("activation_sparsity_pattern")
    if not isinstance(shares, list) or len(shares) != layers:
        raise ModelError(
            f"{fields.where}: activation_sparsity_pattern {str(shares)[:80]} does not fit "
            f"{layers} layers"
        )
    return {
        "cutoffs": tuple(_cutoff(fields, share) for share in shares),
        "streams": Streams(
            count=fields.count("altup_num_inputs"),
            active=active,
            rank=fields.count("laurel_rank"),
            scaled=fields.flag("altup_correct_scale"),
        ),
    }


def _cutoff(fields: Fields, share: Any) -> float:
    """How many deviations above the mean that share of a normal distribution ends."""
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
        raise ModelError(
            f"{fields.where}: activation_sparsity_pattern has {str(share)[:80]}, which is no share"
        )
    return float32(NormalDist().inv_cdf(float32(share))) if share > 0 else -math.inf


def layers_of_gguf(
    keys: Keys, tensors: Mapping[str, Any], windows: tuple[int, ...], head_dim: int
) -> dict[str, Any]:
    """Returns what `layers_of` does, of a GGUF file.

    Args:
        tensors: of the file, by name.
        windows: [layers], 0 for full attention.
        head_dim: components of a head of layers with windows.

    Raises: ModelError and UnsupportedError, naming the key.
    """
    layers, shared = len(windows), keys.get("attention.shared_kv_layers") or 0
    ple = keys.get("embedding_length_per_layer_input") or 0
    for name, value in (
        ("attention.shared_kv_layers", shared),
        ("embedding_length_per_layer_input", ple),
    ):
        if type(value) is not int or not 0 <= value < 1 << 31:
            raise keys.fault(name, f"{str(value)[:80]} must be a whole number")
    kinds = ["sliding" if window else "full" for window in windows]
    made: dict[str, Any] = {
        "sources": _sources(keys.file.path, kinds, layers, shared),
        "ffns": keys.counts("feed_forward_length", layers),
        "ple": ple,
    }
    if ple:
        table = tensors.get("per_layer_token_embd.weight")
        if table is None or len(table.shape) != 2:
            raise ModelError(f"{keys.file.path} has no matrix per_layer_token_embd.weight")
        made["ple_vocab"] = table.shape[0]
    if keys.family == "gemma4":
        full = keys.count("attention.key_length")
        made["head_dims"] = tuple(head_dim if window else full for window in windows)
        made["kv_heads_of"] = keys.counts("attention.head_count_kv", layers)
        # As llama.cpp has it: where a full layer has no weights of values, they are the keys.
        made["keys_as_values"] = tuple(
            not window
            and made["sources"][layer] == layer
            and f"blk.{layer}.attn_v.weight" not in tensors
            for layer, window in enumerate(windows)
        )
        made["layer_scaled"] = "blk.0.layer_output_scale.weight" in tensors
        return made
    keys.refuse_other("altup.active_idx", 0)
    cutoffs = keys.get("activation_sparsity_scale")
    if cutoffs is None:  # llama.cpp's constants
        cutoffs = [float32(NormalDist().inv_cdf(float32(0.95)))] * min(10, layers)
        cutoffs += [-math.inf] * (layers - len(cutoffs))
    if (
        not isinstance(cutoffs, list)
        or len(cutoffs) != layers
        or any(type(cut) is not float or math.isnan(cut) or cut == math.inf for cut in cutoffs)
    ):
        raise keys.fault("activation_sparsity_scale", f"{str(cutoffs)[:80]} does not fit")
    laurel = tensors.get("blk.0.laurel_l.weight")
    if laurel is None or len(laurel.shape) != 2:
        raise ModelError(f"{keys.file.path} has no matrix blk.0.laurel_l.weight")
    made["cutoffs"] = tuple(cutoffs)
    made["streams"] = Streams(keys.count("altup.num_inputs"), 0, laurel.shape[0])
    return made
