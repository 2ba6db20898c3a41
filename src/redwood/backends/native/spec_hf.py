"""DecoderSpec of a folder as Transformers saves it, from its config.json.

Transformers fills in the defaults, since those are what its own model would compute with.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from redwood.backends.native.spec import (
    GEMMA,
    MOST_LAYERS,
    QK_NORM,
    DecoderSpec,
    Rope,
    check_capacity,
    check_spec,
    float32,
    make_rope,
)
from redwood.errors import ModelError, UnsupportedError

_MODELS = {
    "llama": ("llama", "LlamaForCausalLM"),
    "mistral": ("mistral", "MistralForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "gemma3_text": ("gemma3", "Gemma3ForCausalLM"),
    "phi3": ("phi3", "Phi3ForCausalLM"),
}
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def spec_from_folder(folder: Path, capacity: int | None = None) -> DecoderSpec:
    """Returns the spec of the model in a folder; only config.json is read.

    Args:
        capacity: positions that will be used, see `make_rope`; None: the model's context.

    Raises:
        ModelError: no config.json, or one that makes no sense.
        UnsupportedError: a model that this decoder does not compute, with the reason.
        ArgumentError: a capacity below 1.
    """
    check_capacity(capacity)
    path = folder / "config.json"
    try:
        fields = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ModelError(f"{path} is not a JSON object")
    _refuse_fields(fields, path)
    from transformers import AutoConfig  # slow to import, and GGUF files do without it

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # Transformers checks the fields with errors of its own
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"{path} is not usable: {type(error).__name__}: {reason}") from error
    return spec_from_config(config, path, capacity)


def spec_from_config(config: Any, where: Path, capacity: int | None = None) -> DecoderSpec:
    """Returns the spec of a Transformers configuration; `where` names it in messages.

    Args and Raises: as `spec_from_folder`.
    """
    check_capacity(capacity)
    if config.model_type not in _MODELS:
        raise _unsupported(config.model_type, where)
    architecture = _MODELS[config.model_type][0]
    _refuse_switches(config, where)
    hidden = _count(config, "hidden_size", where)
    heads = _count(config, "num_attention_heads", where)
    head_dim = hidden // heads
    if getattr(config, "head_dim", None) is not None:
        head_dim = _count(config, "head_dim", where)
    gemma, qwen2 = architecture in GEMMA, architecture == "qwen2"
    biased = bool(getattr(config, "attention_bias", False)) and architecture in _WITH_BIAS_SWITCH
    scalar = config.query_pre_attn_scalar if gemma else head_dim
    rope_of_layer, ropes = _ropes(config, architecture, head_dim, capacity, where)
    softcap = _number(config, "attn_logit_softcapping", where) if architecture == "gemma2" else 0
    spec = DecoderSpec(
        architecture=architecture,
        vocab_size=_count(config, "vocab_size", where),
        hidden=hidden,
        layers=_count(config, "num_hidden_layers", where),
        heads=heads,
        kv_heads=_count(config, "num_key_value_heads", where),
        head_dim=head_dim,
        ffn=_count(config, "intermediate_size", where),
        context=_count(config, "max_position_embeddings", where),
        norm_eps=float32(config.rms_norm_eps),
        activation=_activation(config, gemma, where),
        attention_scale=float32(1 / math.sqrt(scalar) if scalar > 0 else 0),
        attention_softcap=float32(softcap),
        logit_softcap=float32(_number(config, "final_logit_softcapping", where) if gemma else 0),
        embedding_scale=float32(math.sqrt(hidden)) if gemma else 1.0,
        windows=_windows(config, architecture, where),
        rope_of_layer=rope_of_layer,
        ropes=ropes,
        tied=bool(config.tie_word_embeddings),
        attention_bias=qwen2 or biased,
        output_bias=biased,
        qk_norm=architecture in QK_NORM,
        post_norms=gemma,
    )
    return check_spec(spec, where)


_WITH_BIAS_SWITCH = ("llama", "qwen3", "gemma2", "gemma3")


def _unsupported(model_type: object, where: Path) -> UnsupportedError:
    known = ", ".join(_MODELS)
    return UnsupportedError(f"{where}: model type {model_type!r} is not supported, only {known}")


def _refuse_fields(fields: Mapping[str, Any], path: Path) -> None:
    """What can be refused before Transformers is imported."""
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in _MODELS:
        raise _unsupported(kind, path)
    expected = _MODELS[kind][1]
    classes = fields.get("architectures") or [expected]
    if not isinstance(classes, list) or expected not in classes:
        raise UnsupportedError(f"{path}: the model is {classes}, not {expected}")
    layers = fields.get("num_hidden_layers", 1)
    if type(layers) is not int or not 1 <= layers <= MOST_LAYERS:
        raise ModelError(f"{path}: num_hidden_layers {str(layers)[:80]} cannot be right")
    if fields.get("quantization_config"):
        raise UnsupportedError(
            f"{path}: the weights are quantized in a format of their own (quantization_config); "
            "use a GGUF file or the full weights"
        )


def _refuse_switches(config: Any, where: Path) -> None:
    if getattr(config, "mlp_bias", False):
        raise UnsupportedError(f"{where}: biases in the MLP (mlp_bias) are not supported")
    if getattr(config, "use_bidirectional_attention", False):
        raise UnsupportedError(f"{where}: bidirectional attention is not supported")
    if config.model_type == "gemma3_text" and config.attn_logit_softcapping is not None:
        raise UnsupportedError(
            f"{where}: attn_logit_softcapping {config.attn_logit_softcapping} is not defined for "
            "Gemma 3"
        )


def _count(config: Any, name: str, where: Path) -> int:
    value = getattr(config, name, None)
    if type(value) is not int or not 1 <= value < 1 << 31:
        shown = str(value)[:80]
        raise ModelError(f"{where}: {name} {shown} must be a whole number of at least 1")
    return value


def _number(config: Any, name: str, where: Path) -> float:
    """A soft cap: None means none; 0 would divide by 0."""
    value = getattr(config, name, None)
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ModelError(f"{where}: {name} {value!r} must be a positive number")
    return float(value)


def _activation(config: Any, gemma: bool, where: Path) -> str:
    name = config.hidden_activation if gemma else config.hidden_act
    if name not in _ACTIVATIONS:
        raise UnsupportedError(
            f"{where}: activation {name!r} is not supported, only {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]


def _windows(config: Any, architecture: str, where: Path) -> tuple[int, ...]:
    layers = _count(config, "num_hidden_layers", where)
    window = getattr(config, "sliding_window", None)
    if architecture == "llama":
        sliding = [False] * layers
    elif architecture in ("mistral", "phi3"):
        sliding = [window is not None] * layers
    else:
        sliding = [kind == "sliding_attention" for kind in _layer_types(config, where)]
    stated = getattr(config, "layer_types", None)
    if stated is not None and sliding != [kind == "sliding_attention" for kind in stated]:
        raise UnsupportedError(
            f"{where}: Transformers ignores layer_types in {architecture} models, and they "
            "contradict its sliding_window"
        )
    width = _count(config, "sliding_window", where) if any(sliding) else 0
    return tuple(width if slides else 0 for slides in sliding)


def _layer_types(config: Any, where: Path) -> list[str]:
    kinds = list(config.layer_types)
    odd = set(kinds) - {"full_attention", "sliding_attention"}
    if odd:
        raise UnsupportedError(
            f"{where}: layers of type {', '.join(sorted(map(str, odd)))} are not supported"
        )
    if len(kinds) != config.num_hidden_layers:
        raise ModelError(
            f"{where}: layer_types names {len(kinds)} layers of {config.num_hidden_layers}"
        )
    return kinds


def _ropes(
    config: Any, architecture: str, head_dim: int, capacity: int | None, where: Path
) -> tuple[tuple[int, ...], tuple[Rope, ...]]:
    """Which rotary frequencies each layer uses, and all of them."""
    layers = _count(config, "num_hidden_layers", where)
    given = config.rope_parameters
    if architecture != "gemma3":
        return (0,) * layers, (_rope(config, given, architecture, head_dim, capacity, where),)
    kinds = ("full_attention", "sliding_attention")
    ropes = [_rope(config, given.get(k), architecture, head_dim, capacity, where) for k in kinds]
    return tuple(kinds.index(kind) for kind in _layer_types(config, where)), tuple(ropes)


def _rope(
    config: Any,
    parameters: Any,
    architecture: str,
    head_dim: int,
    capacity: int | None,
    where: Path,
) -> Rope:
    if not isinstance(parameters, Mapping) or not isinstance(parameters.get("rope_type"), str):
        raise UnsupportedError(f"{where}: rope_parameters {parameters!r} are not understood")
    share = parameters.get("partial_rotary_factor", 1.0)
    if type(share) not in (int, float) or not 0 < share <= 1:
        raise ModelError(f"{where}: partial_rotary_factor {share!r} must be above 0, at most 1")
    if architecture != "phi3" and share != 1.0:
        raise UnsupportedError(
            f"{where}: partial_rotary_factor {share} is not defined for {architecture}"
        )
    return make_rope(
        parameters,
        int(head_dim * share),
        context=_count(config, "max_position_embeddings", where),
        capacity=capacity,
        where=where,
    )
