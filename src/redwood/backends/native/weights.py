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
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from redwood.backends.native.families import NORMS_LESS_ONE, QKV
from redwood.backends.native.latent_weights import expanded, gguf_expanded
from redwood.backends.native.recurrent import special_places
from redwood.backends.native.roles import (
    GLOBAL_ROLES,
    LANES,
    LAYER_ROLES,
    Shape,
    family_of,
    folder_name,
    gguf_name,
    shapes,
)
from redwood.backends.native.safetensors_file import Bytes, Stored, stored_tensors
from redwood.backends.native.spec import DecoderSpec
from redwood.backends.native.spec_gguf import spec_from_gguf
from redwood.backends.native.spec_hf import spec_from_folder
from redwood.backends.native.stacked import (
    Places,
    chunks,
    folder_experts,
    fused_experts,
    stacked_experts,
    text_part,
    without_shared,
)
from redwood.errors import ArgumentError, ModelError, UnsupportedError
from redwood.models._gguf import BLOCKS
from redwood.models._gguf_parts import GGUFModel

_QKV_BIAS = tuple(f"{role}_bias" for role in QKV)
_UNREAD = frozenset({"F64", "I8", "I16", "I32", "I64", "Q8_1", "Q8_K", "Q1_0"})
"""Kinds of `BLOCKS` that the extension does not read."""
_GGUF_CONSUMED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


@dataclass(frozen=True)
class Weight:
    """A matrix [rows, cols], or a vector as one row.

    Attributes:
        kind: format of the numbers: a key of `redwood.models._gguf.BLOCKS`, such as "Q4_K", "BF16".
        row_order: [rows] int32; the row r that the decoder wants is row row_order[r] of `read`.
            None: they are in order.
        add: to be added to each number (Gemma stores its norms less 1 in safetensors).
        times: multiplies each number after that.
    """

    kind: str
    rows: int
    cols: int
    row_order: NDArray[np.int32] | None = field(default=None, repr=False, compare=False)
    add: float = 0.0
    times: float = 1.0
    load: Callable[[], Bytes] = field(kw_only=True, repr=False, compare=False)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        elements, size = BLOCKS[self.kind]
        return self.cols // elements * size

    def read(self) -> Bytes:
        """Returns the rows: uint8 [rows * row_bytes], contiguous, read-only, in file order.

        A view of the mapped file where that is possible; it may be unaligned.
        """
        return self.load()


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
        stored = without_shared(stored, spec, "blk.{}.", "attn_{}", ("k", "v", "k_norm"))
        weights = _assign(spec, stored, path, partial(_gguf_weight, path), r"blk\.(\d+)\.")
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
        if family_of(spec).images[0]:
            stored = text_part(stored)
        roles = ("k_proj", "v_proj", "k_norm", "v_norm")
        stored = without_shared(stored, spec, "model.layers.{}.", "self_attn.{}", roles)
        if family_of(spec).recurrent == "mamba":
            stored = {_plain_name(name): held for name, held in stored.items()}
        if family_of(spec).ignored:
            gone = family_of(spec).ignored
            stored = {name: held for name, held in stored.items() if not name.startswith(gone)}
        if spec.tied and "lm_head.weight" in stored:
            spec = _untied_if_different(spec, stored)
        weights = _assign(
            spec, stored, path, partial(_folder_weight, path), r"model\.layers\.(\d+)\."
        )
        if spec.architecture in NORMS_LESS_ONE or family_of(spec).centred:
            weights = {key: _centred(key[0], weight) for key, weight in weights.items()}
        return WeightSource(spec, weights, stack.pop_all().close)
    raise AssertionError  # an ExitStack of ours swallows nothing


def _plain_name(name: str) -> str:
    """What Transformers' modules call a tensor of Mamba-2's and Nemotron-H's older files."""
    return re.sub(
        r"^model\.embedding\.", "model.embeddings.", re.sub("^backbone\\.", "model.", name)
    )


def _centred(role: str, weight: Weight) -> Weight:
    is_centred = role.endswith("norm") and role != "state_norm"
    return replace(weight, add=1.0) if is_centred else weight


