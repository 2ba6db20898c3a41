"""Where each weight of a decoder lies: one view of GGUF files and of safetensors folders.

A source names weights by role. Every tensor of the file must have a role and the shape that the
spec says, so that nothing is missing, and nothing is left out in silence. Bytes are views of the
mapped files, in the order and format of the file; no pickle is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from redwood.backends.native.safetensors_file import Bytes, Stored, stored_tensors
from redwood.backends.native.spec import GEMMA, DecoderSpec
from redwood.backends.native.spec_gguf import spec_from_gguf
from redwood.backends.native.spec_hf import spec_from_folder
from redwood.errors import ArgumentError, ModelError, UnsupportedError
from redwood.models._gguf import BLOCKS
from redwood.models._gguf_parts import GGUFModel

GLOBAL_ROLES = ("embed", "output_norm", "output")
LAYER_ROLES = (
    *("attn_norm", "q", "k", "v", "q_bias", "k_bias", "v_bias", "q_norm", "k_norm"),
    *("o", "o_bias", "post_attn_norm", "ffn_norm", "gate", "up", "down", "post_ffn_norm"),
)


@dataclass(frozen=True)
class Weight:
    """A matrix [rows, cols], or a vector as one row.

    Attributes:
        kind: format of the numbers: a key of `redwood.models._gguf.BLOCKS`, such as "Q4_K", "BF16".
        row_order: [rows] int32; the row r that the decoder wants is row row_order[r] of `read`.
            None: they are in order.
        add: to be added to each number (Gemma stores its norms less 1 in safetensors).
    """

    kind: str
    rows: int
    cols: int
    row_order: NDArray[np.int32] | None = field(default=None, repr=False, compare=False)
    add: float = 0.0
    load: Callable[[], Bytes] = field(kw_only=True, repr=False, compare=False)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return _row_bytes(self.kind, self.cols)

    def read(self) -> Bytes:
        """Returns the rows: uint8 [rows * row_bytes], contiguous, read-only, in file order.

        A view of the mapped file where that is possible; it may be unaligned.
        """
        return self.load()


class _Place(NamedTuple):
    """Where a role is: rows `start` and following of a tensor with `total` rows."""

    name: str
    start: int
    total: int


class WeightSource:
    """The weights of one model; a context manager.

    Views that `Weight.read` returned stay good after `close`; new ones need an open source.

    Attributes:
        spec: what the weights are for.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        weights: Mapping[tuple[str, int | None], Weight],
        close: Callable[[], None],
        forget: Callable[[], None] = lambda: None,
    ) -> None:
        self.spec = spec
        self._weights = weights
        self.close = close
        self.forget = forget
        """Gives back the memory of what was read so far; it is read again where needed."""

    def get(self, role: str, layer: int | None = None) -> Weight | None:
        """Returns a weight, or None if the model has none in that role (tied output: None).

        Args:
            role: of GLOBAL_ROLES without a layer, or of LAYER_ROLES with one.

        Raises: ArgumentError for an unknown role or layer.
        """
        if role not in (GLOBAL_ROLES if layer is None else LAYER_ROLES):
            raise ArgumentError(f"weight {role!r} of layer {layer} is unknown")
        if layer is not None and not 0 <= layer < self.spec.layers:
            raise ArgumentError(f"layer {layer} is not in 0 to {self.spec.layers - 1}")
        return self._weights.get((role, layer))

    def __enter__(self) -> WeightSource:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def open_gguf(path: Path, capacity: int | None = None) -> WeightSource:
    """Returns the weights of a GGUF file, or of all parts of the model that it is a part of.

    Args:
        capacity: positions that will be used; it chooses rotary frequencies, see `make_rope`.

    Raises:
        ModelError: a damaged file, a missing tensor or one of the wrong shape.
        UnsupportedError: a model that is not computed here, or a tensor that would be left out.
        ArgumentError: a capacity below 1.
    """
    file = GGUFModel(path)
    try:
        spec = spec_from_gguf(file, capacity)
        stored = {
            name: Stored(tensor.kind, tensor.shape, partial(file.data, name))
            for name, tensor in file.tensors.items()
            if name not in _GGUF_CONSUMED and not name.endswith(".attn_rot_embd.weight")
        }
        weights = _assign(
            spec, stored, partial(_gguf_place, spec.architecture), path, r"blk\.(\d+)\."
        )
        if spec.architecture == "llama":
            weights = {key: _unpermuted(spec, key[0], w) for key, w in weights.items()}
    except BaseException:
        file.close()
        raise
    return WeightSource(spec, weights, file.close, file.forget)


