"""DecoderSpec of a folder as Transformers saves it, from its config.json.

Transformers fills in the defaults, since those are what its own model would compute with.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from redwood.backends.native.config_fields import Fields
from redwood.backends.native.families import (
    FAMILIES,
    GEMMA,
    LATENT,
    Family,
    by_model_type,
    model_types,
)
from redwood.backends.native.rope import Rope, float32, make_rope
from redwood.backends.native.spec import LANES, MOST_LAYERS, DecoderSpec
from redwood.backends.native.spec_checks import check_capacity, check_spec
from redwood.backends.native.spec_experts import experts_of, unread_layers
from redwood.backends.native.spec_gemma import layers_of
from redwood.backends.native.spec_latent import latent_of
from redwood.backends.native.spec_mamba import ENDLESS, halves_of, multipliers_of, scales_of
from redwood.backends.native.spec_recurrent import ffn_of, recurrent_of
from redwood.errors import ModelError, UnsupportedError

_WINDOWLESS = ("qwen3_vl_text", "qwen3_vl_moe_text")
"""Text parts that know no windows, of families that do."""
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "relu2": "relu2"}


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
    architecture = by_model_type(config.model_type)
    if architecture is None:
        raise _unsupported(config.model_type, where)
    family, tied = FAMILIES[architecture], bool(config.tie_word_embeddings)
    if config.model_type == family.images[0]:
        config = config.text_config
    fields = Fields(config, where)
    _refuse_switches(fields, family)
    hidden, attends = fields.count("hidden_size"), architecture != "mamba2"
    heads = fields.count("num_attention_heads") if attends else 1
    head_dim = hidden // heads if attends else LANES
    if attends and fields.get("head_dim") is not None:
        head_dim = fields.count("head_dim")
    latent = latent_of(fields) if architecture in LATENT else None
    if latent is not None:
        head_dim = latent.head_dim
    gemma = architecture in GEMMA
    biased = family.bias == "always" or (bool(family.bias) and fields.flag(family.bias))
    scalar = fields.get("query_pre_attn_scalar") if gemma else head_dim
    layers: dict[str, Any] = {}
    if family.traits.get("value_norm"):  # queries and keys are normed; no scale
        scalar, layers = 1.0, layers_of(fields, head_dim)
    windows = _windows(fields, family)
    turning = latent.turning if latent else head_dim
    dims = layers.get("head_dims") or (turning,) * len(windows)
    rope_of_layer, ropes = _ropes(fields, architecture, dims, windows, capacity)
    softcap = fields.softcap("attn_logit_softcapping") if architecture == "gemma2" else 0
    traits: dict[str, Any] = {"qk_norm": False, "post_norms": False, **family.traits}
    experts, halves = experts_of(fields, family), halves_of(fields)
    if architecture == "glm4moe":
        traits["qk_norm"] = fields.flag("use_qk_norm")
    if architecture == "gptoss":
        for field, name in (("glu_limit", "swiglu_limit"), ("glu_alpha", "swiglu_alpha")):
            # Older classes of Transformers have them as constants.
            stated = fields.get(name) is not None
            traits[field] = float32(fields.number(name) if stated else family.gguf_traits[field])
    values: dict[str, Any] = dict(
        architecture=architecture,
        vocab_size=fields.count("vocab_size"),
        hidden=hidden,
        layers=fields.count("num_hidden_layers"),
        heads=heads,
        kv_heads=fields.count("num_key_value_heads") if attends else 1,
        head_dim=head_dim,
        ffn=_ffn(fields, family, halves, layers),
        context=fields.count("max_position_embeddings") if attends else ENDLESS,
        norm_eps=float32(fields.get(family.eps)),
        activation=family.activation or _activation(fields, architecture),
        attention_scale=float32(
            (latent.scale if latent else 1.0) / math.sqrt(scalar) if scalar > 0 else 0
        ),
        attention_softcap=float32(softcap),
        logit_softcap=float32(fields.softcap("final_logit_softcapping") if gemma else 0),
        embedding_scale=float32(math.sqrt(hidden)) if gemma else 1.0,
        windows=windows,
        rope_of_layer=rope_of_layer,
        ropes=ropes,
        tied=tied,
        attention_bias=biased,
        output_bias=biased and family.output_bias,
        logit_scale=float32(fields.number("logit_scale") if traits.get("parallel") else 1.0),
        mlp_bias=bool(family.mlp_bias) and fields.flag(family.mlp_bias),
        experts=experts,
        recurrent=recurrent_of(fields, family),
        latent=latent.width if latent else 0,
        value_dim=latent.value_dim if latent else 0,
        query_latent=latent.query_width if latent else 0,
        unread_layers=unread_layers(fields) if family.experts == "deepseek" else 0,
        halves=halves,
        multipliers=multipliers_of(fields),
        **layers,
        **traits,
    )
    spec = DecoderSpec(**(values | scales_of(fields, head_dim)))
    fields.refuse_unread()
    return check_spec(spec, where)


def _ffn(fields: Fields, family: Family, halves: tuple[str, ...], layers: Mapping[str, Any]) -> int:
    if set(halves) == {"mixer"}:
        return 0
    return max(layers["ffns"]) if layers else ffn_of(fields, family)


def _unsupported(model_type: object, where: Path) -> UnsupportedError:
    known = ", ".join(model_types())
    return UnsupportedError(f"{where}: model type {model_type!r} is not supported, only {known}")


def _refuse_fields(fields: Mapping[str, Any], path: Path) -> None:
    """What can be refused before Transformers is imported."""
    kind = fields.get("model_type")
    family = by_model_type(kind) if isinstance(kind, str) else None
    if family is None:
        raise _unsupported(kind, path)
    images = FAMILIES[family].images
    expected = images[1] if kind == images[0] else FAMILIES[family].model_class
    classes = fields.get("architectures") or [expected]
    if not isinstance(classes, list) or expected not in classes:
        raise UnsupportedError(f"{path}: the model is {classes}, not {expected}")
    text = fields.get("text_config") if kind == images[0] else None
    for part in (fields, text if isinstance(text, dict) else {}):
        layers = part.get("num_hidden_layers", 1)
        if type(layers) is not int or not 1 <= layers <= MOST_LAYERS:
            raise ModelError(f"{path}: num_hidden_layers {str(layers)[:80]} cannot be right")
    quantised = fields.get("quantization_config")
    method = quantised.get("quant_method") if isinstance(quantised, dict) else None
    if quantised and not (family == "gptoss" and method == "mxfp4"):
        raise UnsupportedError(
            f"{path}: the weights are quantized in a format of their own (quantization_config); "
            "use a GGUF file or the full weights"
        )


def _refuse_switches(fields: Fields, family: Family) -> None:
    where, kind = fields.where, fields.get("model_type")
    if not family.mlp_bias and fields.get("mlp_bias"):
        raise UnsupportedError(f"{where}: biases in the MLP (mlp_bias) are not supported")
    # "vision": of images alone, which are not read.
    if fields.get("use_bidirectional_attention") not in (None, False, "vision"):
        raise UnsupportedError(f"{where}: bidirectional attention is not supported")
    # No class has it as a default, and every mask asks for it.
    if not fields.get("is_causal", True):
        raise UnsupportedError(f"{where}: is_causal {fields.get('is_causal')} is not supported")
    if kind == "gemma3_text" and fields.get("attn_logit_softcapping") is not None:
        raise UnsupportedError(
            f"{where}: attn_logit_softcapping {fields.get('attn_logit_softcapping')} is not "
            "defined for Gemma 3"
        )
    for name in ("clip_qkv", "use_qk_norm"):
        if fields.get(name) and (name, kind) != ("use_qk_norm", "glm4_moe"):
            raise UnsupportedError(f"{where}: {name} {fields.get(name)} is not supported")


def _activation(fields: Fields, architecture: str) -> str:
    settings = {"nemotronh": "mlp_hidden_act", **dict.fromkeys(GEMMA, "hidden_activation")}
    name = fields.get(settings.get(architecture, "hidden_act"))
    known = [a for a in _ACTIVATIONS if a != "relu2" or architecture == "nemotronh"]
    if architecture == "gptoss":  # its clamped SwiGLU is no setting
        known = ["silu", "swish"]
    if name not in known:
        raise UnsupportedError(
            f"{fields.where}: activation {str(name)[:80]!r} is not supported, only "
            f"{', '.join(known)}"
        )
    return _ACTIVATIONS[name]


def _windows(fields: Fields, family: Family) -> tuple[int, ...]:
    layers = fields.count("num_hidden_layers")
    window, stated = fields.get("sliding_window"), fields.get("layer_types")
    if family.windows == "none":
        sliding = [False] * layers
    elif fields.get("model_type") in _WINDOWLESS:
        sliding = [False] * layers
        if window is not None:
            raise UnsupportedError(
                f"{fields.where}: sliding_window {str(window)[:80]} is not defined for "
                f"{fields.get('model_type')}"
            )
    elif family.windows == "all":
        sliding = [window is not None] * layers
    else:
        sliding = [kind == "sliding_attention" for kind in _layer_types(fields)]
        if family.window_switch and not fields.flag(family.window_switch) and any(sliding):
            raise UnsupportedError(
                f"{fields.where}: layer_types name sliding layers, and {family.window_switch} none"
            )
    if stated is not None and sliding != [kind == "sliding_attention" for kind in stated]:
        raise UnsupportedError(
            f"{fields.where}: Transformers ignores layer_types in "
            f"{fields.get('model_type')} models, and they contradict its sliding_window"
        )
    width = fields.count("sliding_window") if any(sliding) else 0
    return tuple(width if slides else 0 for slides in sliding)


def _layer_types(fields: Fields) -> list[str]:
    kinds, where = list(fields.get("layer_types")), fields.where
    odd = set(map(str, kinds)) - {"full_attention", "sliding_attention"}
    if odd:
        raise UnsupportedError(
            f"{where}: layers of type {', '.join(sorted(odd))} are not supported"
        )
    layers = fields.count("num_hidden_layers")
    if len(kinds) != layers:
        raise ModelError(f"{where}: layer_types names {len(kinds)} layers of {layers}")
    return kinds


def _ropes(
    fields: Fields,
    architecture: str,
    dims: tuple[int, ...],
    windows: tuple[int, ...],
    capacity: int | None,
) -> tuple[tuple[int, ...], tuple[Rope, ...]]:
    """Which rotary frequencies each layer uses, and all of them; `dims`: of each layer's heads."""
    given, family = fields.get("rope_parameters"), FAMILIES[architecture]
    if family.positionless == "all" or _says_none(fields, family):
        return (-1,) * len(windows), ()
    kinds = ("full_attention", "sliding_attention")
    if architecture in ("gemma3", "olmo3") or family.traits.get("value_norm"):
        stated = _layer_types(fields)
        of = {kind: dim for kind, dim in zip(stated, dims, strict=True)}
        for kind in kinds:
            if isinstance(given.get(kind), Mapping) and not given[kind].get("truncate", True):
                raise UnsupportedError(
                    f"{fields.where}: rope_parameters of {kind}: truncate "
                    f"{given[kind]['truncate']} is not supported: Transformers leaves it unread"
                )
        ropes = [
            _rope(fields, given.get(kind), family, of.get(kind, dims[0]), capacity)
            for kind in kinds
        ]
        return tuple(kinds.index(kind) for kind in stated), tuple(ropes)
    rope = _rope(fields, given, family, dims[0], capacity)
    return _positions(fields, family, windows), (rope,)


