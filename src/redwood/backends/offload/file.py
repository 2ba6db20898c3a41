"""The file that an offloaded model streams from: its large tensors, in the order of a forward.

Made once from the safetensors of a folder, a few rows at a time, and kept in the model cache.
Pieces begin on page borders and hold some megabytes at most, so that a few buffers suffice for a
model of any size. What the file holds where follows from the shapes of the model alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from redwood import models
from redwood.backends.eager.stock import load_stock
from redwood.backends.offload.forms import Form, TorchForm
from redwood.backends.offload.stream import PAGE, Span
from redwood.backends.offload.streamed import Matrix, Part
from redwood.errors import ModelError

PIECE_BYTES = 8 << 20
"""Bytes of a piece at most, but for a matrix whose smallest unit of rows is larger."""


@dataclass(frozen=True)
class Layout:
    """Where everything is.

    Attributes:
        matrices: streamed, by the name of the parameter.
        tables: offset of each embedding, by the name of the parameter, in rows of `TorchForm`.
        spans: of the pieces, by number.
        size: bytes of the file.
    """

    matrices: Mapping[str, Matrix]
    tables: Mapping[str, int]
    spans: tuple[Span, ...]
    size: int


def plan(
    wanted: Mapping[str, tuple[tuple[int, ...], Form]],
    tables: Mapping[str, tuple[tuple[int, int], TorchForm]],
) -> Layout:
    """Returns where parameters go.

    Args:
        wanted: shape and form of what is streamed, in the order of a forward.
        tables: shape and form of embeddings.
    """
    matrices, spans, offset = {}, list[Span](), 0
    for name, (shape, form) in wanted.items():
        cols = shape[-1]
        rows = torch.Size(shape).numel() // cols
        most = max(1, PIECE_BYTES // form.size(form.unit, cols)) * form.unit
        count = -(-rows // most)
        step = -(-rows // (count * form.unit)) * form.unit  # pieces of a matrix are about alike
        parts = []
        for first in range(0, rows, step):
            held = min(step, rows - first)
            parts.append(Part(len(spans), first, held))
            spans.append(Span(offset, form.size(held, cols)))
            offset += -(-spans[-1].size // PAGE) * PAGE
        matrices[name] = Matrix(rows, cols, tuple(parts))
    places = {}
    for name, (shape, form) in tables.items():
        places[name] = offset
        offset += -(-form.size(*shape) // PAGE) * PAGE
    return Layout(matrices, places, tuple(spans), offset)


class Weights:
    """The tensors of a model by the names of its parameters.

    Args:
        folder: with safetensors.
        model: made without weights.

    Raises:
        ModelError: damaged files, or a tensor that is missing.
    """

    def __init__(self, folder: Path, model: PreTrainedModel) -> None:
        self._files: dict[str, Path] = {}
        try:
            for path in sorted(folder.glob("*.safetensors")):
                with safe_open(path, framework="pt") as file:
                    self._files |= dict.fromkeys(file.keys(), path)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path} is not a whole safetensors file ({error})") from error
        if not self._files:
            raise ModelError(f"{folder} has no safetensors")
        self._names = _names(model, set(self._files))
        self._loaded = None if self._names is not None else _converted(folder, model)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a parameter in the file."""
        if self._loaded is not None:
            return tuple(self._loaded[name].shape)
        shape: tuple[int, ...] = self._reading(name, lambda part: tuple(part.get_shape()))
        return shape

    def rows(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Returns some first indices of a parameter, or all of it."""
        if self._loaded is not None:
            return self._loaded[name][first:last]
        # Opened anew each time: what was read of a mapped file stays in memory until it is closed.
        rows: Tensor = self._reading(
            name, lambda part: part[first:last].clone() if part.get_shape() else part[:]
        )
        return rows

    def _reading(self, name: str, what: Callable[[Any], Any]) -> Any:
        assert self._names is not None
        stored = self._names[name]
        try:
            with safe_open(self._files[stored], framework="pt") as file:
                return what(file.get_slice(stored))
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"{self._files[stored]}: {stored!r} cannot be read ({error})"
            ) from error


def _names(model: nn.Module, stored: set[str]) -> dict[str, str] | None:
    """The stored name of every parameter and saved buffer; None: they do not fit as they are."""
    found, missing = {}, []
    twins: dict[int, list[str]] = {}
    state = {**dict(model.named_parameters(remove_duplicate=False)), **_saved_buffers(model)}
    for name, tensor in state.items():
        twins.setdefault(id(tensor), []).append(name)
    for names in twins.values():
        match = next((name for name in names if name in stored), None)
        for name in names:
            if match is None:
                missing.append(name)
            else:
                found[name] = match
    return None if missing else found


def _saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    saved = set(model.state_dict())
    return {name: tensor for name, tensor in model.named_buffers() if name in saved}


def _converted(folder: Path, model: PreTrainedModel) -> dict[str, Tensor]:
    """All weights, where Transformers gives them other names or shapes than the files have.

    This needs memory for the whole model, once.
    """

    dtype = getattr(model.config, "dtype", None)  # as the files have it
    return dict(load_stock(folder, dtype or torch.float32).state_dict())


def stored_file(
    name: str,
    folder: Path,
    label: str,
    layout: Layout,
    write: Callable[[BinaryIO], None],
) -> Path:
    """Returns the file, after making it if it is missing or made from other contents.

    Args:
        name: of the model, for the cache's list.
        folder: of the safetensors.
        label: how tensors are stored.

    Raises:
        ModelError: the disk is full, or the weights are damaged.
    """
    sources = [path.resolve() for path in sorted(folder.glob("*.safetensors"))]
    return models.packed_file(name, sources, f"offload-{label}", layout.size, write)


def writer(
    layout: Layout, forms: Mapping[str, Form], weights: Weights, tables: TorchForm
) -> Callable[[BinaryIO], None]:
    """Returns what writes the file, a piece at a time."""

    def write(file: BinaryIO) -> None:
        for name, matrix in layout.matrices.items():
            shape = weights.shape(name)
            whole = weights.rows(name).reshape(-1, matrix.cols) if len(shape) != 2 else None
            for part in matrix.parts:
                last = part.first + part.rows
                rows = (
                    weights.rows(name, part.first, last)
                    if whole is None
                    else whole[part.first : last]
                )
                file.seek(layout.spans[part.piece].offset)
                file.write(forms[name].pack(_floats(rows, name)).data)
        for name, offset in layout.tables.items():
            file.seek(offset)
            for rows in _some(weights, name):
                file.write(tables.pack(_floats(rows, name)).data)
        file.truncate(layout.size)

    return write


def _some(weights: Weights, name: str) -> Iterator[Tensor]:
    rows, cols = weights.shape(name)
    step = max(1, PIECE_BYTES // (4 * cols))
    for first in range(0, rows, step):
        yield weights.rows(name, first, min(rows, first + step))


def _floats(rows: Tensor, name: str) -> Tensor:
    if rows.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ModelError(f"the tensor {name!r} is {rows.dtype}: offloading takes floats alone")
    return rows