def open_folder(path: Path, capacity: int | None = None) -> WeightSource:
    """Returns the weights of a folder with config.json and safetensors.

    Args and Raises: as `open_gguf`.
    """
    spec = spec_from_folder(path, capacity)
    with ExitStack() as stack:
        stored = {
            name: tensor
            for name, tensor in stored_tensors(path, stack).items()
            if not name.endswith(".rotary_emb.inv_freq")  # old Llama files; Transformers skips it
        }
        if spec.tied and "lm_head.weight" in stored:
            spec = _untied_if_different(spec, stored)
        place = partial(_folder_place, spec.architecture)
        weights = _assign(spec, stored, place, path, r"model\.layers\.(\d+)\.")
        if spec.architecture in GEMMA:
            weights = {
                key: replace(weight, add=1.0) if key[0].endswith("norm") else weight
                for key, weight in weights.items()
            }
        return WeightSource(spec, weights, stack.pop_all().close)
    raise AssertionError  # an ExitStack of ours swallows nothing


def _row_bytes(kind: str, cols: int) -> int:
    elements, size = BLOCKS[kind]
    return cols // elements * size


def _shapes(spec: DecoderSpec) -> dict[str, tuple[int, int]]:
    """Rows and columns of every role that the model has; 0 rows mark a vector."""
    q, kv, hidden = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim, spec.hidden
    shapes = {"embed": (spec.vocab_size, hidden), "output_norm": (0, hidden)}
    if not spec.tied:
        shapes["output"] = (spec.vocab_size, hidden)
    shapes |= {"attn_norm": (0, hidden), "q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden)}
    if spec.attention_bias:
        shapes |= {"q_bias": (0, q), "k_bias": (0, kv), "v_bias": (0, kv)}
    if spec.qk_norm:
        shapes |= {"q_norm": (0, spec.head_dim), "k_norm": (0, spec.head_dim)}
    shapes |= {"o": (hidden, q), "ffn_norm": (0, hidden)}
    if spec.output_bias:
        shapes["o_bias"] = (0, hidden)
    if spec.post_norms:
        shapes |= {"post_attn_norm": (0, hidden), "post_ffn_norm": (0, hidden)}
    return shapes | {
        "gate": (spec.ffn, hidden),
        "up": (spec.ffn, hidden),
        "down": (hidden, spec.ffn),
    }


_Find: TypeAlias = Callable[[str, int | None, dict[str, tuple[int, int]]], _Place]


def _assign(
    spec: DecoderSpec, stored: Mapping[str, Stored], find: _Find, where: Path, layer_name: str
) -> dict[tuple[str, int | None], Weight]:
    """Gives every role its tensor and every tensor a role."""
    shapes = _shapes(spec)
    layers: list[int | None] = [None, *range(spec.layers)]
    weights, used = {}, set()
    for layer in layers:
        for role in shapes:
            if (role in GLOBAL_ROLES) == (layer is None):
                place = find(role, layer, shapes)
                weights[role, layer] = _weight(stored, place, shapes[role], where)
                used.add(place.name)
    for name in stored:
        if name not in used:
            raise _left_over(name, spec, where, layer_name)
    return weights


def _left_over(name: str, spec: DecoderSpec, where: Path, layer_name: str) -> Exception:
    match = re.match(layer_name, name)
    if match and int(match[1]) >= spec.layers:
        return ModelError(f"{where} has the tensor {name!r} and says it has {spec.layers} layers")
    return UnsupportedError(
        f"{where}: the tensor {name!r} is no part of a {spec.architecture} model as computed here"
    )


def _weight(
    stored: Mapping[str, Stored], place: _Place, shape: tuple[int, int], where: Path
) -> Weight:
    if place.name not in stored:
        raise ModelError(f"{where} lacks the tensor {place.name!r}")
    tensor, (rows, cols) = stored[place.name], shape
    expected = (place.total, cols) if rows else (cols,)
    if tensor.shape != expected:
        raise ModelError(
            f"{where}: the tensor {place.name!r} has shape {tensor.shape} instead of {expected}"
        )
    load = tensor.load
    if rows != place.total:
        size = _row_bytes(tensor.kind, cols)
        load = partial(_part, load, place.start * size, rows * size)
    return Weight(tensor.kind, rows or 1, cols, load=load)


def _part(load: Callable[[], Bytes], start: int, size: int) -> Bytes:
    return load()[start : start + size]


def _fused(
    name: str, role: str, shapes: dict[str, tuple[int, int]], roles: tuple[str, ...]
) -> _Place:
    """Rows of a role in a tensor that stacks several."""
    rows = [shapes[part][0] for part in roles]
    index = roles.index(role)
    return _Place(name, sum(rows[:index]), sum(rows))


_QKV, _GATE_UP = ("q", "k", "v"), ("gate", "up")

_GGUF_CONSUMED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_GGUF = {
    "embed": "token_embd.weight",
    "output_norm": "output_norm.weight",
    "output": "output.weight",
    "attn_norm": "attn_norm.weight",
    **{role: f"attn_{role}.weight" for role in ("q", "k", "v", "q_norm", "k_norm")},
    **{f"{role}_bias": f"attn_{role}.bias" for role in ("q", "k", "v")},
    "o": "attn_output.weight",
    "o_bias": "attn_output.bias",
    "post_attn_norm": "post_attention_norm.weight",
    "ffn_norm": "ffn_norm.weight",
    **{role: f"ffn_{role}.weight" for role in ("gate", "up", "down")},
    "post_ffn_norm": "post_ffw_norm.weight",
}


def _gguf_place(
    architecture: str, role: str, layer: int | None, shapes: dict[str, tuple[int, int]]
) -> _Place:
    prefix = "" if layer is None else f"blk.{layer}."
    if architecture == "phi3" and role in _QKV:
        return _fused(f"{prefix}attn_qkv.weight", role, shapes, _QKV)
    if architecture == "phi3" and role in _GATE_UP:
        return _fused(f"{prefix}ffn_up.weight", role, shapes, _GATE_UP)
    return _Place(prefix + _GGUF[role], 0, shapes[role][0])


def _unpermuted(spec: DecoderSpec, role: str, weight: Weight) -> Weight:
    """Undoes what llama.cpp's converter does to llama files: it stores component i of the first
    half of a head beside component i of the second, since its rotary positions turn neighbours.
    """
    if role not in ("q", "k", "q_bias", "k_bias"):
        return weight
    heads = spec.heads if role[0] == "q" else spec.kv_heads
    pairs = np.arange(heads * spec.head_dim, dtype=np.int32).reshape(heads, -1, 2)
    order = np.ascontiguousarray(pairs.transpose(0, 2, 1)).reshape(-1)
    if role in ("q", "k"):
        return replace(weight, row_order=order)
    return replace(weight, load=partial(_reordered, weight, order))


def _reordered(weight: Weight, order: NDArray[np.int32]) -> Bytes:
    numbers = weight.read().reshape(weight.cols, -1)[order].reshape(-1)
    numbers.flags.writeable = False
    return numbers


_HF = {
    "embed": "model.embed_tokens.weight",
    "output_norm": "model.norm.weight",
    "output": "lm_head.weight",
    "attn_norm": "input_layernorm.weight",
    **{role: f"self_attn.{role}_proj.weight" for role in ("q", "k", "v", "o")},
    **{f"{role}_bias": f"self_attn.{role}_proj.bias" for role in ("q", "k", "v", "o")},
    **{role: f"self_attn.{role}.weight" for role in ("q_norm", "k_norm")},
    "ffn_norm": "post_attention_layernorm.weight",
    **{role: f"mlp.{role}_proj.weight" for role in ("gate", "up", "down")},
}
_HF_GEMMA = {
    "post_attn_norm": "post_attention_layernorm.weight",
    "ffn_norm": "pre_feedforward_layernorm.weight",
    "post_ffn_norm": "post_feedforward_layernorm.weight",
}


def _folder_place(
    architecture: str, role: str, layer: int | None, shapes: dict[str, tuple[int, int]]
) -> _Place:
    if layer is None:
        return _Place(_HF[role], 0, shapes[role][0])
    prefix = f"model.layers.{layer}."
    if architecture == "phi3" and role in _QKV:
        return _fused(f"{prefix}self_attn.qkv_proj.weight", role, shapes, _QKV)
    if architecture == "phi3" and role in _GATE_UP:
        return _fused(f"{prefix}mlp.gate_up_proj.weight", role, shapes, _GATE_UP)
    names = _HF | _HF_GEMMA if architecture in GEMMA else _HF
    return _Place(prefix + names[role], 0, shapes[role][0])


def _untied_if_different(spec: DecoderSpec, stored: dict[str, Stored]) -> DecoderSpec:
    """As Transformers does: two unequal tensors in the file overrule a config that says tied."""
    head, embedding = stored["lm_head.weight"], stored.get("model.embed_tokens.weight")
    same = embedding is not None and head[:2] == embedding[:2]
    if same and embedding is not None and np.array_equal(head.load(), embedding.load()):
        del stored["lm_head.weight"]
        return spec
    return replace(spec, tied=False)
