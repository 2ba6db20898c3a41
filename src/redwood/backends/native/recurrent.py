"""Where the weights of recurrent layers lie in a file's tensors, and those of gated attention."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from redwood.backends.native.roles import Shape
from redwood.backends.native.safetensors_file import Stored
from redwood.backends.native.spec import DecoderSpec, Recurrent
from redwood.backends.native.stacked import Places, chunks, tensor_of


def special_places(
    where: Path,
    spec: DecoderSpec,
    stored: Mapping[str, Stored],
    name: str,
    role: str,
    shape: Shape,
    grouped: bool,
) -> Places | None:
    """Returns where a role lies that is no tensor of its own, or a tensor of another shape.

    Args:
        name: the tensor that holds it.
        grouped: `name` stacks what belongs to one key head, head by head (Qwen3-Next's folders and
            what decays and writes in its GGUF files).

    Returns: None for roles that `chunks` finds.

    Raises: as `chunks`.
    """
    recurrent = spec.recurrent
    if spec.attention_gate and role in ("q", "o_gate"):
        order = _rows(spec.heads, [spec.head_dim, spec.head_dim], int(role == "o_gate"))
        return _some(where, stored, name, shape, order, 2 * shape.rows)
    if recurrent is None:
        return None
    if role == "conv":
        sizes = (recurrent.channels, recurrent.width)
        flat = name in stored and stored[name].shape == sizes  # as GGUF files hold it
        tensor = tensor_of(where, stored, name, sizes if flat else (sizes[0], 1, sizes[1]))
        return Places((name,), tensor.kind, tensor.load)
    if recurrent.kind == "mamba" and role in ("decay", "skip", "state_norm"):
        parts = recurrent.key_heads  # GGUF files hold a row of each head or group
        sizes = (parts, shape.cols // parts) if role == "state_norm" else (shape.cols, 1)
        if name in stored and stored[name].shape == sizes:
            return Places((name,), stored[name].kind, stored[name].load)
        return None
    apart = name.endswith(("attn_qkv.weight", "attn_gate.weight"))
    if grouped and role in ("mix", "out_gate", "alpha", "beta") and not apart:
        order, total = _grouped(recurrent, role)
        return _some(where, stored, name, shape, order, total)
    return None


def _some(
    where: Path,
    stored: Mapping[str, Stored],
    name: str,
    shape: Shape,
    order: NDArray[np.int32],
    total: int,
) -> Places:
    whole = chunks(where, stored, name, Shape(total, shape.cols), 0, total)
    return whole._replace(order=order)


def _rows(groups: int, parts: list[int], which: int) -> NDArray[np.int32]:
    """Rows of one part where each group stacks all parts."""
    first, size = sum(parts[:which]), sum(parts)
    rows = np.arange(groups)[:, None] * size + first + np.arange(parts[which])
    return np.ascontiguousarray(rows.reshape(-1), np.int32)


def _grouped(recurrent: Recurrent, role: str) -> tuple[NDArray[np.int32], int]:
    """Rows of a role in the tensor that stacks it by key head, and all rows of that."""
    groups, each = recurrent.key_heads, recurrent.heads // recurrent.key_heads
    if role in ("alpha", "beta"):
        return _rows(groups, [each, each], int(role == "alpha")), 2 * recurrent.heads
    key, value = recurrent.key_dim, each * recurrent.value_dim
    parts = [key, key, value, value]
    total = groups * sum(parts)
    if role == "out_gate":
        return _rows(groups, parts, 3), total
    return np.concatenate([_rows(groups, parts, part) for part in range(3)]), total