_Find: TypeAlias = Callable[[DecoderSpec, Mapping[str, Stored], str, int | None, Shape], Places]


def _assign(
    spec: DecoderSpec, stored: Mapping[str, Stored], where: Path, find: _Find, layer_name: str
) -> dict[tuple[str, int | None], Weight]:
    """Gives every role its tensor and every tensor a role."""
    weights, used = {}, set[str]()
    for layer in (None, *range(spec.layers)):
        for role, shape in shapes(spec, layer).items():
            places = find(spec, stored, role, layer, shape)
            for name in places.names:
                if stored[name].kind in _UNREAD:
                    raise UnsupportedError(
                        f"{where}: the tensor {name!r} is {stored[name].kind}, a kind of numbers "
                        "that is not computed here"
                    )
            weights[role, layer] = _weight(spec, role, shape, places)
            used.update(places.names)
    found = {name: re.match(layer_name, name) for name in stored}
    # A layer that drafts joins a token to a hidden state; one that does not is a layer too many.
    drafting = {match[1] for name, match in found.items() if match and "eh_proj." in name}
    for name, match in found.items():
        unread = (
            match and match[1] in drafting and 0 <= int(match[1]) - spec.layers < spec.unread_layers
        )
        if name not in used and not unread:
            raise _left_over(name, spec, where, match)
    return weights


def _left_over(name: str, spec: DecoderSpec, where: Path, match: re.Match[str] | None) -> Exception:
    if match and int(match[1]) >= spec.layers:
        return ModelError(f"{where} has the tensor {name!r} and says it has {spec.layers} layers")
    return UnsupportedError(
        f"{where}: the tensor {name!r} is no part of a {spec.architecture} model as computed here"
    )


