"""From a model's files to a `NativeBackend`: weights are packed once, then mapped into memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from redwood import models
from redwood.backends.base import Nodes
from redwood.backends.native import packed as packed_files
from redwood.backends.native.backend import CHECKPOINT_TOKENS, NativeBackend, extension
from redwood.backends.native.weights import WeightSource, open_folder, open_gguf
from redwood.errors import ArgumentError, CapacityError, check_count
from redwood.models.mapping import mapped
from redwood.sampling import check_finite

KV = ("auto", "f16", "f32")
_ALIGNMENT = 4096
_MAX_THREADS = 64
_IN_MEMORY = 1 << 26
"""Weights up to this size are packed at every start: that takes less than a second."""


def load_native(
    folder: Path,
    gguf: Path | None,
    *,
    capacity: int | None = None,
    weights: str = "auto",
    kv: str = "auto",
    threads: int | None = None,
    cpus: Sequence[int] = (),
    isa: str = "auto",
    name: str | None = None,
    outputs: int | NDArray[np.int64] | None = None,
    checkpoint_tokens: int | None = None,
) -> NativeBackend:
    """Returns the native backend for a GGUF file, or for the safetensors of a folder.

    Args:
        folder: with config.json; it names the model in messages.
        gguf: the weights, or a part of them; None: the safetensors in `folder`.
        capacity: slots per row, at most the model's context, the default.
        weights: "auto" holds the numbers of the file exactly, in its own format; "f32" as float32,
            and activations are then not rounded to 8 bits; "bf16" rounds them; "int8" and "int4"
            (groups of 32 with scale and minimum; embedding and head "int8") requantise floats;
            "draft" requantises anything to 4 bits, for drafters.
        kv: numbers of keys and values: "f16" ("auto") or "f32".
        threads: None: one for each processor that this process may use, container limits counted.
        cpus: processors to pin the threads to, but for the calling one; none: not pinned.
        isa: see `NativeBackend`.
        outputs: tokens that it scores, the first ones, or these ids (ascending), whose rows of the
            head are then packed apart; see `NativeBackend`. Those past the model's are left out.
        name: under which `redwood models` knows the model; None: its path.
        checkpoint_tokens: of models with recurrent layers, states are kept every so many tokens,
            see `NativeBackend`; None: 512.

    Raises:
        UnsupportedError: no extension, or a model that is not computed here, with the reason.
        ArgumentError: unknown weights or kv, requantising what is quantised already.
        CapacityError: a capacity below 2 or beyond the model's context, or one whose kept states do
            not fit into memory.
        ModelError: damaged files, or not enough disk space for the packed ones.
        NumericalError: logits that are NaN or infinite.
    """
    extension()
    check_options(weights, kv, threads, cpus, checkpoint_tokens)
    if capacity is not None and (type(capacity) is not int or capacity < 2):
        raise CapacityError(f"capacity {capacity} must be a whole number of at least 2")
    if outputs is not None and not isinstance(outputs, np.ndarray):
        check_count("outputs", outputs)
    if threads is None:
        threads = default_threads()
    with open_folder(folder, capacity) if gguf is None else open_gguf(gguf, capacity) as source:
        context = source.spec.context
        if checkpoint_tokens is not None:
            _check_recurrent(source)
        if capacity is not None and capacity > context:
            raise CapacityError(
                f"capacity {capacity} must be between 2 and the context of {context}"
            )
        files = models.gguf_parts(gguf) if gguf is not None else _weight_files(folder)
        matrices = _matrices(
            source, files, weights, threads, name or str((gguf or folder).resolve())
        )
        if source.spec.tied:
            matrices["output"] = matrices["embed"]
        total = source.spec.vocab_size
        chosen: dict[str, Any] = {}
        if isinstance(outputs, np.ndarray):
            ids = outputs[outputs < total]
            if len(ids) < total:
                matrices["output"] = _rows_of_head(source, ids, weights, threads)
                chosen["output_ids"] = ids
        elif outputs is not None:
            chosen["outputs"] = min(outputs, total)
        backend = NativeBackend(
            source.spec,
            matrices,
            packed_files.vectors(source),
            capacity=capacity or context,
            kv="f16" if kv == "auto" else kv,
            threads=threads,
            cpus=cpus,
            isa=isa,
            checkpoint_tokens=CHECKPOINT_TOKENS if checkpoint_tokens is None else checkpoint_tokens,
            **chosen,
        )
    if capacity is not None:
        _check_memory(backend)
    _probe(backend)
    return backend


def check_recurrent(name: str) -> None:
    """Looks, in the files of a model that are here, whether `checkpoint_tokens` is for it.

    Args:
        name: as `redwood.load` takes it; of one that is to be fetched nothing is known yet.

    Raises:
        ArgumentError: it has no recurrent layers.
        ModelError, UnsupportedError: see `load_native`.
    """
    if (gguf := models.gguf_path(name)) is None and not Path(name).expanduser().exists():
        return
    if gguf is None:
        source = open_folder(models.locate(name, progress=False)[0])
    else:
        source = open_gguf(gguf)
    with source:
        _check_recurrent(source)


def _check_recurrent(source: WeightSource) -> None:
    if source.spec.recurrent is None:
        raise ArgumentError(
            f"checkpoint_tokens: {source.spec.architecture} models have no recurrent layers"
        )


def _check_memory(backend: NativeBackend) -> None:
    """Refuses a capacity whose kept states alone are more than this machine's memory."""
    every, have = (
        backend.checkpoint_tokens,
        os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
    )
    kept = backend.capacity // every if every else 0
    if kept * backend.state_bytes > have:
        raise CapacityError(
            f"capacity {backend.capacity}: {kept} kept states of recurrent layers, "
            f"{backend.state_bytes >> 20} MiB each, are more than the memory of {have >> 20} MiB: "
            "lower the capacity or raise checkpoint_tokens"
        )


