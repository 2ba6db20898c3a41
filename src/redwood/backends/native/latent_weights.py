"""The matrices that make keys and values of latents, as files keep them: together, or apart.

Folders and older GGUF files stack both, head by head: the rows of a head's keys that do not turn,
then those of its values. Newer GGUF files have a tensor of each, that of the keys turned around,
[heads, latent, key].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from redwood.backends.native.roles import Shape
from redwood.backends.native.safetensors_file import Bytes, Stored
from redwood.backends.native.spec import DecoderSpec
from redwood.backends.native.stacked import Places, chunks, stacked_experts

_FLOATS = {"F32": np.uint32, "F16": np.uint16, "BF16": np.uint16}


def expanded(
    where: Path, spec: DecoderSpec, stored: Mapping[str, Stored], name: str, role: str
) -> Places:
    """Returns the rows of `role`, "k_b" or "v_b", in a tensor that stacks both.

    Raises: as `stacked.chunks`.
    """
    still, values = spec.head_dim - spec.ropes[0].rotary_dim, spec.values
    total = spec.heads * (still + values)
    places = chunks(where, stored, name, Shape(total, spec.latent), 0, total)
    inside = np.arange(still) if role == "k_b" else still + np.arange(values)
    rows = np.arange(spec.heads)[:, None] * (still + values) + inside
    return places._replace(order=np.ascontiguousarray(rows.reshape(-1), np.int32))


def gguf_expanded(
    where: Path, spec: DecoderSpec, stored: Mapping[str, Stored], name: str, role: str
) -> Places:
    """Returns the same of a GGUF file, where the tensor `name` of both may be two.

    Numbers of keys that are packed in blocks are unpacked to be turned around: they are held in
    float32, exactly.

    Raises: as `stacked.chunks`.
    """
    two = {part: name.replace("attn_kv_b", f"attn_{part}") for part in ("k_b", "v_b")}
    apart = two[role]
    if name in stored or not any(each in stored for each in two.values()):
        return expanded(where, spec, stored, name, role)
    heads, still = spec.heads, spec.head_dim - spec.ropes[0].rotary_dim
    if role == "v_b":
        return stacked_experts(where, stored, apart, Shape(spec.values, spec.latent, heads))
    places = stacked_experts(where, stored, apart, Shape(spec.latent, still, heads))
    turned = partial(_turned, places.kind, places.load, (heads, spec.latent, still))
    return Places((apart,), places.kind if places.kind in _FLOATS else "F32", turned)


def _turned(kind: str, load: Callable[[], Bytes], shape: tuple[int, int, int]) -> Bytes:
    """[heads, latent, key] to rows of keys."""
    if kind in _FLOATS:
        table = load().reshape(-1).view(_FLOATS[kind]).reshape(shape)
    else:
        from redwood.backends.native.backend import extension  # needs torch, readers do not

        numbers = np.empty((shape[0] * shape[1], shape[2]), np.float32)
        extension().read(kind, load(), numbers)
        table = numbers.view(np.uint32).reshape(shape)
    turned = np.ascontiguousarray(table.transpose(0, 2, 1)).view(np.uint8).reshape(-1)
    turned.flags.writeable = False
    return turned
