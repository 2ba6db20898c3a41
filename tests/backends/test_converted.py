"""GGUF files as converters may write them: merged tensors, and settings that repeat others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_families import check_logits
from test_native import check_bitwise, folder_of

from decoder_kit import check_refused, gguf_settings, gguf_tensors, stored, tiny_model, write_gguf
from families_kit import GGUF, family_model, family_settings, family_tensors, save_family
from redwood.backends.native.load import load_native
from redwood.backends.native.weights import open_folder, open_gguf
from redwood.errors import ModelError, RedwoodError, UnsupportedError

pytest.importorskip("redwood._native", reason="installed without a compiler")


def merged(tensors: dict[str, Any], layers: list[int]) -> dict[str, Any]:
    """The tensors with queries, keys and values of some layers in one, as --fuse-qkv does it."""
    made = dict(tensors)
    for layer in layers:
        for end in ("weight", "bias"):
            names = [f"blk.{layer}.attn_{part}.{end}" for part in "qkv"]
            if names[0] in tensors:
                made[f"blk.{layer}.attn_qkv.{end}"] = np.concatenate([made.pop(n) for n in names])
    return made


MERGED = ("qwen2moe", "qwen3moe", "mixtral", "gptoss", "smollm3", "olmo2", "cohere", "starcoder2")


@pytest.mark.parametrize("family", MERGED)
@pytest.mark.parametrize("layers", [[0, 1, 2], [1]])
def test_queries_keys_and_values_in_one_tensor(
    family: str, layers: list[int], tmp_path: Path
) -> None:
    model = family_model(family, **({"sliding_window": None} if family == "starcoder2" else {}))
    tensors = merged(family_tensors(family, model), layers)
    path = write_gguf(tmp_path / "m.gguf", GGUF[family], family_settings(family, model), tensors)
    check_logits(load_native(folder_of(tmp_path, model), path, kv="f32", threads=1), model)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_merged_rows_of_blocks_keep_the_bits(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture, hidden_size=256, max_position_embeddings=2048)
    settings = gguf_settings(model)
    both = []
    for layers in ([], [0, 1, 2]):
        tensors: dict[str, Any] = merged(gguf_tensors(model), layers)
        for name, x in tensors.items():
            if "attn_" in name and x.ndim > 1:
                tensors[name] = stored(x, "Q8_0")
        path = write_gguf(tmp_path / f"{len(layers)}.gguf", architecture, settings, tensors)
        with open_gguf(path) as source:
            found = [source.get(role, layer) for role in "qkv" for layer in range(3)]
            both.append([(w.read().copy(), w.row_order) for w in found if w is not None])
    for (apart, order), (together, same) in zip(*both, strict=True):
        assert np.array_equal(apart, together)
        assert order is same is None or np.array_equal(order, same)
    check_bitwise(load_native(folder_of(tmp_path, model), path, threads=2), seed=6)


def test_a_merged_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    model = family_model("qwen3moe")
    tensors = merged(family_tensors("qwen3moe", model), [1])
    name = "blk.1.attn_qkv.weight"
    tensors[name] = tensors[name][:-1]
    path = write_gguf(tmp_path / "m.gguf", "qwen3moe", family_settings("qwen3moe", model), tensors)
    check_refused(open_gguf, path, ModelError, f"the tensor {name!r} has shape (127, 32)")


@pytest.mark.parametrize("shape", [(1, 32), (32,)])
def test_the_switch_of_a_shared_expert_is_a_row_or_a_vector(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    model = family_model("qwen2moe")
    tensors = family_tensors("qwen2moe", model)
    for name in tensors:
        if name.endswith("ffn_gate_inp_shexp.weight"):
            tensors[name] = tensors[name].reshape(shape)
    settings = family_settings("qwen2moe", model)
    path = write_gguf(tmp_path / "m.gguf", "qwen2moe", settings, tensors)
    check_logits(load_native(folder_of(tmp_path, model), path, kv="f32", threads=1), model)
    name = "blk.1.ffn_gate_inp_shexp.weight"
    for wrong in ((2, 16), (31,), (32, 1)):
        tensors[name] = np.ones(wrong, np.float32)
        write_gguf(path, "qwen2moe", settings, tensors)
        check_refused(open_gguf, path, ModelError, f"the tensor {name!r} has shape {wrong} instead")


_YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 5e5,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "attention_factor": 1.2079441541679836,
}
_STATED = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 8.0,
    "rope.scaling.original_context_length": 16,
    "rope.scaling.yarn_attn_factor": 1.2079441541679836,
    "rope.scaling.yarn_ext_factor": 1.0,
}


@pytest.mark.parametrize("theta", [5e5, 1e4, 100.0])
def test_sliding_layers_of_olmo_3_have_positions_of_their_own(theta: float, tmp_path: Path) -> None:
    plain = {"rope_type": "default", "rope_theta": theta}
    ropes = {"full_attention": _YARN, "sliding_attention": plain}
    model = family_model("olmo3", rope_parameters=ropes)
    path = save_family(
        tmp_path / "m.gguf", "olmo3", model, **_STATED, **{"rope.freq_base_swa": theta}
    )
    check_logits(load_native(folder_of(tmp_path, model), path, kv="f32", threads=1), model)


@pytest.mark.parametrize("family", ["olmo2", "qwen3moe", "smollm3"])
def test_the_usual_factor_of_yarn_may_be_stated(family: str, tmp_path: Path) -> None:
    model = family_model(family, rope_parameters=_YARN)
    path = save_family(tmp_path / "m.gguf", family, model, **_STATED)
    check_logits(load_native(folder_of(tmp_path, model), path, kv="f32", threads=1), model)


@pytest.mark.parametrize("stated", [False, None, True])
@pytest.mark.parametrize("kind", ["full_attention", "sliding_attention"])
def test_ends_of_yarn_that_transformers_leaves_unread_are_refused(
    kind: str, stated: Any, tmp_path: Path
) -> None:
    plain = {"rope_type": "default", "rope_theta": 100.0}
    ropes = {
        "full_attention": plain,
        "sliding_attention": plain,
        kind: {**_YARN, "truncate": stated},
    }
    model = family_model("olmo3", rope_parameters=ropes)
    folder = folder_of(tmp_path, model)
    if stated:
        check_logits(load_native(folder, None, kv="f32", threads=1), model)
    else:
        check_refused(open_folder, folder, UnsupportedError, f"{kind}: truncate {stated}")


BAD: list[tuple[dict[str, Any], type[RedwoodError], str]] = [
    ({**_STATED, "rope.scaling.yarn_attn_factor": 1.0}, UnsupportedError, "yarn_attn_factor 1.0"),
    ({**_STATED, "rope.scaling.yarn_attn_factor": "x"}, ModelError, "must be a finite number"),
    ({**_STATED, "rope.scaling.yarn_ext_factor": 0.5}, UnsupportedError, "yarn_ext_factor 0.5"),
    ({"rope.scaling.yarn_attn_factor": 1.2}, UnsupportedError, "for plain YaRN only"),
]


@pytest.mark.parametrize("settings, error, message", BAD)
def test_other_factors_of_yarn_are_refused(
    settings: dict[str, Any], error: type[RedwoodError], message: str, tmp_path: Path
) -> None:
    path = save_family(tmp_path / "m.gguf", "olmo2", family_model("olmo2"), **settings)
    check_refused(open_gguf, path, error, message)