def _rows_of_head(
    source: WeightSource, ids: NDArray[np.int64], weights: str, threads: int
) -> tuple[str, NDArray[np.uint8]]:
    """The rows of the output layer for these tokens, packed as all of it is."""
    name = "embed" if source.spec.tied else "output"
    whole = source.get(name)
    assert whole is not None
    if ids.ndim != 1 or not len(ids) or ids.min() < 0:
        raise ArgumentError(f"outputs must be tokens below {whole.rows}")
    order = ids.astype(np.int32) if whole.row_order is None else whole.row_order[ids]
    some = replace(whole, rows=len(ids), row_order=np.ascontiguousarray(order))
    out = np.empty(packed_files.packed_size(name, some, weights), np.uint8)
    packed_files.pack(name, some, weights, out, threads)
    return packed_files.format_of(name, some, weights), out


def _probe(backend: NativeBackend) -> None:
    """Computes one token: weights with NaN are refused now, and not in the middle of an answer."""
    row = backend.open()
    (logits,) = backend.extend([Nodes(row, [0])])
    backend.release(row)
    check_finite(logits)


def check_options(
    weights: str = "auto",
    kv: str = "auto",
    threads: int | None = None,
    cpus: Sequence[int] = (),
    checkpoint_tokens: int | None = None,
) -> None:
    """Raises ArgumentError for what `load_native` could not use with any model."""
    if weights not in packed_files.WEIGHTS:
        raise ArgumentError(f"weights {weights!r} must be one of {', '.join(packed_files.WEIGHTS)}")
    if kv not in KV:
        raise ArgumentError(f"kv {kv!r} must be one of {', '.join(KV)}")
    if threads is not None:
        check_count("threads", threads)
        if threads > _MAX_THREADS:
            raise ArgumentError(f"threads {threads} must be at most {_MAX_THREADS}")
    if checkpoint_tokens is not None:
        check_count("checkpoint_tokens", checkpoint_tokens, least=0)
    if not isinstance(cpus, Sequence):
        raise ArgumentError(f"cpus {cpus!r} must be a list of processors")
    usable = _processors()
    for cpu in cpus:
        check_count("cpus", cpu, least=0)
        if cpu not in usable:
            listed = ", ".join(map(str, usable))
            raise ArgumentError(f"cpus: this process may use the processors {listed}, not {cpu}")


def default_threads() -> int:
    """Returns one thread for each processor that this process may use, container limits counted."""
    return min(len(_processors()), _quota(), _MAX_THREADS)


def _processors() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _quota(file: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Processors' worth of time that a container may use; many if there is no limit."""
    try:
        allowed, period = file.read_text().split()
        return max(1, int(allowed) // int(period))
    except (OSError, ValueError):  # no such group, or "max"
        return _MAX_THREADS


def _weight_files(folder: Path) -> list[Path]:
    return sorted(path.resolve() for path in folder.glob("*.safetensors"))


def _matrices(
    source: WeightSource, files: list[Path], weights: str, threads: int, name: str
) -> dict[str, tuple[str, NDArray[np.uint8]]]:
    listed = list(packed_files.matrix_weights(source))
    sizes = [packed_files.packed_size(name, weight, weights) for name, weight in listed]
    starts, end = [], 0
    for size in sizes:
        starts.append(end)
        end += -(-size // _ALIGNMENT) * _ALIGNMENT

    def packed() -> list[NDArray[np.uint8]]:
        made = []
        for (matrix, weight), size in zip(listed, sizes, strict=True):
            out = np.empty(size, np.uint8)
            packed_files.pack(matrix, weight, weights, out, threads)
            made.append(out)
        return made

    def write(file: BinaryIO) -> None:
        for (matrix, weight), size, start in zip(listed, sizes, starts, strict=True):
            out = np.empty(size, np.uint8)
            packed_files.pack(matrix, weight, weights, out, threads)
            file.seek(start)
            file.write(out.data)
            source.forget()
        file.truncate(end)

    if end <= _IN_MEMORY:
        arrays = packed()
    else:
        path = models.packed_file(name, files, weights, end, write)
        with path.open("rb") as packed_weights:
            held = np.frombuffer(mapped(packed_weights), np.uint8)
        arrays = [held[at : at + size] for at, size in zip(starts, sizes, strict=True)]
    return {
        matrix: (packed_files.format_of(matrix, weight, weights), np.asarray(array))
        for (matrix, weight), array in zip(listed, arrays, strict=True)
    }
