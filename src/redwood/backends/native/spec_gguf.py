"""DecoderSpec of a GGUF file.

What a file leaves out is what llama.cpp assumes: most files were written for it. A setting that is
not known here is refused, since it may change what the model computes.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

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
    rope_with_factors,
)
from redwood.errors import ModelError, UnsupportedError
from redwood.models._gguf import GGUFFile
from redwood.models._gguf_parts import GGUFModel

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")
"""Mistral models call themselves llama in GGUF files."""

_KNOWN = {
    *("vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length"),
    *("expert_count", "expert_used_count", "tensor_data_layout"),
    *("attn_logit_softcapping", "final_logit_softcapping"),
    *(f"attention.{name}" for name in ("head_count", "head_count_kv", "key_length")),
    *(f"attention.{name}" for name in ("value_length", "key_length_swa", "value_length_swa")),
    *(f"attention.{name}" for name in ("layer_norm_rms_epsilon", "scale", "causal")),
    *("attention.sliding_window", "attention.sliding_window_pattern"),
    *("rope.dimension_count", "rope.dimension_count_swa", "rope.freq_base", "rope.freq_base_swa"),
    *("rope.scale_linear", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.finetuned"),
    *("rope.scaling.original_context_length", "rope.scaling.attn_factor"),
    *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
}
_BIGGEST = {"gemma2": 46, "gemma3": 62}
"""Layers of the 27B models: their query scale is hidden / heads, which no key says."""


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
    keys = _Keys(file)
    keys.refuse()
    arch, gemma = keys.architecture, keys.architecture in GEMMA
    layers, heads = keys.count("block_count"), keys.count("attention.head_count")
    if layers > MOST_LAYERS:
        raise keys.fault("block_count", f"{layers} cannot be right")
    hidden = keys.count("embedding_length")
    head_dim = keys.count("attention.key_length", hidden // heads)
    for name in ("value_length", "key_length_swa", "value_length_swa"):
        keys.refuse_other(f"attention.{name}", head_dim)
    windows = _windows(keys, layers)
    ropes = _ropes(keys, head_dim, capacity)
    spec = DecoderSpec(
        architecture=arch,
        vocab_size=_vocab_size(file),
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=keys.count("attention.head_count_kv", heads),
        head_dim=head_dim,
        ffn=keys.count("feed_forward_length"),
        context=keys.count("context_length"),
        norm_eps=float32(keys.number("attention.layer_norm_rms_epsilon")),
        activation="gelu_tanh" if gemma else "silu",
        attention_scale=float32(_attention_scale(keys, hidden, heads, head_dim, layers)),
        attention_softcap=float32(
            keys.number("attn_logit_softcapping", 50.0) if arch == "gemma2" else 0
        ),
        logit_softcap=float32(
            keys.number("final_logit_softcapping", 30.0 if arch == "gemma2" else 0.0)
        ),
        embedding_scale=float32(math.sqrt(hidden)) if gemma else 1.0,
        windows=windows,
        rope_of_layer=tuple(int(bool(window)) for window in windows)
        if len(ropes) > 1
        else (0,) * layers,
        ropes=ropes,
        tied="output.weight" not in file.tensors,
        attention_bias=arch == "qwen2" or "blk.0.attn_q.bias" in file.tensors,
        output_bias="blk.0.attn_output.bias" in file.tensors,
        qk_norm=arch in QK_NORM,
        post_norms=gemma,
    )
    return check_spec(spec, file.path)


class _Keys:
    """The settings of one architecture, by their names without its prefix."""

    def __init__(self, file: GGUFFile | GGUFModel) -> None:
        self.file = file
        architecture = file.metadata.get("general.architecture")
        if not isinstance(architecture, str):
            raise ModelError(f"{file.path} does not say its general.architecture")
        if architecture not in ARCHITECTURES:
            raise UnsupportedError(
                f"{file.path}: architecture {architecture!r} is not supported, only "
                f"{', '.join(ARCHITECTURES)}"
            )
        self.architecture = architecture

    def get(self, name: str) -> Any:
        """Returns a setting or None."""
        return self.file.metadata.get(f"{self.architecture}.{name}")

    def fault(self, name: str, fault: str) -> ModelError:
        """Returns an error that names the key."""
        return ModelError(f"{self.file.path}: {self.architecture}.{name} {fault}")

    def refused(self, name: str, reason: str) -> UnsupportedError:
        """Returns an error that names the key and its value."""
        value = str(self.get(name))[:80]
        return UnsupportedError(f"{self.file.path}: {self.architecture}.{name} {value} {reason}")

    def count(self, name: str, default: int | None = None) -> int:
        """Returns a whole number of at least 1; a list must repeat one number."""
        value = self.get(name)
        if isinstance(value, list) and value:
            if len(set(value)) > 1:
                raise self.refused(name, "differs between layers, which is not supported")
            value = value[0]
        if value is None:
            value = default
        if value is None:
            raise self.fault(name, "is missing")
        if type(value) is not int or not 1 <= value < 1 << 31:
            raise self.fault(name, f"{value!r} must be a whole number of at least 1")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """Returns a finite number."""
        value = self.get(name)
        if value is None:
            value = default
        if value is None:
            raise self.fault(name, "is missing")
        if type(value) not in (int, float) or not math.isfinite(value):
            raise self.fault(name, f"{value!r} must be a finite number")
        return float(value)

    def refuse_other(self, name: str, expected: object) -> None:
        """Raises UnsupportedError if a key is there and says something else."""
        if self.get(name) not in (None, expected):
            raise self.refused(name, f"is not supported, only {expected}")

    def refuse(self) -> None:
        """Raises UnsupportedError for whatever this decoder would have to leave out."""
        metadata, prefix = self.file.metadata, f"{self.architecture}."
        if metadata.get("general.type") not in (None, "", "model"):
            raise UnsupportedError(f"{self.file.path} is a {metadata['general.type']}, no model")
        for key in metadata:
            if key.startswith(prefix) and key.removeprefix(prefix) not in _KNOWN:
                raise UnsupportedError(f"{self.file.path}: the setting {key} is not supported")
        if self.get("expert_count"):
            raise self.refused("expert_count", "says mixture of experts, which is not supported")
        self.refuse_other("attention.causal", True)
        if self.architecture != "gemma2" and self.get("attn_logit_softcapping"):
            raise self.refused("attn_logit_softcapping", "is defined for gemma2 only")
        if self.architecture not in GEMMA and self.get("final_logit_softcapping"):
            raise self.refused("final_logit_softcapping", "is defined for Gemma only")


def _vocab_size(file: GGUFFile | GGUFModel) -> int:
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelError(f"{file.path} has no matrix token_embd.weight")
    return embedding.shape[0]


def _attention_scale(keys: _Keys, hidden: int, heads: int, head_dim: int, layers: int) -> float:
    given = keys.number("attention.scale", 0.0)
    if given:
        return given
    if _BIGGEST.get(keys.architecture) == layers:
        return 1 / math.sqrt(hidden // heads)
    return 1 / math.sqrt(head_dim)


def _windows(keys: _Keys, layers: int) -> tuple[int, ...]:
    """Windows per layer, 0 for full attention."""
    gemma2 = keys.architecture == "gemma2"
    window = keys.get("attention.sliding_window")
    window = (4096 if gemma2 else 0) if window is None else window
    if type(window) is not int or window < 0:
        raise keys.fault("attention.sliding_window", f"{window!r} must be a whole number")
    default = {"gemma2": 2, "gemma3": 6, "phi3": 0}.get(keys.architecture)
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


def _ropes(keys: _Keys, head_dim: int, capacity: int | None) -> tuple[Rope, ...]:
    """One set of frequencies, or for Gemma 3 that of full and that of sliding layers."""
    dim = keys.count("rope.dimension_count", head_dim)
    keys.refuse_other("rope.dimension_count_swa", dim)
    if dim % 2:
        raise keys.refused("rope.dimension_count", "is not an even number")
    if keys.architecture == "llama" and dim != head_dim:
        raise keys.refused("rope.dimension_count", f"must be the head size {head_dim} here")
    theta = keys.number("rope.freq_base", None if keys.architecture == "gemma3" else 10000.0)
    rope = _factored(keys, theta, dim, capacity) or _scaled(keys, theta, dim, capacity)
    local = keys.number("rope.freq_base_swa", 10000.0 if keys.architecture == "gemma3" else theta)
    if keys.architecture != "gemma3":
        if local != theta:
            raise keys.refused("rope.freq_base_swa", "is defined for gemma3 only")
        return (rope,)
    plain = {"rope_type": "default", "rope_theta": local}
    context = keys.count("context_length")
    where = keys.file.path
    return rope, make_rope(plain, dim, context=context, capacity=capacity, where=where)


def _scaled(keys: _Keys, theta: float, dim: int, capacity: int | None) -> Rope:
    """Frequencies from keys alone."""
    context = keys.count("context_length")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 0.0)) or 1.0
    kind = keys.get("rope.scaling.type")
    if kind is None:
        kind = "linear"
    if kind not in ("none", "linear", "yarn"):
        raise keys.refused("rope.scaling.type", "is not supported here, only none, linear, yarn")
    if keys.number("rope.scaling.attn_factor", 1.0) != 1.0:
        raise keys.refused("rope.scaling.attn_factor", f"is not supported with scaling {kind}")
    parameters = {
        "rope_type": "default" if kind == "none" or factor == 1.0 else kind,
        "rope_theta": theta,
        "factor": factor,
    }
    if kind == "yarn":
        trained = keys.number("rope.scaling.original_context_length", context)
        parameters["original_max_position_embeddings"] = trained
        parameters["beta_fast"] = keys.number("rope.scaling.yarn_beta_fast", 32.0)
        parameters["beta_slow"] = keys.number("rope.scaling.yarn_beta_slow", 1.0)
    return make_rope(parameters, dim, context=context, capacity=capacity, where=keys.file.path)


def _factored(keys: _Keys, theta: float, dim: int, capacity: int | None) -> Rope | None:
    """Frequencies from tensors of divisors: Llama 3's one, or Phi-3's short and long ones."""
    tensors = keys.file.tensors
    long_or_short = {"rope_factors_long.weight", "rope_factors_short.weight"} & set(tensors)
    if not long_or_short and "rope_freqs.weight" not in tensors:
        if keys.get("rope.scaling.type") == "longrope":
            raise ModelError(f"{keys.file.path} lacks the tensor rope_factors_short.weight")
        return None
    if "rope_freqs.weight" in tensors and long_or_short:
        raise UnsupportedError(f"{keys.file.path} has rope_freqs and rope_factors tensors")
    allowed = ("none", "longrope") if long_or_short else ("none",)
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 0.0))
    if keys.get("rope.scaling.type") not in (None, *allowed) or (
        factor not in (0.0, 1.0) and not long_or_short
    ):
        raise keys.refused("rope.scaling.type", "and factor tensors together are not supported")
    attention_factor, name = 1.0, "rope_freqs.weight"
    if long_or_short:
        context = keys.count("context_length")
        trained = keys.count("rope.scaling.original_context_length", context)
        attention_factor = keys.number("rope.scaling.attn_factor", 1.0)
        longer = (capacity or context) > trained
        name = f"rope_factors_{'long' if longer else 'short'}.weight"
    elif keys.number("rope.scaling.attn_factor", 1.0) != 1.0:
        raise keys.refused("rope.scaling.attn_factor", "is not supported with rope_freqs")
    return rope_with_factors(theta, _factors(keys, name, dim), attention_factor)


def _factors(keys: _Keys, name: str, dim: int) -> np.ndarray[Any, Any]:
    tensor = keys.file.tensors.get(name)
    if tensor is None:
        raise ModelError(f"{keys.file.path} lacks the tensor {name}")
    if tensor.kind != "F32" or tensor.shape != (dim // 2,):
        raise ModelError(
            f"{keys.file.path}: the tensor {name} is {tensor.kind} {tensor.shape} instead of F32 "
            f"({dim // 2},)"
        )
    factors = np.frombuffer(keys.file.data(name).tobytes(), np.float32)
    if not bool((factors > 0).all()):
        raise ModelError(f"{keys.file.path}: the tensor {name} must be positive")
    return factors
