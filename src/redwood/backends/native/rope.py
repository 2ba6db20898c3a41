"""Rotary frequencies from a model's parameters, the same on every processor."""

from __future__ import annotations

import decimal
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from redwood.errors import ModelError, UnsupportedError

MOST_HEAD_DIM = 65536
"""Far above any model: what is made per component stays small for damaged files."""

_DIGITS = decimal.Context(prec=40, Emax=decimal.MAX_EMAX, Emin=decimal.MIN_EMIN, traps=[])
"""Logarithms and powers are those of decimal numbers, rounded once: a processor's libraries differ
in the last bit, and rotary frequencies with them."""

_Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Rope:
    """Rotary positions in half-split order: component i turns with component i + rotary_dim / 2.

    Attributes:
        inv_freq: [rotary_dim / 2] float32 values, radians per position; components of a head past
            rotary_dim are left as they are.
        attention_factor: multiplies cosine and sine.
    """

    inv_freq: tuple[float, ...]
    attention_factor: float = 1.0

    @property
    def rotary_dim(self) -> int:
        """Components of a head that turn."""
        return 2 * len(self.inv_freq)


def float32(value: float) -> float:
    """Returns the nearest float32; files differ in how they round, decoders do not."""
    with np.errstate(over="ignore"):
        return float(np.float32(value))


def make_rope(
    parameters: Mapping[str, Any],
    rotary_dim: int,
    *,
    context: int,
    capacity: int | None,
    where: Path,
) -> Rope:
    """Returns rotary frequencies for parameters as Transformers names them.

    Source: the formulas are those of transformers.modeling_rope_utils, version 5.23, and so is the
    order of the float32 operations. Powers are exact before they are rounded to float32; those of
    PyTorch may be off by one unit in the last place, elsewhere on each processor.

    Args:
        parameters: "rope_type" default, proportional, linear, llama3, yarn or longrope;
            "rope_theta"; and what the type needs.
        rotary_dim: components of a head that turn.
        context: max_position_embeddings.
        capacity: positions that will be used; None: `context`. longrope has one set of
            frequencies up to original_max_position_embeddings and another for more; Transformers
            changes over when a text grows beyond it, which changes what was said before. Here the
            capacity decides, once.

    Raises:
        ModelError: a parameter that is missing or makes no sense.
        UnsupportedError: another type, with the reason.
    """
    kind = parameters.get("rope_type", "default")
    if kind == "dynamic" and (capacity or context) > context:
        raise UnsupportedError(
            f"{where}: dynamic NTK rotary positions change with the length of a text past "
            f"{context} positions, so that earlier logits would not stay what they were"
        )
    if kind not in _SCALINGS:
        raise UnsupportedError(
            f"{where}: rotary positions of type {kind!r} are not supported, only "
            f"{', '.join(_SCALINGS)}"
        )
    if "mrope_section" in parameters:
        raise UnsupportedError(f"{where}: multimodal rotary positions are not supported")
    if rotary_dim < 2 or rotary_dim % 2 or rotary_dim > MOST_HEAD_DIM:
        raise UnsupportedError(
            f"{where}: rotary positions of {rotary_dim} components; an even number is supported, "
            f"at most {MOST_HEAD_DIM}"
        )
    try:
        theta = _positive(parameters, "rope_theta")
        with np.errstate(all="ignore"):  # what is not finite is refused by `check_spec`
            inv_freq, factor = _SCALINGS[kind](
                parameters, theta, rotary_dim, (context, capacity or context)
            )
    except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise ModelError(
            f"{where}: the rotary parameters of type {kind} are incomplete or wrong ({error})"
        ) from error
    return Rope(tuple(inv_freq.tolist()), float32(factor))


def rope_with_factors(
    theta: float, factors: Sequence[float] | np.ndarray[Any, Any], attention_factor: float
) -> Rope:
    """Returns default frequencies divided by factors [rotary_dim / 2], as GGUF files store them."""
    divisors = np.asarray(factors, np.float32)
    with np.errstate(all="ignore"):
        inv_freq = 1.0 / (divisors * _waves(theta, 2 * len(divisors)))
    return Rope(tuple(inv_freq.tolist()), float32(attention_factor))


def _positive(parameters: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = parameters.get(name)
    if value is None:
        value = default
    if value is None:
        raise KeyError(name)
    if isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"{name} {value!r} must be positive")
    return float(value)


def _waves(theta: float, dim: int) -> _Floats:
    """The powers theta ** (0, 2 / dim, 4 / dim ...), float32 [dim / 2]."""
    base = _DIGITS.ln(decimal.Decimal(float32(theta)))
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    powers = [
        float(_DIGITS.exp(_DIGITS.multiply(base, decimal.Decimal(exponent))))
        for exponent in exponents.tolist()
    ]
    return np.array(powers).astype(np.float32)


