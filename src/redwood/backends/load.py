"""From the name of a model to a backend that can compute it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from redwood.backends.base import Backend
from redwood.backends.cuda_graph.backend import with_graphs
from redwood.backends.eager.load import load_eager, wrap_model
from redwood.backends.eager.stock import device_of, dtype_of
from redwood.backends.native.backend import extension
from redwood.backends.native.load import check_options, load_native
from redwood.backends.offload.load import load_offload
from redwood.backends.parallel.load import open_parallel
from redwood.errors import ArgumentError, ModelError, UnsupportedError
from redwood.models import PACKAGED, locate, resolve

__all__ = ["BACKENDS", "fetch_for", "load_eager", "load_offload", "open_model", "wrap_model"]

_log = logging.getLogger(__name__)

BACKENDS = ("auto", "native", "eager", "cuda_graph")


def open_model(
    name: str,
    *,
    backend: str = "auto",
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    capacity: int | None = None,
    progress: bool = False,
    weights: str | None = None,
    kv: str | None = None,
    threads: int | None = None,
    cpus: Sequence[int] | None = None,
    outputs: int | NDArray[np.int64] | None = None,
    draft_weights: str | None = None,
    offload: str | None = None,
    memory: str | int | None = None,
    parallel: str | None = None,
    checkpoint_tokens: int | None = None,
) -> tuple[Path, Backend]:
    """Returns the folder with a model's tokenizer, and a backend with its weights.

    Args:
        name: a packaged name, a folder, a .gguf file or a hub id.
        backend: "native", "eager", "cuda_graph" (CUDA only), or "auto": native on a CPU where it
            can compute the model and no dtype is asked for, else eager.
        dtype: of the eager backend; see `load_eager`.
        device: "cpu", "cuda", "cuda:N"; "auto" takes CUDA where there is one.
        capacity: slots per row, at most the model's context length, which is the default.
        progress: show progress of fetching and converting on stderr.
        weights, kv, threads, cpus, checkpoint_tokens: of the native backend alone; see
            `load_native`.
        outputs, draft_weights: of a drafter that the native backend runs: tokens that it scores,
            how many or which, and its weights in the place of `weights`. Elsewhere they are not
            needed.
        offload, memory: where weights stay, and bytes that the process may take; see
            `load_offload`, whose `weights` and `threads` they then are.
        parallel: "tensor" or "pipeline", under torchrun; see `open_parallel`.

    Raises:
        ArgumentError: unknown backend, dtype or device, an option that the backend does not have.
        CapacityError, ModelError, UnsupportedError: see `load_native` and `load_eager`.
    """
    given = {"weights": weights, "kv": kv, "threads": threads, "cpus": cpus}
    given["checkpoint_tokens"] = checkpoint_tokens
    native: dict[str, Any] = {option: value for option, value in given.items() if value is not None}
    if parallel is not None:
        others = {**native, "offload": offload, "memory": memory}
        how: dict[str, Any] = dict(dtype=dtype, device=device, capacity=capacity)
        return open_parallel(name, parallel, backend, others, progress=progress, **how)
    place = device_of(device)
    if offload is not None:
        odd = [option for option in ("kv", "cpus", "checkpoint_tokens") if option in native]
        if backend != "auto" or odd:
            wrong = ", ".join(odd) or f"backend {backend}"
            raise ArgumentError(f"{wrong} cannot go with offload: it is a backend of its own")
        folder = resolve(name, progress=progress)
        made_for = name if name in PACKAGED else str(folder.resolve())
        how = {"weights": weights or "auto", "threads": threads, "memory": memory}
        return folder, load_offload(
            folder, made_for, offload, dtype=dtype, device=place, capacity=capacity, **how
        )
    if memory is not None:
        raise ArgumentError("memory is a limit for offload, which was not asked for")
    refused: UnsupportedError | None = None
    if _wants_native(backend, dtype, place, native):
        try:
            extension()
            folder, gguf = locate(name, progress=progress)
            if draft_weights is not None:
                native["weights"] = draft_weights
            known = name if name in PACKAGED else folder.name if gguf else None
            made = load_native(
                folder, gguf, capacity=capacity, name=known, outputs=outputs, **native
            )
            return folder, made
        except UnsupportedError as error:
            if backend == "native" or any(value is not None for value in given.values()):
                raise
            refused = error
    try:
        folder = resolve(name, progress=progress)
        eager = load_eager(folder, dtype=dtype, device=place, capacity=capacity)
    except (ModelError, UnsupportedError) as error:
        if refused is None:
            raise
        raise type(error)(f"{error}; and the native backend: {refused}") from error
    if refused is not None:
        _log.warning("%s; the eager backend runs it", refused)
    return folder, with_graphs(eager) if backend == "cuda_graph" else eager


def fetch_for(
    name: str,
    *,
    backend: str = "auto",
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    **native: Any,
) -> None:
    """Fetches and converts what `open_model` will read, with progress on stderr.

    Args and Raises: as `open_model`; `native` are weights, kv, threads and cpus.
    """
    wanted = _wants_native(backend, dtype, device_of(device), native)
    if wanted:
        try:
            extension()
        except UnsupportedError:
            if backend == "native" or native:
                raise
            wanted = False
    (locate if wanted else resolve)(name, progress=True)


def check_placed(
    *,
    backend: str = "auto",
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    **native: Any,
) -> None:
    """Raises ArgumentError for options with which `open_model` could open no model.

    Args: as of `fetch_for`.
    """
    place = device_of(device)
    dtype_of(dtype, place, None)
    _wants_native(backend, dtype, place, native)


def _wants_native(
    backend: str, dtype: str | torch.dtype, place: torch.device, native: dict[str, Any]
) -> bool:
    if backend not in BACKENDS:
        raise ArgumentError(f"backend {backend!r} must be one of {', '.join(BACKENDS)}")
    if backend == "cuda_graph" and place.type != "cuda":
        raise ArgumentError(f"the cuda_graph backend needs a CUDA device, not {place}")
    check_options(**native)
    fits = place.type == "cpu" and dtype == "auto"
    if backend == "native" and not fits:
        wrong = f"dtype {dtype} (it takes weights=)" if place.type == "cpu" else f"device {place}"
        raise ArgumentError(f"the native backend does not take {wrong}")
    wanted = backend in ("auto", "native") and fits
    if native and not wanted:
        raise ArgumentError(f"{', '.join(native)}: only the native backend has these options")
    return wanted
