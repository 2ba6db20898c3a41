"""Modules whose weights come from a `Stream`, in the place of those of a Transformers model.

The model itself is made without weights. Its linear layers multiply piece by piece; its embedding
reads the rows it needs; other large tensors, such as routers, are put in place while their
module runs (experts: `streamed_experts`). What is small stays in memory.
"""

from __future__ import annotations

import os
import weakref
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from redwood.backends.offload.forms import Form, TorchForm
from redwood.errors import ModelError


class Part(NamedTuple):
    """Rows `first` and following of a matrix: a piece of the stream."""

    piece: int
    first: int
    rows: int


class Matrix(NamedTuple):
    """A matrix of the file: its shape, and its rows in order."""

    rows: int
    cols: int
    parts: tuple[Part, ...]


class Pieces(Protocol):
    """Where pieces come from."""

    def piece(self, index: int) -> AbstractContextManager[Tensor]:
        """Lends the bytes of a piece on the device that computes: uint8."""
        ...


class StreamedLinear(nn.Module):
    """Stands for an `nn.Linear`.

    Args:
        matrix: its weight.
        form: how that is stored.
        bias: [rows], or None.
    """

    def __init__(self, matrix: Matrix, form: Form, pieces: Pieces, bias: Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features = matrix.cols, matrix.rows
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._matrix, self._form, self._pieces = matrix, form, pieces

    def forward(self, x: Tensor) -> Tensor:
        """Returns x [..., in_features] times the weight, plus bias: [..., out_features]."""
        flat = x.reshape(-1, self.in_features)
        out = x.new_empty(len(flat), self.out_features)
        for part in self._matrix.parts:
            with self._pieces.piece(part.piece) as data:
                made = self._form.multiply(data, part.rows, flat)
            out[:, part.first : part.first + part.rows] = made
        if self.bias is not None:
            out += self.bias
        return out.reshape(*x.shape[:-1], self.out_features)


class StreamedEmbedding(nn.Module):
    """Stands for an `nn.Embedding`: reads the rows it is asked for, once each.

    Args:
        path, offset: where the rows are.
        form: how they are stored.
        shape: rows and columns.
        scale: what the rows are multiplied with, as some models do.
    """

    def __init__(
        self,
        path: Path,
        offset: int,
        form: TorchForm,
        shape: tuple[int, int],
        like: Tensor,
        scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = shape
        self._path, self._offset, self._form, self._scale = path, offset, form, scale
        self._handle = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._handle)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._handle, 0, 0, os.POSIX_FADV_RANDOM)
        self._like = like

    def forward(self, ids: Tensor) -> Tensor:
        """Returns the rows of ids [...]: [..., embedding_dim].

        Raises:
            ModelError: the disk could not read one.
        """
        size = self._form.size(1, self.embedding_dim)
        wanted, places = torch.unique(ids.cpu(), return_inverse=True)
        try:
            found = [os.pread(self._handle, size, self._offset + i * size) for i in wanted.tolist()]
        except OSError as error:
            raise ModelError(f"{self._path} cannot be read: {error.strerror}") from error
        if any(len(row) != size for row in found):
            raise ModelError(f"{self._path} was cut off while it was in use")
        data = torch.from_numpy(np.frombuffer(b"".join(found), np.uint8).copy())
        rows = self._form.unpack(data, len(found), self.embedding_dim, self._like.dtype)
        if self._scale is not None:
            rows = rows * self._scale.to(rows)
        return rows[places].to(self._like.device)


def lend(
    module: nn.Module, name: str, matrix: Matrix, form: TorchForm, pieces: Pieces, like: Tensor
) -> None:
    """Puts a large parameter in place while its module runs, and takes it away after that."""
    whole = module._parameters[name]
    assert whole is not None
    shape, dtype = whole.shape, whole.dtype
    empty = module._parameters[name] = nn.Parameter(like, requires_grad=False)

    def put(*_: Any) -> None:
        rows = []
        for part in matrix.parts:
            with pieces.piece(part.piece) as data:
                rows.append(form.unpack(data, part.rows, matrix.cols, dtype).clone())
        module._parameters[name] = nn.Parameter(torch.cat(rows).reshape(shape), requires_grad=False)

    def take(*_: Any) -> None:
        module._parameters[name] = empty

    module.register_forward_pre_hook(put)
    module.register_forward_hook(take, always_call=True)
