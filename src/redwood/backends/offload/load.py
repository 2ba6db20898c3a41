"""From a model's files to an `OffloadBackend`: its modules without weights, and where those are."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from redwood.backends.eager.load import wrap_model
from redwood.backends.eager.stock import config_of, device_of, dtype_of, slots_of
from redwood.backends.native.load import default_threads
from redwood.backends.offload.backend import OffloadBackend, parse_bytes
from redwood.backends.offload.file import Weights, plan, stored_file, writer
from redwood.backends.offload.forms import Form, NativeForm, TorchForm, form_of
from redwood.backends.offload.stream import Stream
from redwood.backends.offload.streamed import StreamedEmbedding, StreamedLinear, lend
from redwood.backends.offload.streamed_experts import (
    Stacked,
    StreamedExperts,
    stacks_of,
)
from redwood.backends.offload.to_device import DevicePieces
from redwood.errors import ArgumentError, UnsupportedError
from redwood.models._transformers_states import recurrent_modules

OFFLOAD = ("disk", "ram")
SMALL = 1 << 16
"""Tensors of up to this many numbers stay in memory."""


def load_offload(
    folder: Path,
    name: str,
    offload: str = "disk",
    *,
    memory: str | int | None = None,
    weights: str = "auto",
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    capacity: int | None = None,
    threads: int | None = None,
) -> OffloadBackend:
    """Returns the offload backend for the model in `folder`; see `backends.offload`.

    Args:
        name: under which the file that it streams from is kept in the cache.
        offload, memory, weights: see `open_offloaded`.
        dtype, device, capacity: as of `load_eager`.
        threads: that multiply; None: one for each processor that this process may use.

    Raises: as `load_eager` and `open_offloaded`.
    """
    place, config = device_of(device), config_of(folder)
    slots = slots_of(capacity, config)
    model, make = open_offloaded(
        folder,
        config,
        name=name,
        place=offload,
        memory=memory,
        weights=weights,
        dtype=dtype_of(dtype, place, config),
        device=place,
        threads=threads or default_threads(),
    )
    made = wrap_model(model, slots, make)
    assert isinstance(made, OffloadBackend)
    return made


def open_offloaded(
    folder: Path,
    config: Any,
    *,
    name: str,
    place: str,
    memory: str | int | None,
    weights: str,
    dtype: torch.dtype,
    device: torch.device,
    threads: int,
) -> tuple[PreTrainedModel, Callable[[PreTrainedModel, int], OffloadBackend]]:
    """Returns the model of a folder with streamed weights, and what makes its backend.

    Args:
        name: of the model in the cache.
        place: where weights stay: "disk", or "ram" for a GPU.
        memory: what the process may take, such as "2GiB", see `OffloadBackend`.
        weights: of `redwood.backends.offload.forms.WEIGHTS`, or "auto", which is "bf16".
        dtype, device: of computing.
        threads: that multiply.

    Raises:
        ArgumentError: an unknown place, a size that cannot be read, unknown weights.
        ModelError: weights that are missing or damaged, no room for the file.
        UnsupportedError: a place that this machine has not.
    """
    if place not in OFFLOAD:
        raise ArgumentError(f"offload {place!r} must be one of {', '.join(OFFLOAD)}")
    if place == "ram" and device.type != "cuda":
        raise ArgumentError('offload "ram" is for a GPU; on a CPU weights come from the "disk"')
    if not hasattr(os, "preadv"):
        raise UnsupportedError("offloading needs a system with preadv, such as Linux")
    limit = None if memory is None else parse_bytes(memory)
    form = form_of("bf16" if weights == "auto" else weights, device, threads)
    exact = "f32" if weights == "f32" else "bf16"
    with torch.device("meta"):  # no memory is taken
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    model.eval()
    if recurrent_modules(model):  # before a file of the model's size is written
        raise UnsupportedError(
            f"{type(model).__name__} has recurrent layers, which are not offloaded"
        )
    stored = Weights(folder, model)
    fine = form_of("int8", device, threads) if weights == "int4" else form
    streamed, tables = _large(model)
    raw = TorchForm(exact)
    experts = {
        each: bool(module.is_transposed)
        for each, (module, parameter) in streamed.items()
        if parameter in stacks_of(module)
    }
    forms: dict[str, Form] = {each: form if each in experts else raw for each in streamed} | {
        each: fine if _is_head(model, module) else form
        for each, (module, _) in streamed.items()
        if isinstance(module, nn.Linear)
    }
    wanted = {}
    for each in streamed:
        shape = stored.shape(each)
        if experts.get(each):
            shape = (shape[0], shape[2], shape[1])
        wanted[each] = shape, forms[each]
    layout = plan(wanted, {each: (_pair(stored.shape(each)), raw) for each in tables}, experts)
    label = f"{form.name}-{fine.name}-{exact}" + ("-experts" if experts else "")
    write = writer(layout, forms, stored, raw, experts)
    path = stored_file(name, folder, label, layout, write)
    layers = _layers(streamed, experts)
    groups = [
        [part.piece for each in stacks.values() for part in layout.matrices[each].parts]
        for stacks in layers.values()
    ]
    stream = Stream(path, layout.spans, pinned=device.type == "cuda", groups=groups)
    store: Stream | DevicePieces = stream
    if device.type == "cuda":
        store = DevicePieces(stream, device)
        if place == "ram":
            stream.keep(stream.total_bytes * 2)  # all of it, whole pages counted
    _fill_small(model, stored, {*streamed, *tables}, dtype, device)
    like = torch.empty(0, dtype=dtype, device=device)
    for each, (module, parameter) in streamed.items():
        matrix = layout.matrices[each]
        if isinstance(module, nn.Linear):
            bias = None if module.bias is None else module.bias.data
            _replace(model, each, StreamedLinear(matrix, forms[each], store, bias))
        elif each in experts:
            module._parameters[parameter] = nn.Parameter(like, requires_grad=False)
        else:
            lend(module, parameter, matrix, raw, store, like)
    for group, (layer, names) in enumerate(layers.items()):
        stacks = {part: Stacked(layout.matrices[each], forms[each]) for part, each in names.items()}
        _replace(model, next(iter(names.values())), StreamedExperts(layer, stacks, group, store))
    for each, module in tables.items():
        table = StreamedEmbedding(
            path,
            layout.tables[each],
            raw,
            _pair(stored.shape(each)),
            like,
            getattr(module, "embed_scale", None),
        )
        _replace(model, each, table)
    setting = f"{place} {form.name} {limit or 0}"
    return model, partial(
        OffloadBackend,
        stream=stream,
        store=store,
        memory=limit,
        threads=threads,
        kernels=isinstance(form, NativeForm),
        setting=setting,
    )


def _large(
    model: nn.Module,
) -> tuple[dict[str, tuple[nn.Module, str]], dict[str, nn.Embedding]]:
    """Parameters to stream, with their modules, in the order of a forward; and embeddings."""
    streamed: dict[str, tuple[nn.Module, str]] = {}
    tables: dict[str, nn.Embedding] = {}
    for prefix, module in model.named_modules():
        most = max((stack.numel() for stack in stacks_of(module).values()), default=0)
        for name, parameter in module.named_parameters(recurse=False):
            whole = f"{prefix}.{name}" if prefix else name
            # Experts stream as a whole, and their biases stay.
            numbers = (most if name in stacks_of(module) else 0) if most else parameter.numel()
            if numbers <= SMALL or parameter.dim() < 2:
                continue
            if type(module) is nn.Embedding or hasattr(module, "embed_scale"):
                tables[whole] = cast(nn.Embedding, module)
            else:
                streamed[whole] = module, name
    return streamed, tables


def _layers(
    streamed: Mapping[str, tuple[nn.Module, str]], experts: Collection[str]
) -> dict[nn.Module, dict[str, str]]:
    """The stacks of experts of each layer: their full names, by those in their module."""
    found: dict[nn.Module, dict[str, str]] = {}
    for each in experts:
        module, parameter = streamed[each]
        found.setdefault(module, {})[parameter] = each
    return found


def _is_head(model: PreTrainedModel, module: nn.Module) -> bool:
    return module is model.get_output_embeddings()


def _pair(shape: tuple[int, ...]) -> tuple[int, int]:
    rows, cols = shape
    return rows, cols


def _fill_small(
    model: PreTrainedModel,
    stored: Weights,
    large: set[str],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Reads what stays in memory; makes what no file holds, such as rotary frequencies."""
    saved = model.state_dict()
    for prefix, module in model.named_modules():
        computed = [name for name, held in module._buffers.items() if held is not None]
        for name in computed:
            module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
        if computed:
            with torch.no_grad():
                # Transformers' own way for models without weights.
                _innermost(model, prefix)._init_weights(module)
    for prefix, module in model.named_modules():
        for held in (module._parameters, module._buffers):
            for name, empty in held.items():
                whole = f"{prefix}.{name}" if prefix else name
                if empty is None or whole in large:
                    continue
                made = stored.rows(whole) if whole in saved else empty
                if made.is_floating_point() and empty.dtype == dtype:
                    made = made.to(dtype)
                made = made.to(device)
                held[name] = (
                    nn.Parameter(made, requires_grad=False) if held is module._parameters else made
                )


def _innermost(model: PreTrainedModel, path: str) -> PreTrainedModel:
    """The model within a model that a module is, or is part of: what it computes is known there."""
    found, module = model, cast(nn.Module, model)
    for name in path.split(".") if path else ():
        module = module.get_submodule(name)
        if isinstance(module, PreTrainedModel):
            found = module
    return found


def _replace(model: nn.Module, parameter: str, module: nn.Module) -> None:
    """Puts a module in the place of the one that has this parameter."""
    path, _, name = parameter.rpartition(".")[0].rpartition(".")
    setattr(model.get_submodule(path), name, module)
