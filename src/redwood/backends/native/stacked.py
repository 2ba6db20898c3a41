"""Where the numbers of a weight lie in a file's tensors: parts of one, or one of each expert."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from redwood.backends.native.roles import Shape
from redwood.backends.native.safetensors_file import Bytes, Stored
from redwood.errors import ModelError, UnsupportedError
from redwood.models._gguf import BLOCKS


class Places(NamedTuple):
    """The numbers of a weight.

    `names`: the tensors that hold them. `load` returns the rows of all experts one after the other,
    uint8, in the format `kind`. `neighbours`: rows of queries and keys stand as rotary positions
    that turn neighbours want them. `order`: which of them are the rows of the weight; None: all.
    """

    names: tuple[str, ...]
    kind: str
    load: Callable[[], Bytes]
    neighbours: bool = False
    order: NDArray[np.int32] | None = None


def chunks(
    where: Path, stored: Mapping[str, Stored], name: str, shape: Shape, start: int, total: int
) -> Places:
    """Rows `start` and following of a tensor with `total` rows, or numbers of a vector.

    Raises: ModelError for a tensor that is missing or has another shape, UnsupportedError for
        numbers that are not computed here; both name the tensor.
    """
    rows, cols = shape.rows, shape.cols
    if not rows:
        tensor = tensor_of(where, stored, name, (total or cols,))
        if total in (0, cols):
            return Places((name,), tensor.kind, tensor.load)
        size = _row_bytes(tensor.kind, 1)
        return Places((name,), tensor.kind, partial(_cut, tensor.load, start * size, cols * size))
    tensor = tensor_of(where, stored, name, (total, cols))
    load = tensor.load
    if rows != total:
        size = _row_bytes(tensor.kind, cols)
        load = partial(_cut, load, start * size, rows * size)
    return Places((name,), tensor.kind, load)


_IMAGES = tuple(
    f"{prefix}{part}."
    for prefix in ("", "model.")
    for part in ("visual", "vision_tower", "multi_modal_projector")
)
_TEXT = ("model.language_model.", "language_model.model.")


def text_part(stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """Returns the tensors of a model's text part under the names they have without images."""
    prefix = next((p for p in _TEXT if f"{p}embed_tokens.weight" in stored), None)
    if prefix is None:
        return dict(stored)
    found = {}
    for name, tensor in stored.items():
        if name.startswith(prefix):
            name = "model." + name.removeprefix(prefix)
        elif name.startswith(_IMAGES):
            continue
        found[name.removeprefix("language_model.")] = tensor
    return found


def stacked_experts(where: Path, stored: Mapping[str, Stored], name: str, shape: Shape) -> Places:
    """All experts in one tensor, [experts, rows, cols] or [experts, cols]; errors as `chunks`."""
    full = (shape.experts, shape.rows, shape.cols) if shape.rows else (shape.experts, shape.cols)
    tensor = tensor_of(where, stored, name, full)
    return Places((name,), tensor.kind, tensor.load)


def folder_experts(
    where: Path, stored: Mapping[str, Stored], name: str, role: str, shape: Shape
) -> Places:
    """The experts of a layer as folders of safetensors keep them; errors as `chunks`.

    `name` with {} is a tensor of each expert; where it is absent, those of Transformers' modules,
    which stack all of them, are looked for. `name` without {} is Granite's tensor, gate and then
    up; or gpt-oss's: inputs before outputs, gate and up in turn; or its blocks of 4 bits.
    """
    if name.endswith("put_linear.weight"):
        tensor_of(where, stored, name, None)
        return _fused(where, stored, name, role, shape)
    if "{}" not in name:
        return _gpt_oss(where, stored, name, role, shape)
    stem, _, part = name.partition(".experts.")
    fused = f"{stem}.experts." + ("down_proj" if role == "expert_down" else "gate_up_proj")
    if fused in stored:
        return _fused(where, stored, fused, role, shape)
    single = f"{stem}.experts.{role.replace('expert_', '')}_proj"
    if single in stored:  # without gates
        return stacked_experts(where, stored, single, shape)
    names = tuple(name.format(expert) for expert in range(shape.experts))
    tensors = [tensor_of(where, stored, each, (shape.rows, shape.cols)) for each in names]
    kinds = {tensor.kind for tensor in tensors}
    if len(kinds) > 1:
        raise UnsupportedError(
            f"{where}: the experts {name!r} are of several kinds: {', '.join(sorted(kinds))}"
        )
    loads = [tensor.load for tensor in tensors]
    return Places(names, tensors[0].kind, partial(_joined, loads))