def _weight(spec: DecoderSpec, role: str, shape: Shape, places: Places) -> Weight:
    kind, load = places.kind, places.load
    if not shape.rows:
        weight = Weight(kind, 1, shape.cols * shape.experts, load=load)
        if places.neighbours and spec.ropes and role in ("q_bias", "k_bias"):
            weight = replace(weight, load=partial(_reordered, weight, _halves(spec, role)))
        return replace(weight, times=_times(spec, role))
    turned = places.neighbours and bool(spec.ropes) and role in ("q", "k", "kv_a")
    order = _halves(spec, role) if turned else places.order
    rows = shape.rows * shape.experts
    if shape.experts > 1 and shape.rows % LANES:  # whole blocks; rows after the last stand unread
        padded = -(-shape.rows // LANES) * LANES
        inside = np.minimum(np.arange(padded), shape.rows - 1)
        first = np.arange(shape.experts)[:, None] * shape.rows
        order = np.ascontiguousarray((first + inside).reshape(-1), np.int32)
        rows = padded * shape.experts
    return Weight(kind, rows, shape.cols, order, load=load)


def _times(spec: DecoderSpec, role: str) -> float:
    """What multiplies a vector; multipliers of products pass over their biases."""
    by = spec.multipliers
    if role in ("output_norm", "output_norm_bias"):
        return spec.logit_scale
    if role in ("q_bias", "k_bias", "v_bias"):
        return 1 / by.attention_input
    outputs = {"state_o_bias": by.state, "down_bias": by.mlp}
    outputs["o_bias"] = by.attention / by.attention_input
    outputs |= {"router_norm": spec.hidden**-0.5, "altup_router_norm": 1 / spec.hidden}
    return outputs.get(role, 1.0)


def _halves(spec: DecoderSpec, role: str) -> NDArray[np.int32]:
    """Where a file's rotary positions turn neighbours: puts the first of each pair before the
    second ones, as the decoder wants them. What does not turn stays in its place."""
    turning = max(rope.rotary_dim for rope in spec.ropes)
    pairs = np.arange(turning).reshape(-1, 2).T.reshape(-1)
    if role == "kv_a":  # what turns stands behind the latent
        return np.concatenate((np.arange(spec.latent), spec.latent + pairs)).astype(np.int32)
    heads = spec.heads if role[0] == "q" else spec.kv_heads
    inside = np.arange(spec.head_dim)
    if spec.latent:  # what turns stands last in a file, and first here
        inside = np.concatenate(
            (spec.head_dim - turning + pairs, inside[: spec.head_dim - turning])
        )
    else:
        inside[:turning] = pairs
    order = np.arange(heads)[:, None] * spec.head_dim + inside
    return np.ascontiguousarray(order.reshape(-1), np.int32)


def _reordered(weight: Weight, order: NDArray[np.int32]) -> Bytes:
    numbers = weight.read().reshape(weight.cols, -1)[order].reshape(-1)
    numbers.flags.writeable = False
    return numbers


def _gguf_weight(
    where: Path,
    spec: DecoderSpec,
    stored: Mapping[str, Stored],
    role: str,
    layer: int | None,
    shape: Shape,
) -> Places:
    family, prefix = family_of(spec), f"blk.{layer}."
    for name, roles in family.gguf_fused.items():
        if role in roles:
            return _part(where, spec, stored, prefix + name, role, roles, layer)
    end = "bias" if role.endswith("_bias") else "weight"
    roles = _QKV_BIAS if end == "bias" else QKV
    merged = f"{prefix}attn_qkv.{end}"
    if role in roles and merged in stored and family.recurrent != "delta":
        # Converters may stack them in any family; delta nets have a tensor of this name themselves.
        places = _part(where, spec, stored, merged, role, roles, layer)
        return places._replace(neighbours=family.gguf_neighbours)
    name = gguf_name(spec, role, layer)
    if role in ("k_b", "v_b"):
        return gguf_expanded(where, spec, stored, name, role)
    both = f"{prefix}ffn_gate_up_exps.weight"
    if role in ("expert_gate", "expert_up") and both in stored:
        return fused_experts(where, stored, both, role, shape)
    if shape.experts > 1 or role in ("altup_proj", "altup_unembed"):
        return stacked_experts(where, stored, name, shape)
    special = special_places(where, spec, stored, name, role, shape, family.gguf_grouped)
    if special is not None:
        return special
    if role == "shared_switch" and not (name in stored and len(stored[name].shape) == 2):
        shape = Shape(0, shape.cols)  # older files keep it as a vector
    places = chunks(where, stored, name, shape, 0, shape.rows)
    return places._replace(neighbours=family.gguf_neighbours)


def _folder_weight(
    where: Path,
    spec: DecoderSpec,
    stored: Mapping[str, Stored],
    role: str,
    layer: int | None,
    shape: Shape,
) -> Places:
    family, prefix = family_of(spec), f"model.layers.{layer}."
    for name, roles in family.fused.items():
        if role in roles:
            return _part(where, spec, stored, prefix + name, role, roles, layer)
    name = folder_name(spec, role, layer)
    if role in ("k_b", "v_b"):
        return expanded(where, spec, stored, name, role)
    if shape.experts > 1 or "{}" in name:
        return folder_experts(where, stored, name, role, shape)
    special = special_places(where, spec, stored, name, role, shape, family.grouped)
    if special is not None:
        return special
    places = chunks(where, stored, name, shape, 0, shape.rows)
    return places._replace(neighbours=family.neighbours)


def _part(
    where: Path,
    spec: DecoderSpec,
    stored: Mapping[str, Stored],
    name: str,
    role: str,
    roles: tuple[str, ...],
    layer: int | None,
) -> Places:
    """Rows of a role in a tensor that stacks several."""
    made = shapes(spec, layer)
    rows = [made[part].rows or made[part].cols for part in roles]
    start = sum(rows[: roles.index(role)])
    return chunks(where, stored, name, made[role], start, sum(rows))


def _untied_if_different(spec: DecoderSpec, stored: dict[str, Stored]) -> DecoderSpec:
    """As Transformers does: two unequal tensors in the file overrule a config that says tied."""
    head, embedding = stored["lm_head.weight"], stored.get(folder_name(spec, "embed", None))
    same = embedding is not None and head[:2] == embedding[:2]
    if same and embedding is not None and np.array_equal(head.load(), embedding.load()):
        del stored["lm_head.weight"]
        return spec
    return replace(spec, tied=False)
