"""How streamed weights are stored, and multiplied as they are: no copy in float32 is kept.

Two forms. `NativeForm`, for a CPU with Redwood's extension: the packed blocks of the native
backend and its kernels, so that a row of activations gives bit for bit the same whatever the
number of rows. `TorchForm`, for CUDA and where the extension is missing: rows as PyTorch reads
them, expanded piece by piece just before they are used.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from redwood.backends.native.backend import extension
from redwood.errors import ArgumentError, UnsupportedError

WEIGHTS = ("bf16", "int8", "int4", "f32")
_DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
_KINDS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_NATIVE = {"bf16": "bf16", "f32": "f32", "int8": "a8", "int4": "a4m"}
_GROUP = 32  # numbers that share a scale


class Form(Protocol):
    """A way to store rows of a matrix [rows, cols] and to multiply with them."""

    name: str
    """Tells it apart from all others in the name of a file."""
    unit: int
    """Rows are stored in multiples of this many."""

    def size(self, rows: int, cols: int) -> int:
        """Returns the bytes of this many rows."""
        ...

    def pack(self, weight: Tensor) -> NDArray[np.uint8]:
        """Returns the stored bytes of weight [rows, cols], float numbers on the CPU."""
        ...

    def multiply(self, data: Tensor, rows: int, x: Tensor) -> Tensor:
        """Returns x [n, cols] times the transposed rows that `data` holds: [n, rows]."""
        ...


class NativeForm:
    """Packed blocks of 16 outputs; see `redwood.backends.native.backend`.

    Args:
        weights: of `WEIGHTS`; "int8" and "int4" also round activations to 8 bits, per group of 32.
        threads: threads that multiply.

    Raises:
        UnsupportedError: Redwood was installed without its extension.
    """

    unit = 16

    def __init__(self, weights: str, threads: int) -> None:
        self._extension = extension()
        self._isa: str = self._extension.instruction_sets()[0]
        self._format, self._threads = _NATIVE[weights], threads
        self.name = f"native-{self._format}"

    def size(self, rows: int, cols: int) -> int:
        """Returns the bytes of this many rows."""
        return int(self._extension.packed_bytes(self._format, rows, cols))

    def pack(self, weight: Tensor) -> NDArray[np.uint8]:
        """Returns the stored bytes of weight [rows, cols], float numbers on the CPU."""
        rows, cols = weight.shape
        out = np.empty(self.size(rows, cols), np.uint8)
        data = weight.contiguous().reshape(-1).view(torch.uint8).numpy()
        self._extension.pack(
            _KINDS[weight.dtype], data, rows, cols, None, self._format, out, self._threads
        )
        return out

    def multiply(self, data: Tensor, rows: int, x: Tensor) -> Tensor:
        """Returns x [n, cols] times the transposed rows that `data` holds: [n, rows]."""
        out = torch.empty(len(x), -(-rows // self.unit) * self.unit)
        x = x.float().contiguous()
        self._extension.product(
            self._isa,
            self._format,
            data.numpy(),
            rows,
            x.numpy(),
            out.numpy(),
            threads=self._threads,
        )
        return out[:, :rows]


class TorchForm:
    """Rows in order. "int8": scales per group of 32; "int4": a scale and a minimum.

    Args:
        weights: of `WEIGHTS`.
    """

    unit = 1

    def __init__(self, weights: str) -> None:
        self._weights = weights
        self.name = f"torch-{weights}"

    def size(self, rows: int, cols: int) -> int:
        """Returns the bytes of this many rows."""
        if self._weights in _DTYPES:
            return rows * cols * _DTYPES[self._weights].itemsize
        groups = rows * -(-cols // _GROUP)
        return groups * (_GROUP + 2 if self._weights == "int8" else _GROUP // 2 + 4)

    def pack(self, weight: Tensor) -> NDArray[np.uint8]:
        """Returns the stored bytes of weight [rows, cols], float numbers on the CPU."""
        if self._weights in _DTYPES:
            return _bytes(weight.to(_DTYPES[self._weights]))
        missing = -weight.shape[1] % _GROUP
        groups = torch.nn.functional.pad(weight.float(), (0, missing)).reshape(-1, _GROUP)
        if self._weights == "int8":
            scales = (groups.abs().amax(1, keepdim=True) / 127).to(torch.float16)
            quants = _rounded(groups, scales, -127, 127).to(torch.int8)
            return np.concatenate([_bytes(quants), _bytes(scales)])
        least = groups.amin(1, keepdim=True).to(torch.float16)
        scales = ((groups.amax(1, keepdim=True) - least.float()) / 15).to(torch.float16)
        nibbles = _rounded(groups - least.float(), scales, 0, 15).to(torch.uint8)
        pairs = nibbles[:, : _GROUP // 2] | nibbles[:, _GROUP // 2 :] << 4
        return np.concatenate([_bytes(pairs), _bytes(scales), _bytes(least)])

    def multiply(self, data: Tensor, rows: int, x: Tensor) -> Tensor:
        """Returns x [n, cols] times the transposed rows that `data` holds: [n, rows]."""
        return x @ self.unpack(data, rows, x.shape[1], x.dtype).T

    def unpack(self, data: Tensor, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
        """Returns the stored numbers [rows, cols] in a dtype, on the device of `data`."""
        if self._weights in _DTYPES:
            return data.view(_DTYPES[self._weights]).reshape(rows, cols).to(dtype)
        groups = rows * -(-cols // _GROUP)
        quants = _GROUP if self._weights == "int8" else _GROUP // 2
        sizes = [groups * quants] + [2 * groups] * (1 if self._weights == "int8" else 2)
        parts: tuple[Tensor, ...] = torch.split(data, sizes)
        scales = parts[1].view(torch.float16).float()[:, None]
        if self._weights == "int8":
            numbers = parts[0].view(torch.int8).reshape(groups, quants) * scales
        else:
            pairs = parts[0].reshape(groups, quants)
            nibbles = torch.cat([pairs & 15, pairs >> 4], 1)
            numbers = nibbles * scales + parts[2].view(torch.float16).float()[:, None]
        made: Tensor = numbers.reshape(rows, -1)[:, :cols].to(dtype)
        return made


def form_of(weights: str, device: torch.device, threads: int) -> Form:
    """Returns the form for these weights: the native one on a CPU that has the extension.

    Raises:
        ArgumentError: weights that are none of `WEIGHTS`.
    """
    if weights not in WEIGHTS:
        raise ArgumentError(f"weights {weights!r} must be one of {', '.join(WEIGHTS)}")
    if device.type == "cpu" and has_extension():
        return NativeForm(weights, threads)
    return TorchForm(weights)


def has_extension() -> bool:
    """Returns whether Redwood was installed with its native extension."""
    try:
        extension()
    except UnsupportedError:
        return False
    return True


def _bytes(numbers: Tensor) -> NDArray[np.uint8]:
    made: NDArray[np.uint8] = numbers.contiguous().reshape(-1).view(torch.uint8).numpy()
    return made


def _rounded(groups: Tensor, scales: Tensor, low: int, high: int) -> Tensor:
    """Numbers in units of their group's scale; a group of zeros has scale 0."""
    by = scales.float()
    return torch.where(by > 0, groups / by, 0.0).round().clamp(low, high)
