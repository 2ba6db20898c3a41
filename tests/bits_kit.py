"""Models whose every bit is written down here, and runs of them: the same on every machine.

Weights are bits of a counter-based generator scaled by powers of two, so that no library's random
numbers and no rounding stand between two machines.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from decoder_kit import tiny_config
from redwood.backends.base import AcceptedPath, Nodes
from redwood.backends.native import load as native_load
from redwood.backends.native import packed as packed_files
from redwood.backends.native.backend import NativeBackend, Packed, extension
from redwood.backends.native.roles import shapes
from redwood.backends.native.spec import DecoderSpec
from redwood.backends.native.spec_hf import spec_from_config
from redwood.backends.native.weights import Weight, WeightSource
from redwood.models._gguf import BLOCKS

EMULATED = ("amx-emulated",)
"""Instruction sets that plain C++ stands in for; they are not offered, and run by their name."""

_BITS = {"F32": 24, "F16": 12, "BF16": 9}  # sign and digits that a kind of float holds exactly
# Where a block holds its fp16 scale, the power of two that this is near, and where a minimum is,
# with the power of two between both. All other bytes of a block may be anything.
_SCALES: dict[str, tuple[int, int, int | None, int]] = {
    "Q4_0": (0, -6, None, 0),
    "Q4_1": (0, -6, 2, 3),
    "Q5_0": (0, -7, None, 0),
    "Q5_1": (0, -7, 2, 4),
    "Q8_0": (0, -10, None, 0),
    "Q3_K": (108, -9, None, 0),
    "Q4_K": (0, -11, 2, 3),
    "Q5_K": (0, -12, 2, 4),
    "Q6_K": (208, -15, None, 0),  # subnormal numbers
    "Q2_K": (80, -8, 82, 1),
    "IQ4_NL": (0, -10, None, 0),
    "IQ4_XS": (0, -14, None, 0),
    "IQ3_S": (0, -11, None, 0),
    "IQ3_XXS": (0, -12, None, 0),
    **dict.fromkeys(("IQ2_S", "IQ2_XS", "IQ2_XXS"), (0, -10, None, 0)),
    "IQ1_S": (0, -7, None, 0),
    "TQ1_0": (52, -4, None, 0),
    "TQ2_0": (64, -4, None, 0),
}
_ODD = ("IQ1_M", "MXFP4", "NVFP4")
"""Their scales are no fp16 numbers in one place."""
KINDS = (*_BITS, *_SCALES, *_ODD)


def raw(name: str, count: int) -> NDArray[np.uint64]:
    """Random bits that depend on a name alone: NumPy promises that Philox's stream stays."""
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    return np.asarray(np.random.Philox(key=key).random_raw(count))


def below(name: str, bounds: int | list[int], count: int) -> list[int]:
    """Whole numbers, each below its bound."""
    bounds = [bounds] * count if isinstance(bounds, int) else bounds
    return [int(bits) % bound for bits, bound in zip(raw(name, count), bounds, strict=True)]


def _around(name: str, count: int, bits: int, middle: float = 0.0) -> NDArray[np.float32]:
    """Numbers of so many bits within 1/8 of `middle`, exact."""
    whole = (raw(name, count) >> np.uint64(64 - bits)).astype(np.int64) - (1 << bits - 1)
    return (middle + whole * 2.0 ** -(bits + 2)).astype(np.float32)


def _halves(bits: NDArray[np.uint64], power: int, sign: int | None) -> NDArray[np.uint8]:
    """fp16 numbers in [2^power, 2^(power + 1)), as bytes [n, 2]; sign None: any."""
    signs = bits >> np.uint64(10) & np.uint64(1) if sign is None else np.uint64(sign)
    made = bits & np.uint64(1023) | np.uint64(power + 15 << 10) | signs << np.uint64(15)
    return made.astype("<u2").view(np.uint8).reshape(-1, 2)


