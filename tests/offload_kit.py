"""Offloaded backends around tiny models: their matrices are cut small so that they stream."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from redwood.backends.load import load_offload
from redwood.backends.offload import file as offload_file
from redwood.backends.offload import load as offload_load
from redwood.backends.offload.backend import OffloadBackend


@contextmanager
def small_pieces(size: int = 4096) -> Iterator[None]:
    """Tensors of a tiny model count as large, and are cut into pieces of this many bytes."""
    with (
        mock.patch.object(offload_load, "SMALL", 64),
        mock.patch.object(offload_file, "PIECE_BYTES", size),
    ):
        yield


def opened(folder: Path, weights: str = "f32", **options: Any) -> OffloadBackend:
    """The offload backend of a folder, on the CPU."""
    with small_pieces():
        return load_offload(folder, name=str(folder), weights=weights, **options)


def offloaded(model: Any) -> OffloadBackend:
    """The same of a model in memory."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        made = opened(Path(folder))
    assert made.stream.total_bytes > 0 and torch.get_num_threads() >= 1
    return made
