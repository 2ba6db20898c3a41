"""The file that an offloaded model streams from: its large tensors, in the order of a forward.

Made once from the safetensors of a folder, a few rows at a time, and kept in the model cache.
Pieces begin on page borders and hold some megabytes at most, so that a few buffers suffice for a
model of any size. What the file holds where follows from the shapes of the model alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
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
from redwood.backends.offload.stored_experts import one_by_one, stored_name
from redwood.backends.offload.stream import PAGE, Span
from redwood.backends.offload.streamed import Matrix, Part
from redwood.backends.offload.streamed_experts import stacks_of
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
    experts: Collection[str] = (),
) -> Layout:
    """Returns where parameters go.

    Args:
        wanted: shape and form of what is streamed, in the order of a forward.
        tables: shape and form of embeddings.
        experts: those of `wanted`, [experts, rows, cols], of which each expert has its own pieces.
    """
    matrices, spans, offset = {}, list[Span](), 0
    for name, (shape, form) in wanted.items():
        cols = shape[-1]
        rows = torch.Size(shape).numel() // cols
        each = shape[1] if name in experts else rows
        most = max(1, PIECE_BYTES // form.size(form.unit, cols)) * form.unit
        count = -(-each // most)
        step = -(-each // (count * form.unit)) * form.unit  # pieces of a matrix are about alike
        parts = []
        for first in (at + i for at in range(0, rows, each) for i in range(0, each, step)):
            held = min(step, each - first % each)
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
        shapes: dict[str, tuple[int, ...]] = {}
        try:
            for path in sorted(folder.glob("*.safetensors")):
                with safe_open(path, framework="pt") as file:
                    names = list(file.keys())
                    self._files |= dict.fromkeys(names, path)
                    shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in names}
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path} is not a whole safetensors file ({error})") from error
        if not self._files:
            raise ModelError(f"{folder} has no safetensors")
        self._experts = _experts(model, shapes)
        self._names = _names(model, shapes, self._experts)
        self._loaded = None if self._names is not None else _converted(folder, model)
        self._shapes = {name: tuple(tensor.shape) for name, tensor in _saved(model).items()}

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a parameter."""
        if self._loaded is not None:
            return tuple(self._loaded[name].shape)
        return self._shapes[name]

    def rows(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Returns some first indices of a parameter, or all of it."""
        if self._loaded is not None:
            return self._loaded[name][first:last]
        assert self._names is not None
        if name not in self._names:  # experts that the file has one by one
            some = self._experts[name][first:last]
            return torch.stack([torch.cat([self._reading(part) for part in each]) for each in some])
        return self._reading(self._names[name], first, last)

    def _reading(self, stored: str, first: int = 0, last: int | None = None) -> Tensor:
        def what(part: Any) -> Any:
            return part[first:last].clone() if part.get_shape() else part[:]

        # Opened anew each time: what was read of a mapped file stays in memory until it is closed.
        try:
            with safe_open(self._files[stored], framework="pt") as file:
                rows: Tensor = what(file.get_slice(stored))
                return rows
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"{self._files[stored]}: {stored!r} cannot be read ({error})"
            ) from error


def _experts(
    model: nn.Module, stored: Mapping[str, tuple[int, ...]]
) -> dict[str, list[tuple[str, ...]]]:
    """The tensors of each expert, for the stacks of a model that its files have one by one."""
    found = {}
    for prefix, module in model.named_modules():
        for part, stack in stacks_of(module).items():
            name, (count, *shape) = f"{prefix}.{part}", stack.shape
            if name in stored:
                continue
            tensors = one_by_one(name, module, count, stored)
            if tensors is not None and all(
                sum(stored[each][0] for each in parts) == shape[0]
                and {stored[each][1:] for each in parts} == {(shape[1],)}
                for parts in tensors
            ):
                found[name] = tensors
    return found


def _names(
    model: nn.Module, stored: Mapping[str, tuple[int, ...]], experts: Collection[str]
) -> dict[str, str] | None:
    """The stored name of every parameter and saved buffer but those of `experts`; None: they do
    not fit as they are."""
    found, missing = {}, []
    twins: dict[int, list[str]] = {}
    state = _saved(model)
    for name, tensor in state.items():
        twins.setdefault(id(tensor), []).append(name)
    for names in twins.values():
        match = next((held for name in names if (held := stored_name(name, stored))), None)
        for name in names:
            if name in experts:
                continue
            if match is None or stored[match] != tuple(state[name].shape):
                missing.append(name)
            else:
                found[name] = match
    return None if missing else found


def _saved(model: nn.Module) -> dict[str, Tensor]:
    saved = set(model.state_dict())
    buffers = {name: tensor for name, tensor in model.named_buffers() if name in saved}
    return {**dict(model.named_parameters(remove_duplicate=False)), **buffers}


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
    layout: Layout,
    forms: Mapping[str, Form],
    weights: Weights,
    tables: TorchForm,
    experts: Mapping[str, bool] | None = None,
) -> Callable[[BinaryIO], None]:
    """Returns what writes the file, a piece at a time.

    Args:
        experts: what `plan` was told, and whether the model has inputs before outputs there.
    """

    def write_experts(file: BinaryIO, name: str, turned: bool) -> None:
        held, whole = -1, torch.empty(0)
        rows = weights.shape(name)[2 if turned else 1]
        for part in layout.matrices[name].parts:
            expert, first = divmod(part.first, rows)
            if expert != held:
                (whole,) = weights.rows(name, expert, expert + 1)
                held, whole = expert, whole.T.contiguous() if turned else whole
            file.seek(layout.spans[part.piece].offset)
            file.write(forms[name].pack(_floats(whole[first : first + part.rows], name)).data)

    def write(file: BinaryIO) -> None:
        for name, matrix in layout.matrices.items():
            if experts and name in experts:
                write_experts(file, name, experts[name])
                continue
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
