"""From the weights of a file to the packed arrays that the native decoder reads."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from redwood.backends.native.backend import extension
from redwood.backends.native.finite import check_weights
from redwood.backends.native.roles import GLOBAL_ROLES, LAYER_ROLES, MATRICES
from redwood.backends.native.weights import Weight, WeightSource
from redwood.errors import ArgumentError, UnsupportedError

WEIGHTS = ("auto", "int4", "int8", "bf16", "f32", "draft")
_FLOATS = ("F32", "F16", "BF16")
_FORMATS = {"int4": "a4m", "int8": "a8", "bf16": "bf16", "f32": "f32"}
# Embeddings and the head stay at 8 bits: errors there hurt every token directly.
_FINE = ("embed", "ple_embed", "output")
# Small, and an error there gives a token to other experts, or stays in a state: always as the file
# holds them.
_EXACT = ("router", "shared_switch", "alpha", "beta")


def matrix_weights(source: WeightSource) -> Iterator[tuple[str, Weight]]:
    """Yields the matrices of a model by name, in the order in which a forward reads them."""
    for name, weight in _named(source):
        if name.split(".")[-1] in MATRICES:
            yield name, weight


def vectors(source: WeightSource) -> dict[str, NDArray[np.float32]]:
    """Returns norms and biases by name, in float32."""
    return {
        name: _numbers(name, weight)
        for name, weight in _named(source)
        if name.split(".")[-1] not in MATRICES
    }


def format_of(name: str, weight: Weight, weights: str) -> str:
    """Returns the packed format for a matrix.

    Args:
        weights: "auto" keeps the numbers of the file exactly, and so does "f32"; "bf16" rounds
            them; "int8" and "int4" requantise what the file holds as floats; "draft" requantises
            what takes more than 4 bits to them, but for embeddings: who drafts must be quick.

    Raises:
        UnsupportedError: a kind of weights that is not computed here.
        ArgumentError: requantising what is quantised already.
    """
    exact: str | None = extension().kinds(weight.kind)
    if exact is None:
        raise UnsupportedError(f"weights of kind {weight.kind} ({name}) are not computed here")
    kept = name.split(".")[-1] in _EXACT
    if weights == "auto" or kept or (weights == "draft" and name in ("embed", "ple_embed")):
        return exact
    if weights == "draft":
        sizes = [extension().packed_bytes(f, weight.rows, weight.cols) for f in (exact, "a4")]
        return exact if sizes[0] < sizes[1] else "a4"
    if weight.kind not in _FLOATS and weights in ("int4", "int8"):
        raise ArgumentError(
            f"weights={weights!r} needs a model in floats: {name} is {weight.kind} already"
        )
    return _FORMATS["int8" if weights == "int4" and name in _FINE else weights]


def packed_size(name: str, weight: Weight, weights: str) -> int:
    """Returns the bytes that a matrix takes when packed; errors as `format_of`."""
    return int(extension().packed_bytes(format_of(name, weight, weights), weight.rows, weight.cols))


def pack(name: str, weight: Weight, weights: str, out: NDArray[np.uint8], threads: int) -> None:
    """Packs a matrix into `out`, uint8 [packed_size].

    Raises:
        NumericalError: weights that are NaN or infinite. Others as `format_of`.
    """
    raw = weight.read()
    check_weights(name, weight.kind, raw)
    extension().pack(
        weight.kind,
        raw,
        weight.rows,
        weight.cols,
        weight.row_order,
        format_of(name, weight, weights),
        out,
        threads,
    )


def _named(source: WeightSource) -> Iterator[tuple[str, Weight]]:
    for layer in (None, *range(source.spec.layers)):
        for role in GLOBAL_ROLES if layer is None else LAYER_ROLES:
            weight = source.get(role, layer)
            if weight is not None:
                yield role if layer is None else f"{layer}.{role}", weight


def _numbers(name: str, weight: Weight) -> NDArray[np.float32]:
    out, raw = np.empty((weight.rows, weight.cols), np.float32), weight.read()
    check_weights(name, weight.kind, raw)
    extension().read(weight.kind, raw, out)
    if weight.row_order is not None:
        out = out[weight.row_order]
    made = (out.reshape(-1) + np.float32(weight.add)) * np.float32(weight.times)
    return made.astype(np.float32)