def _log(value: float) -> float:
    return float(_DIGITS.ln(decimal.Decimal(value)))


def _default(theta: float, dim: int) -> _Floats:
    return 1.0 / _waves(theta, dim)


def _plain(
    parameters: Mapping[str, Any], theta: float, dim: int, lengths: tuple[int, int]
) -> tuple[_Floats, float]:
    return _default(theta, dim), 1.0


def _dynamic(
    parameters: Mapping[str, Any], theta: float, dim: int, lengths: tuple[int, int]
) -> tuple[_Floats, float]:
    """Up to max_position_embeddings, where it stretches nothing."""
    factor = _positive(parameters, "factor")
    return _default(theta * (factor - (factor - 1)) ** (dim / (dim - 2)), dim), 1.0


def _linear(
    parameters: Mapping[str, Any], theta: float, dim: int, lengths: tuple[int, int]
) -> tuple[_Floats, float]:
    return _default(theta, dim) / _positive(parameters, "factor"), 1.0


def _llama3(
    parameters: Mapping[str, Any], theta: float, dim: int, lengths: tuple[int, int]
) -> tuple[_Floats, float]:
    """Long waves are stretched, short ones kept, those between are mixed."""
    factor = _positive(parameters, "factor")
    low = _positive(parameters, "low_freq_factor")
    high = _positive(parameters, "high_freq_factor")
    trained = _positive(parameters, "original_max_position_embeddings", lengths[0])
    inv_freq = _default(theta, dim)
    waves = 1.0 / inv_freq * (2 * math.pi)  # as PyTorch divides a number by a tensor
    stretched = np.where(waves > trained / low, inv_freq / factor, inv_freq)
    share = (1.0 / waves * trained - low) / (high - low)
    mixed = (1 - share) * stretched / factor + share * stretched
    between = ~(waves < trained / high) & ~(waves > trained / low)
    return np.where(between, mixed, stretched), 1.0


def _yarn(
    parameters: Mapping[str, Any], theta: float, dim: int, lengths: tuple[int, int]
) -> tuple[_Floats, float]:
    """Source: arXiv 2309.00071: interpolates slow components, keeps fast ones, ramps between."""
    factor = _positive(parameters, "factor")
    trained = _positive(parameters, "original_max_position_embeddings", lengths[0])
    fast = _positive(parameters, "beta_fast", 32)
    slow = _positive(parameters, "beta_slow", 1)

    def component(turns: float) -> float:
        return dim * _log(trained / (turns * 2 * math.pi)) / (2 * _log(theta))

    low, high = component(fast), component(slow)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    waves = _waves(theta, dim)
    kept = 1 - ramp
    inv_freq = 1.0 / (factor * waves) * (1 - kept) + 1.0 / waves * kept
    return inv_freq, _yarn_attention_factor(parameters, factor)


def _yarn_attention_factor(parameters: Mapping[str, Any], factor: float) -> float:
    given = parameters.get("attention_factor")
    if given is not None:
        return float(given)

    def scale(multiplier: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * multiplier * _log(factor) + 1.0

    mscale, mscale_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return scale(mscale) / scale(mscale_all) if mscale and mscale_all else scale(1)


def _longrope(
    parameters: Mapping[str, Any], theta: float, dim: int, lengths: tuple[int, int]
) -> tuple[_Floats, float]:
    context, capacity = lengths
    trained = _positive(parameters, "original_max_position_embeddings", context)
    name = "long_factor" if capacity > trained else "short_factor"
    divisors = np.array(parameters[name], dtype=np.float32)
    if divisors.shape != (dim // 2,) or not bool((divisors > 0).all()):
        raise ValueError(f"{name} must be {dim // 2} positive numbers")
    given = parameters.get("attention_factor")
    factor = _positive(parameters, "factor", context / trained)
    if given is None:
        given = math.sqrt(1 + _log(factor) / _log(trained)) if factor > 1 else 1.0
    return 1.0 / (divisors * _waves(theta, dim)), float(given)


def _proportional(
    parameters: Mapping[str, Any], theta: float, dim: int, lengths: tuple[int, int]
) -> tuple[_Floats, float]:
    """A share of the pairs turns, as slowly as in a head where all do; the others stand still."""
    share = parameters.get("partial_rotary_factor", 1.0)
    inv_freq = _default(theta, dim) / np.float32(_positive(parameters, "factor", 1.0))
    inv_freq[int(share * dim // 2) :] = 0
    return inv_freq, 1.0


_SCALINGS = {
    "default": _plain,
    "dynamic": _dynamic,
    "proportional": _proportional,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
