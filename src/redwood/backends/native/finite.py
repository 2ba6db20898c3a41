"""Weights that are NaN or infinite are refused by tensor, before any pass: a pass may hide them.

Rounding to 8 bits and a softmax over one token make a number of what is none, so one computed token
does not show every fault of a file.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from redwood.errors import NumericalError
from redwood.models._gguf import BLOCKS

_FLOATS = {"F32": (np.uint32, 0x7F800000), "F16": (np.uint16, 0x7C00), "BF16": (np.uint16, 0x7F80)}
_HALVES = {  # where in a block its scales and minima stand, numbers of 16 bits
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
    **dict.fromkeys(("IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_XXS"), (0,)),
    **dict.fromkeys(("IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_S"), (0,)),
}
_AT_ONCE = 1 << 24  # bytes looked at in one go


def check_weights(name: str, kind: str, raw: NDArray[np.uint8]) -> None:
    """Raises NumericalError where a matrix holds a number or a scale that is NaN or infinite.

    Kinds whose scales are always finite (MXFP4, NVFP4) pass.

    Args:
        raw: uint8 [N], whole blocks, as the file holds them.
    """
    size = BLOCKS[kind][1]
    step = max(1, _AT_ONCE // size) * size
    for first in range(0, len(raw), step):
        if _odd(kind, raw[first : first + step], size):
            raise NumericalError(f"the weights {name} ({kind}) hold NaN or infinite numbers")


def _odd(kind: str, raw: NDArray[np.uint8], size: int) -> bool:
    if kind in _FLOATS:
        dtype, exponent = _FLOATS[kind]
        return bool((np.ascontiguousarray(raw).view(dtype) & exponent == exponent).any())
    blocks = raw.reshape(-1, size)
    if kind == "IQ1_M":  # the upper half of its scale: two nibbles of the last two scales
        high, low = blocks[:, 55], blocks[:, 53]
        return bool(((high & 0x70 == 0x70) & (low & 0xC0 == 0xC0)).any())
    return any(bool((blocks[:, at + 1] & 0x7C == 0x7C).any()) for at in _HALVES.get(kind, ()))
