"""Every kind of weights that GGUF files hold, against the gguf package and in mixed files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from numpy.typing import NDArray

pytest.importorskip("redwood._native", reason="installed without a compiler")

from bits_kit import KINDS, instruction_sets
from bits_kit import stored as with_near_scales
from conftest import tiny_tokenizer
from decoder_kit import PlainDecoder, gguf_settings, gguf_tensors, stored, tiny_model, write_gguf
from models_kit import write_small_gguf
from redwood.backends.base import Nodes
from redwood.backends.load import open_model
from redwood.backends.native.backend import NativeBackend, extension
from redwood.backends.native.load import load_native
from redwood.backends.native.weights import open_gguf
from redwood.errors import ModelError, NumericalError, UnsupportedError
from redwood.models._gguf import BLOCKS

QUANTISED = [kind for kind in KINDS if kind not in ("F32", "F16", "BF16")]
UNREAD = ["Q8_1", "Q8_K", "Q1_0", "F64", "I8", "I16", "I32", "I64"]
PROMPT = [5, 9, 17, 33, 65, 12, 2, 77, 54, 20, 61]
TOKENS, PARENTS = [3, 14, 15, 92, 65, 35], [-1, 0, 0, 1, 2, 2]
BYTES = {
    "Q2_K": 1344 / 4096,
    "TQ1_0": 1344 / 4096,
    "TQ2_0": 1344 / 4096,
    "IQ4_NL": 0.5625,
    "MXFP4": 0.5625,
    "NVFP4": 2.0,
    **dict.fromkeys(("IQ4_XS", "IQ3_S", "IQ3_XXS"), 2240 / 4096),
    **dict.fromkeys(("IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_S", "IQ1_M"), 1856 / 4096),
}
"""In memory, per weight, as docs/native.md says."""


def in_both_ways(kind: str, raw: NDArray[np.uint8], rows: int, cols: int) -> list[Any]:
    """Numbers as they are read, and as they are packed and unpacked."""
    native, read = extension(), np.empty((rows, cols), np.float32)
    native.read(kind, raw.reshape(-1), read)
    form, unpacked = native.kinds(kind), np.empty((rows, cols), np.float32)
    packed = np.empty(native.packed_bytes(form, rows, cols), np.uint8)
    native.pack(kind, raw.reshape(-1), rows, cols, None, form, packed, 1)
    native.unpack(form, packed, cols, 0, unpacked)
    return [read, unpacked]


@pytest.mark.parametrize("kind", QUANTISED)
def test_numbers_are_those_of_the_gguf_package_bit_for_bit(kind: str) -> None:
    rows, cols = 37, 1024
    step, size = BLOCKS[kind]
    rng = np.random.default_rng(len(kind))
    anything = rng.integers(0, 256, (rows, cols // step * size), dtype=np.uint8)
    for raw in (anything, with_near_scales("kinds", kind, rows, cols).reshape(rows, -1)):
        with np.errstate(all="ignore"):
            wanted = dequantize(raw, gguf.GGMLQuantizationType[kind]).astype(np.float32)
        nan = np.isnan(wanted)
        for found in in_both_ways(kind, raw, rows, cols):
            assert np.array_equal(np.isnan(found), nan)
            if kind.startswith("TQ"):  # a zero of a negative scale: -0 there, 0 here
                wanted, found = wanted + np.float32(0), found + np.float32(0)
            assert np.array_equal(found[~nan].view(np.uint32), wanted[~nan].view(np.uint32))


@pytest.mark.parametrize("kind", ["MXFP4", "NVFP4"])
def test_every_scale_of_a_byte_is_read(kind: str) -> None:
    step, size = BLOCKS[kind]
    raw = np.random.default_rng(0).integers(0, 256, (256, size), dtype=np.uint8)
    raw[:, : step // 32 * 2 if kind == "NVFP4" else 1] = np.arange(256, dtype=np.uint8)[:, None]
    with np.errstate(over="ignore"):
        wanted = dequantize(raw, gguf.GGMLQuantizationType[kind]).astype(np.float32)
    for found in in_both_ways(kind, raw, 256, step):
        assert np.array_equal(found.view(np.uint32), wanted.view(np.uint32))


@pytest.mark.parametrize("kind", BYTES)
def test_a_kind_takes_the_memory_that_the_docs_say(kind: str) -> None:
    native = extension()
    assert native.packed_bytes(native.kinds(kind), 64, 1024) == BYTES[kind] * 64 * 1024


def mixed_file(path: Path, kinds: list[str], **roles: str) -> Path:
    """A tiny Llama whose matrices take kinds in turns; some, by part of the name, a given one."""
    model = tiny_model("llama", **WIDE, initializer_range=0.05)
    tensors: dict[str, Any] = gguf_tensors(model)
    turn = 0
    for name, numbers in tensors.items():
        if numbers.ndim > 1:
            given = [kind for part, kind in roles.items() if name.startswith(part)]
            tensors[name] = stored(numbers, given[0] if given else kinds[turn % len(kinds)])
            turn += 1
    model.save_pretrained(path.parent)
    tiny_tokenizer().save_pretrained(path.parent)
    return write_gguf(path, "llama", gguf_settings(model), tensors)


WIDE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
}


def logits_of(backend: NativeBackend) -> torch.Tensor:
    row = backend.open()
    (prompt,) = backend.extend([Nodes(row, PROMPT)])
    (tree,) = backend.extend([Nodes(backend.open(), TOKENS, PARENTS)])
    return torch.cat([prompt, tree])


def test_a_file_of_all_kinds_gives_the_logits_of_its_numbers_on_every_processor(
    tmp_path: Path,
) -> None:
    path = mixed_file(tmp_path / "mixed.gguf", QUANTISED)
    with open_gguf(path) as source:
        kinds = {source.get(r, n).kind for n in range(4) for r in ("q", "k", "v", "o")}  # type: ignore[union-attr]
        assert len(kinds) > 10
        wanted = PlainDecoder(source).logits(torch.tensor(PROMPT))
    exact = load_native(tmp_path, path, kv="f32", weights="f32", threads=2)
    torch.testing.assert_close(logits_of(exact)[: len(PROMPT)], wanted, atol=3e-4, rtol=3e-4)
    found = {
        isa: logits_of(load_native(tmp_path, path, kv="f32", threads=2, isa=isa))
        for isa in instruction_sets()
    }
    first = next(iter(found.values()))
    # Activations are rounded to 8 bits.
    off = float((first[: len(PROMPT)] - wanted).pow(2).mean().sqrt())
    assert off < 0.06 * float(wanted.std())
    assert all(torch.equal(logits, first) for logits in found.values())


@pytest.mark.parametrize("kind", ["Q2_K", "IQ4_NL", "IQ4_XS", "IQ3_S", "IQ2_XXS", "IQ1_M", "MXFP4"])
def test_embedding_and_head_may_be_of_any_kind(kind: str, tmp_path: Path) -> None:
    path = mixed_file(tmp_path / "m.gguf", ["Q4_K"], token_embd=kind, output=kind)
    backend = load_native(tmp_path, path, kv="f32", threads=1)
    with open_gguf(path) as source:
        wanted = PlainDecoder(source).logits(torch.tensor(PROMPT))
    found = logits_of(backend)
    off = float((found[: len(PROMPT)] - wanted).pow(2).mean().sqrt())
    assert off < 0.06 * float(wanted.std())
    together = backend.extend([Nodes(backend.open(), TOKENS, PARENTS) for _ in range(3)])
    assert all(torch.equal(logits, found[len(PROMPT) :]) for logits in together)


@pytest.mark.usefixtures("forked_conversions")
def test_a_mixed_file_is_the_same_model_on_the_eager_backend(tmp_path: Path) -> None:
    kinds = ["Q2_K", "IQ4_NL", "IQ3_S", "MXFP4", "IQ2_XS", "IQ1_S", "IQ4_XS", "TQ1_0", "Q6_K"]
    write_small_gguf(tmp_path / "mixed.gguf", kinds=kinds)
    name = str(tmp_path / "mixed.gguf")
    _, native = open_model(name, device="cpu", kv="f32", weights="f32")
    _, eager = open_model(name, device="cpu", backend="eager")
    assert (native.name, eager.name) == ("native", "eager")
    nodes = [backend.extend([Nodes(backend.open(), PROMPT)])[0] for backend in (native, eager)]
    torch.testing.assert_close(nodes[0], nodes[1], atol=1e-3, rtol=1e-3)


def test_which_kinds_are_not_read() -> None:
    assert {kind for kind in BLOCKS if extension().kinds(kind) is None} == set(UNREAD)


@pytest.mark.parametrize("kind", UNREAD)
@pytest.mark.parametrize("name", ["blk.1.ffn_down", "token_embd", "blk.0.attn_norm", "output_norm"])
def test_a_kind_that_is_not_read_is_refused_by_tensor(kind: str, name: str, tmp_path: Path) -> None:
    model = tiny_model("llama", **WIDE)
    tensors: dict[str, Any] = gguf_tensors(model)
    name = f"{name}.weight"
    step, size = BLOCKS[kind]
    *rows, cols = tensors[name].shape
    tensors[name] = (np.zeros((*rows, cols // step * size), np.uint8), kind)
    path = write_gguf(tmp_path / "m.gguf", "llama", gguf_settings(model), tensors)
    with pytest.raises(UnsupportedError, match=f"the tensor '{name}' is {kind}, a kind"):
        open_gguf(path)


@pytest.mark.parametrize("kind", [kind for kind in BYTES if BLOCKS[kind][0] > 32])
def test_a_width_that_is_no_whole_number_of_blocks_is_refused(kind: str, tmp_path: Path) -> None:
    step, size = BLOCKS[kind]
    path = mixed_file(tmp_path / "m.gguf", [kind])
    raw = bytearray(path.read_bytes())
    at = raw.index(b"blk.0.ffn_down.weight") + len(b"blk.0.ffn_down.weight") + 4
    width = int.from_bytes(raw[at : at + 8], "little")
    raw[at : at + 8] = (width - step // 2).to_bytes(8, "little")
    path.write_bytes(raw)
    with pytest.raises(ModelError, match="blk.0.ffn_down.weight"):
        open_gguf(path)


@pytest.mark.parametrize("kind", [kind for kind in BYTES if kind not in ("MXFP4", "NVFP4")])
def test_a_scale_that_is_nan_is_refused_at_load(kind: str, tmp_path: Path) -> None:
    path = mixed_file(tmp_path / "m.gguf", [kind])
    with open_gguf(path) as source:
        part = source.get("down", 1)
        assert part is not None
        held = bytes(part.read()[: BLOCKS[kind][1]])
    block = bytearray(held)
    if kind == "IQ1_M":
        block[49::2] = bytes(byte | 0xF0 for byte in block[49::2])
    else:
        at = {"Q2_K": 80, "TQ1_0": 52, "TQ2_0": 64}.get(kind, 0)
        block[at : at + 2] = b"\xff\x7f"
    raw = path.read_bytes()
    assert held in raw
    path.write_bytes(raw.replace(held, bytes(block), 1))
    with pytest.raises(NumericalError, match="NaN"):
        load_native(tmp_path, path, threads=1)


def test_a_drafter_keeps_what_is_smaller_than_four_bits(tmp_path: Path) -> None:
    path = mixed_file(tmp_path / "m.gguf", ["Q2_K", "Q6_K"])
    exact, draft = (load_native(tmp_path, path, threads=1, weights=w) for w in ("auto", "draft"))
    sizes = [(exact.weight_bytes[name], draft.weight_bytes[name]) for name in exact.weight_bytes]
    assert any(small == same for small, same in sizes)
    assert any(large > made for large, made in sizes)
    assert not any(kept < made for kept, made in sizes)


@pytest.mark.parametrize("form", ["a4n", "a4x", "k2", "t4", "t3"])
def test_layouts_of_other_kinds_are_not_made_from_floats(form: str) -> None:
    native, floats = extension(), np.zeros(16 * 256, np.float32).view(np.uint8)
    packed = np.empty(native.packed_bytes(form, 16, 256), np.uint8)
    for kind, data in (("F32", floats), ("Q6_K", floats[: 16 * 210])):
        with pytest.raises(ValueError, match=f"{kind} cannot be packed as {form}"):
            native.pack(kind, data, 16, 256, None, form, packed, 1)


@pytest.mark.parametrize("kind", BYTES)
def test_data_that_do_not_fit_the_shape_are_refused(kind: str) -> None:
    native, (step, size) = extension(), BLOCKS[kind]
    form = native.kinds(kind)
    packed = np.empty(native.packed_bytes(form, 16, 512), np.uint8)
    row = 512 // step * size
    for count in (0, 16 * row - 1, 15 * row, 17 * row):
        with pytest.raises(ValueError):
            native.pack(kind, np.zeros(count, np.uint8), 16, 512, None, form, packed, 1)
    with pytest.raises(ValueError, match="multiple"):
        native.pack(kind, np.zeros(16 * row, np.uint8), 16, 512 - 16, None, form, packed, 1)
    with pytest.raises(ValueError, match="wrong size of out"):
        native.pack(kind, np.zeros(16 * row, np.uint8), 16, 512, None, form, packed[:-1], 1)