def _fused(where: Path, stored: Mapping[str, Stored], name: str, role: str, shape: Shape) -> Places:
    """[experts, gate and then up, inputs], or [experts, outputs, inputs] of the second product."""
    parts = 1 if role == "expert_down" else 2
    which = int(role == "expert_up")
    count, rows, cols = shape.experts, shape.rows, shape.cols
    if rows * parts != cols and stored[name].shape == (count, cols, parts * rows):  # Qwen3-VL's
        shape_there = (count, cols, parts, rows)
        turned = partial(_turned, stored[name], shape_there, which, halves=True)
        return Places((name,), stored[name].kind, turned)
    tensor = tensor_of(where, stored, name, (count, parts * rows, cols))
    load: Callable[[], Bytes] = tensor.load
    if parts > 1:
        load = partial(_slices, tensor.load, (count, parts), which)
    return Places((name,), tensor.kind, load)


def _gpt_oss(
    where: Path, stored: Mapping[str, Stored], name: str, role: str, shape: Shape
) -> Places:
    parts = 2 if role.startswith(("expert_gate", "expert_up")) else 1
    which = int(role.startswith("expert_up"))
    count, rows, cols = shape.experts, shape.rows, shape.cols
    if not rows:  # biases
        tensor = tensor_of(where, stored, name, (count, parts * cols))
        return Places((name,), tensor.kind, partial(_every, tensor, (count, cols, parts), which))
    blocks, scales = f"{name}_blocks", f"{name}_scales"
    if blocks in stored or scales in stored:
        if cols % 32:
            raise ModelError(
                f"{where}: the tensor {blocks!r} has rows of {cols}, not of blocks of 32"
            )
        full = (count, parts * rows, cols // 32)
        quants = tensor_of(where, stored, blocks, (*full, 16), bytes_only=True)
        powers = tensor_of(where, stored, scales, full, bytes_only=True)
        load = partial(_mxfp4, quants.load, powers.load, (count, rows, parts, cols // 32), which)
        return Places((blocks, scales), "MXFP4", load)
    tensor = tensor_of(where, stored, name, (count, cols, parts * rows))
    return Places((name,), tensor.kind, partial(_turned, tensor, (count, cols, rows, parts), which))


def tensor_of(
    where: Path,
    stored: Mapping[str, Stored],
    name: str,
    shape: tuple[int, ...] | None,
    bytes_only: bool = False,
) -> Stored:
    """Returns a tensor of this shape, None: of any; errors as `chunks`."""
    if name not in stored:
        raise ModelError(f"{where} lacks the tensor {name!r}")
    tensor = stored[name]
    if shape is not None and tensor.shape != shape:
        raise ModelError(
            f"{where}: the tensor {name!r} has shape {tensor.shape} instead of {shape}"
        )
    if (tensor.kind == "U8") != bytes_only:
        raise UnsupportedError(f"{where}: the tensor {name!r} is {tensor.kind}")
    return tensor


def _row_bytes(kind: str, cols: int) -> int:
    elements, size = BLOCKS[kind]
    return cols // elements * size


def _fixed(numbers: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> Bytes:
    made = np.ascontiguousarray(numbers).reshape(-1)
    made.flags.writeable = False
    return made


def _cut(load: Callable[[], Bytes], start: int, size: int) -> Bytes:
    return load()[start : start + size]


def _joined(loads: list[Callable[[], Bytes]]) -> Bytes:
    return _fixed(np.concatenate([load() for load in loads]))


def _slices(load: Callable[[], Bytes], parts: tuple[int, int], which: int) -> Bytes:
    return _fixed(load().reshape(*parts, -1)[:, which])


def _every(tensor: Stored, shape: tuple[int, int, int], which: int) -> Bytes:
    """Every second number: [experts, outputs, parts]."""
    size = _row_bytes(tensor.kind, 1)
    return _fixed(tensor.load().reshape(*shape, size)[:, :, which])


def _turned(
    tensor: Stored, shape: tuple[int, int, int, int], which: int, halves: bool = False
) -> Bytes:
    """[experts, inputs, outputs, parts] to rows of outputs; `halves`: parts before outputs."""
    size = _row_bytes(tensor.kind, 1)
    numbers = tensor.load().reshape(-1).view(np.uint16 if size == 2 else np.uint32)
    table = numbers.reshape(shape)
    part = table[:, :, which] if halves else table[..., which]
    turned = np.ascontiguousarray(part.transpose(0, 2, 1))
    return _fixed(turned.view(np.uint8))


def _mxfp4(
    quants: Callable[[], Bytes],
    powers: Callable[[], Bytes],
    shape: tuple[int, int, int, int],
    which: int,
) -> Bytes:
    """Blocks of 32 as GGUF files keep them: a power, and number i beside number i + 16.

    Safetensors keep neighbours together: number 2i in the low half of a byte, 2i + 1 in the high.
    """
    pairs = quants().reshape(*shape, 16)[:, :, which]
    numbers = np.stack((pairs & 15, pairs >> 4), -1).reshape(*pairs.shape[:-1], 32)
    halves = numbers[..., :16] | numbers[..., 16:] << 4
    power = powers().reshape(shape)[:, :, which]
    return _fixed(np.concatenate((power[..., None], halves), -1))
