"""Models with Mamba-2 layers: Transformers' logits, and the same bits in any company."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_families import check_logits, rewritten
from test_hybrid_rows import run
from test_native import check_bitwise, folder_of

from decoder_kit import check_refused
from mambas_gguf import GGUF, save_mamba
from mambas_kit import MAMBAS, mamba_model
from redwood.backends.base import AcceptedPath, Nodes
from redwood.backends.native.backend import extension
from redwood.backends.native.load import load_native
from redwood.backends.native.weights import open_folder, open_gguf
from redwood.errors import ModelError, RedwoodError, UnsupportedError

pytest.importorskip("redwood._native", reason="installed without a compiler")

ATTENTION = ("granite", "granitemoe", "granitemoeshared", "granite-hybrid-all-attention")


@pytest.mark.parametrize("name", MAMBAS)
def test_a_folder_gives_the_logits_of_transformers(name: str, tmp_path: Path) -> None:
    model = mamba_model(name)
    check_logits(load_native(folder_of(tmp_path, model), None, kv="f32", threads=2), model)


@pytest.mark.parametrize("name", MAMBAS)
def test_a_long_prompt_gives_the_logits_of_transformers(name: str, tmp_path: Path) -> None:
    model = mamba_model(name)
    backend = load_native(folder_of(tmp_path, model), None, kv="f32", threads=2)
    text = [int(t) for t in torch.randint(0, 96, (700,))]
    (logits,) = backend.extend([Nodes(backend.open(), text)])
    with torch.inference_mode():
        want = model(input_ids=torch.tensor([text]), use_cache=False).logits[0]
    torch.testing.assert_close(logits, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", MAMBAS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_node_has_the_same_bits_in_any_company(name: str, threads: int, tmp_path: Path) -> None:
    model = mamba_model(name)
    weights = "int4" if "moe" in name or name in ("granite-hybrid", "nemotron-h") else "int8"
    backend = load_native(folder_of(tmp_path, model), None, weights=weights, threads=threads)
    check_bitwise(backend, seed=threads)


@pytest.mark.parametrize("name", GGUF)
def test_a_gguf_file_gives_the_logits_of_transformers(name: str, tmp_path: Path) -> None:
    # Converters write no biases of Granite's that llama.cpp reads.
    model = mamba_model(name, **({"mlp_bias": False} if name == "granite" else {}))
    path = save_mamba(tmp_path / "m.gguf", name, model)
    check_logits(load_native(folder_of(tmp_path, model), path, kv="f32", threads=2), model)


@pytest.mark.parametrize("name", ["granite-hybrid", "falcon-h1", "nemotron-h-narrow"])
@pytest.mark.parametrize("kind", ["Q4_K", "Q8_0", "F16"])
def test_a_quantised_file_keeps_the_bits(name: str, kind: str, tmp_path: Path) -> None:
    wide: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
    state = {"mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_ssm": 512}
    if name.startswith("nemotron"):
        state = {"mamba_num_heads": 8, "mamba_head_dim": 32, "n_groups": 2}
    elif name.startswith("granite"):
        wide.pop("head_dim")
        state |= {"shared_intermediate_size": 256, "mamba_d_ssm": None}
    model = mamba_model(name, **wide, **state, initializer_range=0.05)
    path = save_mamba(tmp_path / "m.gguf", name, model, kind)
    check_bitwise(load_native(folder_of(tmp_path, model), path, threads=2), seed=4)


def test_instruction_sets_say_the_same(tmp_path: Path) -> None:
    for name in ("falcon-h1-normed", "nemotron-h"):
        folder = folder_of(tmp_path / name, mamba_model(name))
        said = []
        for isa in extension().instruction_sets():
            backend = load_native(folder, None, threads=1, isa=isa)
            said.append(backend.extend([Nodes(backend.open(), list(range(60)))])[0])
        assert all(torch.equal(said[0], other) for other in said[1:])


@pytest.mark.parametrize("name", ["mamba2", "falcon-h1-normed", "nemotron-h"])
def test_random_sequences_equal_a_replay(name: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, mamba_model(name))
    run(load_native(folder, None, threads=1, checkpoint_tokens=8, capacity=600), 30)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MAMBAS if name not in ATTENTION])
def test_a_thousand_random_sequences(name: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, mamba_model(name))
    run(load_native(folder, None, threads=1, checkpoint_tokens=8, capacity=600), 1000)


def test_a_model_without_attention_counts_its_memory(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, mamba_model("mamba2"))
    backend = load_native(folder, None, threads=1, checkpoint_tokens=16)
    row = backend.open()
    for _ in range(4):
        backend.extend([Nodes(row, list(range(20)), num_logits=0)])
        backend.commit([AcceptedPath(row, range(20))])
    assert backend.cache_bytes == 2 * backend.page_bytes + 5 * backend.state_bytes
    assert backend.pages([row]) == 2 + -(-5 * backend.state_bytes // backend.page_bytes)
    assert backend.token_bytes * 64 == backend.page_bytes
    assert backend.cache_bytes <= backend.row_bytes(128)


MIXER = "backbone.layers.0.mixer"
BAD: list[tuple[str, dict[str, torch.Tensor | None], dict[str, Any], type[RedwoodError], str]] = [
    ("mamba2", {f"{MIXER}.A_log": torch.ones(7)}, {}, ModelError, "A_log' has shape (7,)"),
    ("mamba2", {f"{MIXER}.D": torch.ones(9)}, {}, ModelError, "D' has shape (9,)"),
    ("mamba2", {f"{MIXER}.conv1d.weight": torch.ones(96, 1, 4)}, {}, ModelError, "conv1d"),
    ("mamba2", {f"{MIXER}.in_proj.weight": torch.ones(201, 32)}, {}, ModelError, "in_proj"),
    ("mamba2", {f"{MIXER}.norm.weight": torch.ones(32)}, {}, ModelError, "mixer.norm"),
    ("mamba2", {f"{MIXER}.dt_bias": None}, {}, ModelError, "lacks the tensor"),
    ("mamba2", {}, {"state_size": 24}, ModelError, "conv1d"),
    ("mamba2", {}, {"n_groups": 3}, ModelError, "8 heads do not share 3 key heads"),
    ("mamba2", {}, {"n_groups": 4}, ModelError, "conv1d"),
    ("mamba2", {}, {"conv_kernel": 17}, ModelError, "a convolution over 17 tokens"),
    ("mamba2", {}, {"conv_kernel": 3}, ModelError, "conv1d"),
    ("mamba2", {}, {"hidden_act": "relu"}, UnsupportedError, "activation 'relu'"),
    ("mamba2", {}, {"hidden_act": "gelu_pytorch_tanh"}, UnsupportedError, "of recurrent layers"),
    ("mamba2", {}, {"time_step_limit": [0.5, 0.25]}, ModelError, "no time is within (0.5, 0.25)"),
    ("mamba2", {}, {"time_step_limit": [-1.0, 0.1]}, ModelError, "no time is within"),
    ("mamba2", {}, {"use_bias": True}, ModelError, "in_proj.bias"),
    ("granite-hybrid", {}, {"mamba_n_groups": 3}, ModelError, "8 heads do not share 3"),
    ("granite-hybrid", {}, {"position_embedding_type": "learned"}, UnsupportedError, "'learned'"),
    ("granite-hybrid", {}, {"residual_multiplier": -1.0}, ModelError, "residual_multiplier -1.0"),
    ("granite-hybrid", {}, {"num_local_experts": 5}, ModelError, "router.layer.weight"),
    ("granite-hybrid", {}, {"shared_intermediate_size": 41}, ModelError, "shared_mlp"),
    ("falcon-h1", {}, {"mamba_rms_norm": True}, ModelError, "mamba.norm.weight"),
    ("falcon-h1", {}, {"ssm_multipliers": [1.0] * 4}, ModelError, "must be 5 numbers"),
    ("falcon-h1", {}, {"mlp_multipliers": [1.0, 0.0]}, ModelError, "must be 2 numbers"),
    ("falcon-h1", {}, {"hidden_act": "gelu"}, UnsupportedError, "'gelu'"),
    ("nemotron-h", {}, {"mlp_hidden_act": "relu"}, UnsupportedError, "'relu'"),
    ("nemotron-h", {}, {"mamba_hidden_act": "gelu"}, UnsupportedError, "mamba_hidden_act 'gelu'"),
    ("nemotron-h", {}, {"time_step_min": math.inf}, ModelError, "no time is within (inf, inf)"),
    ("nemotron-h", {}, {"moe_latent_size": 16}, UnsupportedError, "moe_latent_size 16"),
    ("nemotron-h", {}, {"topk_group": 3}, ModelError, "8 experts are not 2 groups"),
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
    folder = rewritten(folder_of(tmp_path, mamba_model(name)), tensors, **settings)
    check_refused(open_folder, folder, error, message)


BAD_GGUF: list[tuple[str, dict[str, Any], type[RedwoodError], str]] = [
    ("mamba2", {"ssm.inner_size": 63}, ModelError, "63 is no multiple of 8 heads"),
    ("mamba2", {"ssm.state_size": 24}, ModelError, "ssm_conv1d.weight"),
    ("mamba2", {"ssm.group_count": 3}, ModelError, "8 heads do not share 3 key heads"),
    ("mamba2", {"ssm.conv_kernel": 3}, ModelError, "ssm_conv1d.weight"),
    ("mamba2", {"ssm.time_step_rank": 4}, ModelError, "ssm_in.weight"),
    ("mamba2", {"ssm.time_step_rank": None}, ModelError, "ssm.time_step_rank is missing"),
    ("mamba2", {"feed_forward_length": 8}, UnsupportedError, "feed_forward_length"),
    ("granite-hybrid", {"attention.head_count_kv": 2}, ModelError, "attention.head_count_kv"),
    ("granite-hybrid", {"attention.head_count_kv": [0, 2]}, ModelError, "head_count_kv"),
    ("granite-hybrid", {"residual_scale": -0.5}, ModelError, "residual_scale"),
    ("granite-hybrid", {"rope.scaling.finetuned": 2}, ModelError, "rope.scaling.finetuned"),
    (
        "nemotron-h-narrow",
        {"feed_forward_length": [0, 48, 48, 48]},
        ModelError,
        "attention and MLP",
    ),
    ("nemotron-h-narrow", {"feed_forward_length": [0, 48, 0, 40]}, ModelError, "one width"),
    ("nemotron-h-narrow", {"expert_count": 4}, ModelError, "expert_used_count is missing"),
    ("nemotron-h-moe", {"expert_group_count": 2}, UnsupportedError, "expert_group_count 2"),
    ("nemotron-h-moe", {"expert_gating_func": 1}, UnsupportedError, "expert_gating_func 1"),
    ("nemotron-h-moe", {"moe_latent_size": 8}, UnsupportedError, "moe_latent_size"),
    ("nemotron-h-moe", {"expert_weights_norm": 3}, ModelError, "expert_weights_norm 3"),
    ("nemotron-h-moe", {"expert_count": 7}, ModelError, "ffn_gate_inp.weight"),
    ("falcon-h1", {"residual_scale": 0.5}, UnsupportedError, "residual_scale"),
]


@pytest.mark.parametrize("name, changes, error, message", BAD_GGUF)
def test_a_gguf_file_that_does_not_fit_is_refused_by_name(
    name: str, changes: dict[str, Any], error: type[RedwoodError], message: str, tmp_path: Path
) -> None:
    path = save_mamba(tmp_path / "m.gguf", name, mamba_model(name), **changes)
    check_refused(open_gguf, path, error, message)


def test_what_falcon_files_do_not_say_is_refused(tmp_path: Path) -> None:
    normed = {"mamba_rms_norm": True, "mamba_norm_before_gate": False}
    path = save_mamba(tmp_path / "n.gguf", "falcon-h1", mamba_model("falcon-h1", **normed))
    with pytest.raises(UnsupportedError, match="ssm_norm"):
        open_gguf(path)
    tied = mamba_model("falcon-h1", tie_word_embeddings=True)
    with pytest.raises(UnsupportedError, match="lacks output.weight"):
        open_gguf(save_mamba(tmp_path / "t.gguf", "falcon-h1", tied))


def test_names_of_released_files(tmp_path: Path) -> None:
    """Granite's layers and lack of positions, Mamba-2's embedding, Nemotron-H's pattern."""
    model = mamba_model("granite-hybrid")
    kinds = ["mamba", "mamba", "attention", "mamba"]
    folder = folder_of(tmp_path / "granite", model)
    rewritten(folder, {}, layer_types=kinds, position_embedding_type="nope")
    check_logits(load_native(folder, None, kv="f32", threads=1), model)
    model = mamba_model("mamba2")
    folder = folder_of(tmp_path / "mamba2", model)
    old, new = "backbone.embeddings.weight", "backbone.embedding.weight"
    rewritten(folder, {old: None, new: model.backbone.embeddings.weight.detach().clone()})
    check_logits(load_native(folder, None, kv="f32", threads=1), model)
    model = mamba_model("nemotron-h")
    folder = folder_of(tmp_path / "nemotron", model)
    config = json.loads((folder / "config.json").read_text())
    for name in ("layers_block_type", "layer_types"):
        config.pop(name, None)
    config["hybrid_override_pattern"] = "M-*EME-"
    (folder / "config.json").write_text(json.dumps(config))
    check_logits(load_native(folder, None, kv="f32", threads=1), model)
