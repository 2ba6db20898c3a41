"""The offload backend: a model larger than memory, whose weights pass by in every forward.

One pass of the weights scores a whole token tree (Sequoia, section 4.2 of arXiv 2402.12374;
SpecInfer, section 6.3 of 2305.09781). Weights come from the disk, or from the computer's memory to
a GPU. Everything else is the eager backend's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from redwood.backends._forms import Form, TorchForm, form_of
from redwood.backends._offload_file import SMALL, Weights, plan, stored_file, writer
from redwood.backends._stream import Stream
from redwood.backends._streamed import StreamedEmbedding, StreamedLinear, lend
from redwood.backends.base import Nodes
from redwood.backends.eager import EagerBackend
from redwood.errors import ArgumentError, CapacityError, UnsupportedError

OFFLOAD = ("disk", "ram")
_MOST_NODES = {"cpu": 128, "cuda": 768}  # of a tree; 768 is Sequoia's for a GPU
_RESERVE = 64 << 20  # bytes for activations, keys and values that are still to come
_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}
_UNITS |= {f"{unit}i": 1024**power for power, unit in enumerate("KMGT", start=1)}


class OffloadBackend(EagerBackend):
    """The eager backend over streamed weights.

    Args:
        model: whose large weights come from `stream`.
        memory: bytes that the whole process may take; None: only the buffers hold weights.
        threads: that multiply.
        setting: what else its times depend on, in a word or two.
    """

    name = "offload"

    def __init__(
        self,
        model: PreTrainedModel,
        capacity: int,
        stream: Stream,
        memory: int | None,
        threads: int,
        setting: str,
    ) -> None:
        super().__init__(model, capacity)
        self.stream, self.memory, self.threads, self.setting = stream, memory, threads, setting
        self._room: int | None = None
        self.quick_nodes = (1, 16, 64)
        """Sizes that a first look at times takes: forwards are slow, and nearly flat in nodes."""
        self.most_nodes = _MOST_NODES[self.device.type]
        """Nodes of one row that may pay."""

    @property
    def reserve(self) -> int:
        """Bytes left free beside weights: logits of a large tree, activations, keys and values."""
        return _RESERVE + 6 * self.most_nodes * self.vocab_size

    def settle(self) -> None:
        """Decides what stays in memory, once everything else that the process needs is there.

        Raises:
            CapacityError: `memory` is too little; the message says what is needed.
        """
        if self.memory is None:
            return
        others = resident_bytes() - self.stream.held_bytes - self.stream.made_bytes
        needed = others + self.stream.buffer_bytes + self.reserve
        if needed > self.memory:
            raise CapacityError(
                f"memory {_readable(self.memory)} is not enough for this model: with what the "
                f"process holds by now it needs {_readable(needed)} at least"
            )
        self._room = self.memory - needed
        self.stream.keep(self._room)

    def _forward(self, rows: Sequence[Nodes]) -> list[Tensor]:
        if self._room is not None:
            self._give_way()
        try:
            return super()._forward(rows)
        finally:
            self.stream.end()

    def _give_way(self) -> None:
        """Lets weights go where keys, values or others in the process have taken their place."""
        assert self.memory is not None and self._room is not None
        coming = self.stream.kept_bytes - self.stream.held_bytes
        over = resident_bytes() + coming + self.reserve // 2 - self.memory
        if over > 0:
            self._room = max(0, self.stream.kept_bytes - over - self.reserve // 2)
            self.stream.keep(self._room)


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
        memory: what the process may take, such as "2GiB"; None: as little as it can.
        weights: of `redwood.backends._forms.WEIGHTS`, or "auto", which is "bf16".
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
    stored = Weights(folder, model)
    fine = form_of("int8", device, threads) if weights == "int4" else form
    streamed, tables = _large(model)
    raw = TorchForm(exact)
    forms: dict[str, Form] = {
        each: (fine if _is_head(model, module) else form) if isinstance(module, nn.Linear) else raw
        for each, (module, _) in streamed.items()
    }
    wanted = {each: (stored.shape(each), forms[each]) for each in streamed}
    layout = plan(wanted, {each: (_pair(stored.shape(each)), raw) for each in tables})
    path = stored_file(
        name, folder, f"{form.name}-{fine.name}-{exact}", layout, writer(layout, forms, stored, raw)
    )
    stream = Stream(path, layout.spans)
    _fill_small(model, stored, {*streamed, *tables}, dtype, device)
    like = torch.empty(0, dtype=dtype, device=device)
    for each, (module, parameter) in streamed.items():
        matrix = layout.matrices[each]
        if isinstance(module, nn.Linear):
            bias = None if module.bias is None else module.bias.data
            _replace(model, each, StreamedLinear(matrix, forms[each], stream, bias))
        else:
            lend(module, parameter, matrix, raw, stream, like)
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
        OffloadBackend, stream=stream, memory=limit, threads=threads, setting=setting
    )


def _large(
    model: nn.Module,
) -> tuple[dict[str, tuple[nn.Module, str]], dict[str, nn.Embedding]]:
    """Parameters to stream, with their modules, in the order of a forward; and embeddings."""
    streamed: dict[str, tuple[nn.Module, str]] = {}
    tables: dict[str, nn.Embedding] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            whole = f"{prefix}.{name}" if prefix else name
            if parameter.numel() <= SMALL or parameter.dim() < 2:
                continue
            if type(module) is nn.Embedding or hasattr(module, "embed_scale"):
                tables[whole] = cast(nn.Embedding, module)
            else:
                streamed[whole] = module, name
    return streamed, tables


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
    for module in model.modules():
        computed = [name for name, held in module._buffers.items() if held is not None]
        for name in computed:
            module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
        if computed:
            with torch.no_grad():
                model._init_weights(module)  # Transformers' own way for models without weights
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


def _replace(model: nn.Module, parameter: str, module: nn.Module) -> None:
    """Puts a module in the place of the one that has this parameter."""
    path, _, name = parameter.rpartition(".")[0].rpartition(".")
    setattr(model.get_submodule(path), name, module)


def parse_bytes(size: str | int) -> int:
    """Returns the bytes of a size such as "2GiB", "1.5G" or 2147483648.

    Raises:
        ArgumentError: no such size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?)B?\s*", str(size), re.IGNORECASE)
    unit = None if match is None else match[2].upper().replace("I", "i")
    if match is None or unit not in _UNITS or float(match[1]) == 0:
        raise ArgumentError(f"memory {size!r} must be a size such as 2GiB or 1500MB")
    return int(float(match[1]) * _UNITS[unit])


def resident_bytes() -> int:
    """Returns the memory that this process holds now; where the system does not say, its most."""
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import resource
        import sys

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else 1024 * most


def _readable(size: int) -> str:
    return f"{size / 1024**3:.2f}GiB"
