"""Rotary frequencies of a GGUF file: from its settings, or from tensors of divisors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from redwood.backends.native.families import FAMILIES
from redwood.backends.native.gguf_keys import Keys
from redwood.backends.native.rope import Rope, make_rope, rope_with_factors
from redwood.errors import ModelError, UnsupportedError


def ropes_of(
    keys: Keys, head_dim: int, capacity: int | None, windows: tuple[int, ...]
) -> tuple[Rope, ...]:
    """Returns one set of frequencies, or that of full layers and that of sliding ones.

    Gemma 3 has two, and so has OLMo 3, whose files say olmo2 and windows: its sliding layers are
    not stretched.

    Raises: ModelError and UnsupportedError as `spec_from_gguf`.
    """
    if keys.family == "gemma4":
        return _of_two_sizes(keys, head_dim, capacity)
    _check_yarn(keys)
    dim = keys.count("rope.dimension_count", head_dim)
    keys.refuse_other("rope.dimension_count_swa", dim)
    if dim % 2:
        raise keys.refused("rope.dimension_count", "is not an even number")
    if not FAMILIES[keys.family].partial and dim != head_dim:
        raise keys.refused("rope.dimension_count", f"must be the head size {head_dim} here")
    gemma = keys.architecture in ("gemma3", "gemma3n")
    theta = keys.number("rope.freq_base", None if gemma else 10000.0)
    rope = _factored(keys, theta, dim, capacity) or _scaled(keys, theta, dim, capacity)
    local = keys.number("rope.freq_base_swa", 10000.0 if gemma else theta)
    if not gemma and not (keys.architecture == "olmo2" and any(windows)):
        if local != theta:
            raise keys.refused("rope.freq_base_swa", "is defined for Gemma only")
        return (rope,)
    plain = {"rope_type": "default", "rope_theta": local}
    context = keys.count("context_length")
    where = keys.file.path
    return rope, make_rope(plain, dim, context=context, capacity=capacity, where=where)


def _check_yarn(keys: Keys) -> None:
    """Refuses factors of YaRN other than the usual ones: Transformers takes them from there, and
    llama.cpp, for which files are written, leaves them unread."""
    keys.refuse_other("rope.scaling.yarn_ext_factor", 1.0)
    name = "rope.scaling.yarn_attn_factor"
    if keys.get(name) is None:
        return
    if keys.get("rope.scaling.type") != "yarn" or keys.get("rope.scaling.yarn_log_multiplier"):
        raise keys.refused(name, "is defined for plain YaRN only")
    usual = 1 + 0.1 * math.log(max(1.0, keys.number("rope.scaling.factor", 1.0)))
    if not math.isclose(keys.number(name), usual, rel_tol=1e-5):
        raise keys.refused(name, f"is not supported, only {usual:.6g}")


def _of_two_sizes(keys: Keys, local_dim: int, capacity: int | None) -> tuple[Rope, Rope]:
    """Gemma 4's: full layers have wider heads, of which divisors in a tensor say what turns."""
    full_dim = keys.count("attention.key_length")
    for name, dim in (("rope.dimension_count", full_dim), ("rope.dimension_count_swa", local_dim)):
        if keys.count(name, dim) != dim or dim % 2:
            raise keys.refused(name, f"must be the head size {dim} here, an even number")
    rope = _factored(keys, keys.number("rope.freq_base"), full_dim, capacity)
    if rope is None:
        raise ModelError(f"{keys.file.path} lacks the tensor rope_freqs.weight")
    plain = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa", 10000.0)}
    context, where = keys.count("context_length"), keys.file.path
    local = make_rope(plain, local_dim, context=context, capacity=capacity, where=where)
    return rope, local


def _scaled(keys: Keys, theta: float, dim: int, capacity: int | None) -> Rope:
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
        # gpt-oss was trained without rounding; llama.cpp rounds, and no key says either.
        parameters["truncate"] = keys.family != "gptoss"
        trained = keys.number("rope.scaling.original_context_length", context)
        parameters["original_max_position_embeddings"] = trained
        parameters["beta_fast"] = keys.number("rope.scaling.yarn_beta_fast", 32.0)
        parameters["beta_slow"] = keys.number("rope.scaling.yarn_beta_slow", 1.0)
        if keys.get("rope.scaling.yarn_log_multiplier"):
            # mscale and mscale_all_dim are the same in DeepSeek's: all is in attention's scale.
            parameters["attention_factor"] = 1.0
    return make_rope(parameters, dim, context=context, capacity=capacity, where=keys.file.path)


def _factored(keys: Keys, theta: float, dim: int, capacity: int | None) -> Rope | None:
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


def _factors(keys: Keys, name: str, dim: int) -> np.ndarray[Any, Any]:
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