def _says_none(fields: Fields, family: Family) -> bool:
    """Whether a setting says that no layer has positions."""
    if not family.positionless.endswith("_type"):
        return False
    stated = fields.get(family.positionless)
    if stated not in (None, "nope", "rope"):
        raise UnsupportedError(
            f"{fields.where}: {family.positionless} {str(stated)[:80]!r} is not supported here"
        )
    return bool(stated != "rope")


def _positions(fields: Fields, family: Family, windows: tuple[int, ...]) -> tuple[int, ...]:
    """0 for layers with rotary positions, -1 for those without."""
    if not family.positionless or family.positionless.endswith("_type"):
        return (0,) * len(windows)
    if family.positionless == "full_attention":
        # EXAONE 4 without any window has positions in all layers; Cohere 2 in none.
        if family.model_type == "exaone4" and fields.get("sliding_window") is None:
            return (0,) * len(windows)
        return tuple(0 if window else -1 for window in windows)
    listed = fields.get(family.positionless)
    fields.get("no_rope_layer_interval")  # what made the list, where none was given
    if not isinstance(listed, list) or len(listed) != len(windows):
        raise ModelError(
            f"{fields.where}: {family.positionless} {str(listed)[:80]} does not fit "
            f"{len(windows)} layers"
        )
    return tuple(0 if turns else -1 for turns in listed)


def _rope(
    fields: Fields, parameters: Any, family: Family, head_dim: int, capacity: int | None
) -> Rope:
    where = fields.where
    if not isinstance(parameters, Mapping) or not isinstance(parameters.get("rope_type"), str):
        raise UnsupportedError(f"{where}: rope_parameters {parameters!r} are not understood")
    share = parameters.get("partial_rotary_factor", 1.0)
    if type(share) not in (int, float) or not 0 < share <= 1:
        raise ModelError(f"{where}: partial_rotary_factor {share!r} must be above 0, at most 1")
    if family.traits.get("value_norm") and parameters["rope_type"] == "proportional":
        share = 1.0  # of the components, all of which it has a frequency for
    if not family.partial and share != 1.0:
        raise UnsupportedError(
            f"{where}: partial_rotary_factor {share} is not defined for {family.model_type}"
        )
    if family.images[0]:  # of a text all three positions are the same
        parameters = {k: v for k, v in parameters.items() if not k.startswith("mrope")}
    return make_rope(
        parameters,
        int(head_dim * share),
        context=fields.count("max_position_embeddings"),
        capacity=capacity,
        where=where,
    )
