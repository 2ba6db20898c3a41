"""Tensors of a folder of safetensors, one file or several with an index; no pickle is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from redwood.errors import ModelError, UnsupportedError
from redwood.models.mapping import explain_bus_errors

Bytes: TypeAlias = NDArray[np.uint8]


class Stored(NamedTuple):
    """A tensor of a file, whatever it is for; load returns its bytes, uint8 and read-only."""

    kind: str
    shape: tuple[int, ...]
    load: Callable[[], Bytes]


def stored_tensors(folder: Path, stack: ExitStack) -> dict[str, Stored]:
    """Returns all tensors of a folder by name; the files stay open until the stack is closed.

    Raises:
        ModelError: no safetensors, damaged ones, or an index that does not fit them.
        UnsupportedError: numbers other than F32, F16, BF16 and bytes.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return _file(single, stack)
    if not index.is_file():
        raise ModelError(f"{folder} has neither {single.name} nor {index.name}")
    files: dict[str, list[str]] = {}
    for name, file in _weight_map(index).items():
        files.setdefault(file, []).append(name)
    stored: dict[str, Stored] = {}
    for file, names in files.items():
        tensors = _file(folder / file, stack)
        odd = set(names) ^ set(tensors)
        if odd:
            raise ModelError(f"{folder / file} and {index.name} disagree about {min(odd)!r}")
        stored |= tensors
    return stored


def _weight_map(index: Path) -> dict[str, str]:
    try:
        names = json.loads(index.read_text("utf-8"))["weight_map"]
        plain = all(isinstance(f, str) and Path(f).name == f for f in names.values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{index} cannot be read: {error}") from error
    if not plain:
        raise ModelError(f"{index} names files outside its folder")
    return dict(names)


def _file(path: Path, stack: ExitStack) -> dict[str, Stored]:
    explain_bus_errors()  # the library maps them
    try:
        file = stack.enter_context(safe_open(path, framework="pt"))
        slices = {name: file.get_slice(name) for name in file.keys()}
        return {
            name: Stored(_kind(part.get_dtype(), name, path), tuple(part.get_shape()), load)
            for name, part in slices.items()
            for load in [partial(_tensor_bytes, file, name, path)]
        }
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} is not a whole safetensors file ({error})") from error


def _kind(dtype: str, name: str, path: Path) -> str:
    if dtype not in ("F32", "F16", "BF16") and not (
        dtype == "U8" and name.endswith(("_blocks", "_scales"))
    ):
        raise UnsupportedError(f"{path}: the tensor {name!r} is {dtype}, not F32, F16 or BF16")
    return dtype


def _tensor_bytes(file: Any, name: str, path: Path) -> Bytes:
    try:
        tensor = file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: the tensor {name!r} cannot be read ({error})") from error
    numbers: Bytes = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    numbers.flags.writeable = False
    return numbers