def stored(name: str, kind: str, rows: int, cols: int) -> NDArray[np.uint8]:
    """A matrix as a file holds it."""
    if kind in _BITS:
        numbers = _around(name, rows * cols, _BITS[kind])
        if kind == "BF16":
            return (numbers.view(np.uint32) >> 16).astype("<u2").view(np.uint8)
        return numbers.astype("<f2" if kind == "F16" else "<f4").view(np.uint8)
    step, size = BLOCKS[kind]
    count = rows * cols // step
    words = raw(name, -(-count * size // 8)).astype("<u8").view(np.uint8)
    blocks = words[: count * size].reshape(count, size).copy()
    bits = raw(f"{name} scales", count)
    if kind in _ODD:
        _put_odd_scales(kind, blocks, bits)
        return blocks.reshape(-1)
    at, power, least, between = _SCALES[kind]
    blocks[:, at : at + 2] = _halves(bits, power, None if least is None else 0)
    if least is not None:  # K kinds take a minimum off, the others add it
        negative = 0 if kind.endswith("K") else 1
        blocks[:, least : least + 2] = _halves(bits, power + between, negative)
    return blocks.reshape(-1)


def _put_odd_scales(kind: str, blocks: NDArray[np.uint8], bits: NDArray[np.uint64]) -> None:
    if kind == "MXFP4":  # a power of two
        blocks[:, 0] = 120 + bits % 3
    elif kind == "NVFP4":  # 4 digits, the point after the first, times a power of two
        blocks[:, :4] = 8 + bits[:, None] // np.array([1, 16, 256, 4096], np.uint64) % 16
    else:  # fp16, a nibble at the end of each of four words
        halves = _halves(bits, -7, None).view("<u2")
        nibbles = halves >> np.array([0, 4, 8, 12], np.uint16) & 15
        blocks[:, 49::2] = blocks[:, 49::2] & 15 | nibbles << 4


def made_weights(spec: DecoderSpec, kind: str) -> WeightSource:
    """Weights for a spec: matrices of one kind, norms and biases in float32."""
    weights: dict[tuple[str, int | None], Weight] = {}
    for layer in (None, *range(spec.layers)):
        for role, (rows, cols, _) in shapes(spec, layer).items():
            name = f"{role} {layer}"
            if rows:
                weight = Weight(kind, rows, cols, load=partial(stored, name, kind, rows, cols))
            else:
                numbers = _around(name, cols, 20, 1.0 if role.endswith("norm") else 0.0)
                weight = Weight("F32", 1, cols, load=partial(numbers.view, np.uint8))
            weights[role, layer] = weight
    return WeightSource(spec, weights, close=lambda: None)


def made_spec(family: str, **changes: Any) -> DecoderSpec:
    """A model of a family, wide enough for super-blocks, with heads of 64."""
    fields: dict[str, Any] = {"vocab_size": 100, "hidden_size": 256, "intermediate_size": 512}
    fields |= {"num_hidden_layers": 2, "max_position_embeddings": 2048}
    fields |= {"bos_token_id": 1, "eos_token_id": 2}
    if family not in ("llama", "qwen2", "phi3"):
        fields["head_dim"] = 64
    if family == "gemma3":
        fields["layer_types"] = ["sliding_attention", "full_attention"]
    return spec_from_config(tiny_config(family, **{**fields, **changes}), Path(family))


@dataclass(frozen=True)
class Made:
    """A model, packed once for all instruction sets."""

    spec: DecoderSpec
    matrices: Packed
    vectors: Mapping[str, NDArray[np.float32]]

    @classmethod
    def of(cls, spec: DecoderSpec, kind: str, weights: str = "auto") -> Made:
        """Packs weights as `load_native` does."""
        source = made_weights(spec, kind)
        matrices = native_load._matrices(source, [], weights, 1, "made")
        if spec.tied:
            matrices["output"] = matrices["embed"]
        return cls(spec, matrices, packed_files.vectors(source))

    def backend(self, isa: str, kv: str = "f16", threads: int = 1) -> NativeBackend:
        """The model on an instruction set."""
        return NativeBackend(
            self.spec, self.matrices, self.vectors, capacity=2048, kv=kv, isa=isa, threads=threads
        )


def instruction_sets() -> list[str]:
    """All that this machine runs, and those that are emulated."""
    native = extension()
    names = list(native.instruction_sets())
    packed = np.zeros(native.packed_bytes("a8", 16, 32), np.uint8)
    for name in EMULATED:
        try:
            x, out = np.zeros((1, 32), np.float32), np.empty((1, 16), np.float32)
            native.product(name, "a8", packed, 16, x, out)
        except ValueError:  # not in this extension
            continue
        names += [] if name in names else [name]
    return names


def logits_of(
    backend: NativeBackend, prompt: int = 26, nodes: int = 13, scored: int | None = None
) -> NDArray[np.float32]:
    """Logits of a prompt in two chunks, of a tree, and of another behind a path of the first.

    Args:
        scored: logits of so many tokens of each chunk, the last ones; None: all.
    """
    row, found = backend.open(), []

    def add(name: str, size: int, parents: list[int] | None, count: int | None) -> None:
        tokens = below(name, backend.vocab_size, size)
        found.append(backend.extend([Nodes(row, tokens, parents, num_logits=count)])[0].numpy())

    for name, size in (("first", prompt - prompt // 3), ("second", prompt // 3)):
        add(name, size, None, scored)
        backend.commit([AcceptedPath(row, range(size))])
    for name in ("tree", "other tree"):
        back = below(f"{name} parents", [min(i + 1, 6) for i in range(nodes)], nodes)
        parents = [i - 1 - steps for i, steps in enumerate(back)]
        add(name, nodes, parents, None)
        path = [nodes - 1]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        backend.commit([AcceptedPath(row, path)])
    backend.release(row)
    logits = np.concatenate(found)
    assert np.isfinite(logits).all()
    return logits


def first_difference(a: NDArray[np.float32], b: NDArray[np.float32]) -> str:
    """Where two tables of logits differ first in a bit; empty: nowhere."""
    places = np.argwhere(a.view(np.uint32) != b.view(np.uint32))
    if not len(places):
        return ""
    row, column = places[0].tolist()
    x, y = float(a[row, column]), float(b[row, column])
    return f"{len(places)} of {a.size}, first node {row} token {column}: {x.hex()}, {y.hex()}"
