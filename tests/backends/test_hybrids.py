"""Models with recurrent layers: Transformers' logits, and the same bits in any company."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_families import check_logits, rewritten
from test_native import check_bitwise, folder_of

from decoder_kit import check_refused, tiny_model
from hybrids_kit import GGUF, HYBRIDS, hybrid_model, hybrid_settings, save_hybrid
from redwood.backends.base import Nodes
from redwood.backends.native.backend import extension
from redwood.backends.native.load import load_native
from redwood.backends.native.weights import open_folder, open_gguf
from redwood.errors import ArgumentError, CapacityError, ModelError, RedwoodError, UnsupportedError

pytest.importorskip("redwood._native", reason="installed without a compiler")


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_folder_gives_the_logits_of_transformers(name: str, tmp_path: Path) -> None:
    model = hybrid_model(name)
    check_logits(load_native(folder_of(tmp_path, model), None, kv="f32", threads=2), model)


@pytest.mark.parametrize("name", GGUF)
def test_a_gguf_file_gives_the_logits_of_transformers(name: str, tmp_path: Path) -> None:
    # No key says which layers have a dense MLP.
    model = hybrid_model(name, **({"mlp_only_layers": []} if name == "qwen3next" else {}))
    path = save_hybrid(tmp_path / "m.gguf", name, model)
    check_logits(load_native(folder_of(tmp_path, model), path, kv="f32", threads=2), model)


def test_value_heads_that_share_a_key(tmp_path: Path) -> None:
    """Three a key, in the order of folders and in that of GGUF files, and heads of 16 and more."""
    sizes = {"linear_num_value_heads": 6, "linear_value_head_dim": 40, "linear_key_head_dim": 20}
    model = hybrid_model("qwen35", **sizes)
    folder = folder_of(tmp_path, model)
    for path in (None, save_hybrid(tmp_path / "m.gguf", "qwen35", model)):
        check_logits(load_native(folder, path, kv="f32", threads=3), model)


# Weights so large as elsewhere here, and routers of mixtures, blow roundings up over some hundred
# tokens: both answers are then as far from those in double precision as from each other.
@pytest.mark.parametrize("name", ["lfm2", "qwen35"])
def test_a_long_prompt_gives_the_logits_of_transformers(name: str, tmp_path: Path) -> None:
    model = hybrid_model(name, initializer_range=0.1)
    backend = load_native(folder_of(tmp_path, model), None, kv="f32", threads=2)
    text = [int(t) for t in torch.randint(0, 96, (700,))]
    (logits,) = backend.extend([Nodes(backend.open(), text)])
    with torch.inference_mode():
        want = model(input_ids=torch.tensor([text]), use_cache=False).logits[0]
    torch.testing.assert_close(logits, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", HYBRIDS)
@pytest.mark.parametrize("threads", [1, 3])
def test_a_node_has_the_same_bits_in_any_company(name: str, threads: int, tmp_path: Path) -> None:
    model = hybrid_model(name)
    backend = load_native(folder_of(tmp_path, model), None, weights="int8", threads=threads)
    check_bitwise(backend, seed=threads)


def test_instruction_sets_say_the_same(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, hybrid_model("qwen35"))
    said = []
    for isa in extension().instruction_sets():
        backend = load_native(folder, None, threads=1, isa=isa)
        said.append(backend.extend([Nodes(backend.open(), list(range(60)))])[0])
    assert all(torch.equal(said[0], other) for other in said[1:])


def test_drafting_layers_are_left_out(tmp_path: Path) -> None:
    """MTP: in folders beside the layers, in GGUF files behind them."""
    model = hybrid_model("qwen35")
    folder = folder_of(tmp_path, model)
    rewritten(folder, {"mtp.fc.weight": torch.ones(32, 64)})
    check_logits(load_native(folder, None, kv="f32", threads=1), model)
    more = hybrid_model("qwen35", num_hidden_layers=6)
    layers = {"block_count": 6, "nextn_predict_layers": 1}
    more.model.layers[:5].load_state_dict(model.model.layers.state_dict())
    for part in ("embed_tokens", "norm"):
        getattr(more.model, part).load_state_dict(getattr(model.model, part).state_dict())
    more.lm_head.load_state_dict(model.lm_head.state_dict())
    drafts = {"blk.5.nextn.eh_proj.weight": np.ones((64, 128), np.float32)}
    path = save_hybrid(tmp_path / "m.gguf", "qwen35", more, drafts, **layers)
    check_logits(load_native(folder, path, kv="f32", threads=1), model)


CONV = "model.layers.0.conv.conv.weight"
DELTA = "model.layers.0.linear_attn"
BAD: list[tuple[str, dict[str, torch.Tensor | None], dict[str, Any], type[RedwoodError], str]] = [
    ("lfm2", {CONV: torch.ones(32, 1, 4)}, {}, ModelError, f"'{CONV}' has shape (32, 1, 4)"),
    ("lfm2", {CONV: torch.ones(31, 1, 3)}, {}, ModelError, f"'{CONV}' has shape (31, 1, 3)"),
    ("lfm2", {CONV: None}, {}, ModelError, f"lacks the tensor '{CONV}'"),
    ("lfm2", {}, {"conv_L_cache": 17}, ModelError, "a convolution over 17 tokens"),
    ("lfm2", {}, {"conv_L_cache": 1}, ModelError, "a convolution over 1 tokens"),
    (
        "lfm2",
        {},
        {"layer_types": ["conv", "linear_attention"] * 2},
        UnsupportedError,
        "linear_attention",
    ),
    ("qwen35", {f"{DELTA}.A_log": torch.ones(3)}, {}, ModelError, "A_log' has shape (3,)"),
    ("qwen35", {f"{DELTA}.conv1d.weight": torch.ones(80, 1, 3)}, {}, ModelError, "conv1d"),
    ("qwen35", {f"{DELTA}.norm.weight": torch.ones(8)}, {}, ModelError, "linear_attn.norm"),
    ("qwen35", {}, {"linear_num_value_heads": 5}, ModelError, "5 heads do not share 2 key heads"),
    ("qwen35", {}, {"linear_value_head_dim": 16}, ModelError, "conv1d"),
    ("qwen35", {}, {"linear_key_head_dim": 5000}, ModelError, "key_dim 5000 must be in 1..4096"),
    ("qwen35", {}, {"hidden_act": "relu"}, UnsupportedError, "activation 'relu'"),
    ("qwen35", {}, {"attention_bias": True}, UnsupportedError, "attention_bias"),
    ("qwen3next", {}, {"linear_num_key_heads": 1}, ModelError, "conv1d"),
]


@pytest.mark.parametrize("name, tensors, settings, error, message", BAD)
def test_what_does_not_fit_is_refused_by_name(
    name: str,
    tensors: dict[str, torch.Tensor | None],
    settings: dict[str, Any],
    error: type[RedwoodError],
    message: str,
    tmp_path: Path,
) -> None:
    folder = rewritten(folder_of(tmp_path, hybrid_model(name)), tensors, **settings)
    check_refused(open_folder, folder, error, message)


BAD_GGUF: list[tuple[str, dict[str, Any], type[RedwoodError], str]] = [
    ("lfm2", {"shortconv.l_cache": 4}, ModelError, "shortconv.conv.weight"),
    ("lfm2", {"shortconv.l_cache": None}, ModelError, "shortconv.l_cache is missing"),
    ("lfm2", {"attention.head_count_kv": 2}, ModelError, "attention.head_count_kv"),
    ("lfm2", {"attention.head_count_kv": [0, 2, 0, 4]}, ModelError, "one number of heads"),
    ("qwen35", {"ssm.inner_size": 47}, ModelError, "47 is no multiple of 4 heads"),
    ("qwen35", {"ssm.group_count": 3}, ModelError, "4 heads do not share 3 key heads"),
    ("qwen35", {"ssm.conv_kernel": 3}, ModelError, "ssm_conv1d.weight"),
    ("qwen35", {"ssm.state_size": 2**31}, ModelError, "ssm.state_size"),
    ("qwen35", {"full_attention_interval": 2}, ModelError, "attn_q.weight"),
    ("qwen35", {"nextn_predict_layers": 5}, ModelError, "nextn_predict_layers"),
    ("qwen35", {"ssm.dt_b_c_rms": True}, UnsupportedError, "ssm.dt_b_c_rms"),
    ("qwen3next", {"expert_shared_feed_forward_length": 44}, ModelError, "shexp"),
]


@pytest.mark.parametrize("name, changes, error, message", BAD_GGUF)
def test_a_gguf_file_that_does_not_fit_is_refused_by_name(
    name: str, changes: dict[str, Any], error: type[RedwoodError], message: str, tmp_path: Path
) -> None:
    more = {"mlp_only_layers": []} if name == "qwen3next" else {}
    path = save_hybrid(tmp_path / "m.gguf", name, hybrid_model(name, **more), **changes)
    check_refused(open_gguf, path, error, message)


def test_a_capacity_whose_states_do_not_fit(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, hybrid_model("lfm2", max_position_embeddings=1 << 30))
    with pytest.raises(CapacityError, match="kept states of recurrent layers"):
        load_native(folder, None, capacity=1 << 30, checkpoint_tokens=1)


def test_states_are_kept_where_there_are_any(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="qwen3 models have no recurrent layers"):
        load_native(folder_of(tmp_path, tiny_model("qwen3")), None, checkpoint_tokens=64)


def test_the_state_of_a_file_may_not_grow(tmp_path: Path) -> None:
    model = hybrid_model("qwen35")
    path = save_hybrid(tmp_path / "m.gguf", "qwen35", model)
    config = json.loads((folder_of(tmp_path, model) / "config.json").read_text())
    assert config["model_type"] == "qwen3_5_text"
    raw = path.read_bytes()
    with torch.inference_mode():
        (first, *_) = (-torch.exp(model.model.layers[0].linear_attn.A_log)).numpy()
    path.write_bytes(raw.replace(first.tobytes(), (-first).tobytes()))
    with pytest.raises(RedwoodError, match="state grows"):
        load_native(tmp_path, path, threads=1)


VALUES = (None, 0, -1, 1, 7, 2**31, 10**40, 0.5, math.nan, "x", [], [1], [0, 2], True)


@pytest.mark.parametrize("name", ["lfm2", "qwen35"])
def test_any_value_of_any_setting_is_read_or_refused(name: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, hybrid_model(name))
    config = folder / "config.json"
    fields = json.loads(config.read_text())
    for key in fields:
        for value in VALUES:
            config.write_text(json.dumps({**fields, key: value}))
            with contextlib.suppress(ModelError, UnsupportedError):
                open_folder(folder).close()


@pytest.mark.parametrize("name", ["lfm2", "qwen35"])
def test_any_value_of_any_gguf_setting_is_read_or_refused(name: str, tmp_path: Path) -> None:
    model, path = hybrid_model(name), tmp_path / "m.gguf"
    for key in hybrid_settings(name, model):
        for value in VALUES:
            if isinstance(value, int) and not 0 <= value < 2**32 or value == []:
                continue  # no such number, and lists of nothing have no type
            save_hybrid(path, name, model, **{key: value})
            with contextlib.suppress(ModelError, UnsupportedError):
                open_gguf(path).close()
