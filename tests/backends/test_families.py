"""Every family beside those of `test_native`, against Transformers' own logits."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_native import PARENTS, PROMPT, TOKENS, check_bitwise, filled, folder_of, path_of

import redwood
from decoder_kit import check_refused, numbers
from deepseek_kit import LATENT
from families_kit import FAMILIES, GGUF, IMAGES, MIXTURES, family_model, image_model, save_family
from redwood.backends.base import AcceptedPath, Backend, Nodes
from redwood.backends.eager.load import wrap_model
from redwood.backends.native.load import load_native
from redwood.backends.native.weights import open_folder, open_gguf
from redwood.errors import ModelError, RedwoodError, UnsupportedError

pytest.importorskip("redwood._native", reason="installed without a compiler")


def saved(path: Path, model: Any) -> Path:
    """The folder of a model; InternLM 3 is Llama to Transformers, and not to its own files."""
    folder = folder_of(path, model)
    if model.config.model_type == "internlm3":
        file = folder / "config.json"
        file.write_text(file.read_text().replace("LlamaForCausalLM", "InternLM3ForCausalLM"))
    return folder


def check_logits(backend: Backend, model: Any, limit: float = 1e-4) -> None:
    """A tree behind a prompt in chunks says what Transformers says of each path."""
    row = backend.open()
    for start in range(0, len(PROMPT), 4):
        part = PROMPT[start : start + 4]
        backend.extend([Nodes(row, part, num_logits=0)])
        backend.commit([AcceptedPath(row, range(len(part)))])
    (logits,) = backend.extend([Nodes(row, TOKENS, PARENTS)])
    for node in range(len(TOKENS)):
        text = PROMPT + [TOKENS[n] for n in path_of(PARENTS, node)]
        with torch.inference_mode():
            want = model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1]
        torch.testing.assert_close(logits[node], want, atol=limit, rtol=limit)
    backend.release(row)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_gives_the_logits_of_transformers(family: str, tmp_path: Path) -> None:
    model = family_model(family)
    check_logits(load_native(saved(tmp_path, model), None, kv="f32", threads=2), model)


@pytest.mark.parametrize("family", GGUF)
def test_a_gguf_file_gives_the_logits_of_transformers(family: str, tmp_path: Path) -> None:
    # Converters write no window for StarCoder 2.
    model = family_model(family, **({"sliding_window": None} if family == "starcoder2" else {}))
    path = save_family(tmp_path / "m.gguf", family, model)
    check_logits(load_native(folder_of(tmp_path, model), path, kv="f32", threads=2), model)


@pytest.mark.parametrize("name", [*IMAGES, "gemma3"])
def test_the_text_part_of_a_model_with_images(name: str, tmp_path: Path) -> None:
    model = image_model(name)
    check_logits(load_native(folder_of(tmp_path, model), None, kv="f32", threads=1), model)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_node_has_the_same_bits_in_any_company(family: str, tmp_path: Path) -> None:
    model = family_model(family, max_position_embeddings=2048)
    weights = "int4" if family in MIXTURES else "int8"
    check_bitwise(load_native(saved(tmp_path, model), None, weights=weights, threads=2), seed=5)


@pytest.mark.parametrize("kind", ["Q4_K", "Q8_0", "F16"])
def test_a_quantised_mixture_keeps_the_bits(kind: str, tmp_path: Path) -> None:
    wide = {
        "hidden_size": 256,
        "head_dim": 64,
        "moe_intermediate_size": 256,
        "max_position_embeddings": 2048,
    }
    model = family_model("qwen3moe", **wide, initializer_range=0.05)
    path = save_family(tmp_path / "m.gguf", "qwen3moe", model, kind)
    check_bitwise(load_native(folder_of(tmp_path, model), path, threads=2), seed=4)


def test_experts_of_no_whole_blocks(tmp_path: Path) -> None:
    model = family_model("mixtral", intermediate_size=40, hidden_size=24, head_dim=8)
    for threads in (1, 3):
        check_logits(load_native(saved(tmp_path, model), None, kv="f32", threads=threads), model)


def test_a_long_prompt_of_a_mixture_passes_in_pieces(tmp_path: Path) -> None:
    model = family_model("qwen2moe", max_position_embeddings=2048)
    backend = load_native(saved(tmp_path, model), None, threads=2)
    text = [int(t) for t in torch.randint(0, 96, (400,))]
    (whole,) = backend.extend([Nodes(backend.open(), text)])
    (rest,) = backend.extend([Nodes(filled(backend, text[:150], chunk=50), text[150:])])
    assert torch.equal(whole[150:], rest)


def rewritten(folder: Path, changes: dict[str, torch.Tensor | None], **settings: Any) -> Path:
    """The folder with tensors changed or taken out, and settings changed."""
    file, config = folder / "model.safetensors", folder / "config.json"
    state = {**load_file(file), **{k: v for k, v in changes.items() if v is not None}}
    gone = {name for name, tensor in changes.items() if tensor is None}
    save_file({k: v for k, v in state.items() if k not in gone}, file)
    config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))
    return folder


EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
ROUTER = "model.layers.1.mlp.gate.weight"
BAD: list[tuple[str, dict[str, torch.Tensor | None], dict[str, Any], type[RedwoodError], str]] = [
    ("qwen3moe", {EXPERT: None}, {}, ModelError, f"lacks the tensor '{EXPERT}'"),
    ("qwen3moe", {EXPERT: torch.ones(47, 32)}, {}, ModelError, f"'{EXPERT}' has shape (47, 32)"),
    ("qwen3moe", {EXPERT: torch.ones(48, 32).half()}, {}, UnsupportedError, "of several kinds"),
    ("qwen3moe", {ROUTER: torch.ones(5, 32)}, {}, ModelError, f"'{ROUTER}' has shape (5, 32)"),
    ("qwen3moe", {}, {"num_local_experts": 5}, ModelError, "instead of (5, 32)"),
    ("qwen3moe", {}, {"num_local_experts": 2}, ModelError, "cannot have 3 experts of 2"),
    ("qwen3moe", {}, {"num_experts_per_tok": 0}, ModelError, "num_experts_per_tok 0"),
    ("qwen3moe", {}, {"mlp_only_layers": [1]}, ModelError, "lacks the tensor"),
    ("qwen2moe", {}, {"shared_expert_intermediate_size": 64}, ModelError, "shared_expert"),
    ("glm4moe", {}, {"n_group": 3}, ModelError, "8 experts are not 3 groups"),
    ("glm4moe", {}, {"use_qk_norm": True}, ModelError, "lacks the tensor"),
    ("olmoe", {}, {"clip_qkv": 8.0}, UnsupportedError, "clip_qkv"),
    ("gptoss", {"model.layers.0.self_attn.sinks": None}, {}, ModelError, "sinks"),
    ("gptoss", {}, {"swiglu_limit": 0.0}, ModelError, "swiglu_limit"),
    ("gptoss", {}, {"hidden_act": "gelu_pytorch_tanh"}, UnsupportedError, "only silu, swish"),
    ("gptoss", {}, {"hidden_act": "relu2"}, UnsupportedError, "activation 'relu2'"),
    ("gptoss", {}, {"is_causal": None}, UnsupportedError, "is_causal None"),
    ("qwen3moe", {}, {"is_causal": False}, UnsupportedError, "is_causal False"),
    ("starcoder2", {}, {"is_causal": 0}, UnsupportedError, "is_causal 0"),
    ("smollm3", {}, {"no_rope_layers": [1, 0]}, ModelError, "no_rope_layers [1, 0] does not fit"),
    ("starcoder2", {}, {"hidden_act": "gelu"}, UnsupportedError, "activation 'gelu'"),
    ("cohere2", {}, {"logit_scale": 0}, ModelError, "logit_scale"),
    ("exaone4", {}, {"sliding_window": 0}, ModelError, "sliding_window 0"),
]


@pytest.mark.parametrize("family, tensors, settings, error, message", BAD)
def test_what_does_not_fit_is_refused_by_name(
    family: str,
    tensors: dict[str, torch.Tensor | None],
    settings: dict[str, Any],
    error: type[RedwoodError],
    message: str,
    tmp_path: Path,
) -> None:
    folder = rewritten(saved(tmp_path, family_model(family)), tensors, **settings)
    check_refused(open_folder, folder, error, message)


BAD_TEXT: list[tuple[str, dict[str, Any], type[RedwoodError], str]] = [
    ("qwen3vl", {"sliding_window": 4}, UnsupportedError, "sliding_window 4 is not defined for"),
    ("qwen3vlmoe", {"sliding_window": 4}, UnsupportedError, "sliding_window 4 is not defined for"),
    ("gemma3", {"is_causal": False}, UnsupportedError, "is_causal False"),
    ("qwen3vl", {"num_hidden_layers": 10**9}, ModelError, "num_hidden_layers 1000000000"),
    ("gemma3", {"num_hidden_layers": 10**9}, ModelError, "num_hidden_layers 1000000000"),
    ("qwen3vlmoe", {"num_hidden_layers": None}, ModelError, "num_hidden_layers None"),
]


@pytest.mark.parametrize("name, settings, error, message", BAD_TEXT)
def test_settings_of_a_text_part_that_are_not_computed_are_named(
    name: str, settings: dict[str, Any], error: type[RedwoodError], message: str, tmp_path: Path
) -> None:
    folder = folder_of(tmp_path, image_model(name))
    text = json.loads((folder / "config.json").read_text())["text_config"]
    check_refused(
        open_folder, rewritten(folder, {}, text_config={**text, **settings}), error, message
    )


@pytest.mark.parametrize("family", ["qwen2moe", "gptoss", "deepseek2", "deepseek3", "cohere2"])
def test_any_value_of_any_setting_is_read_or_refused(family: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, family_model(family))
    config = folder / "config.json"
    fields = json.loads(config.read_text())
    for key in fields:
        for value in (None, 0, -1, 7, 10**40, 0.5, math.nan, "x", [], [1], {}, True):
            config.write_text(json.dumps({**fields, key: value}))
            with contextlib.suppress(ModelError, UnsupportedError):
                open_folder(folder).close()


BAD_GGUF: list[tuple[dict[str, Any], type[RedwoodError], str]] = [
    ({"expert_count": 7}, ModelError, "'blk.0.ffn_gate_inp.weight' has shape (6, 32)"),
    ({"expert_count": 0}, ModelError, "expert_count 0"),
    ({"expert_used_count": 7}, ModelError, "cannot have 7 experts of 6"),
    ({"expert_feed_forward_length": 32}, ModelError, "ffn_gate_exps.weight' has shape (6, 48, 32)"),
    ({"expert_gating_func": 2}, UnsupportedError, "expert_gating_func 2 is a router"),
    ({"expert_weights_norm": False}, UnsupportedError, "expert_weights_norm False"),
    ({"expert_group_count": 2}, UnsupportedError, "expert_group_count 2"),
    ({"expert_shared_count": 1}, UnsupportedError, "expert_shared_count 1"),
    ({"expert_chunk_count": 1}, UnsupportedError, "setting qwen3moe.expert_chunk_count"),
]


@pytest.mark.parametrize("settings, error, message", BAD_GGUF)
def test_settings_of_a_mixture_that_do_not_fit_are_named(
    settings: dict[str, Any], error: type[RedwoodError], message: str, tmp_path: Path
) -> None:
    path = save_family(tmp_path / "m.gguf", "qwen3moe", family_model("qwen3moe"), **settings)
    check_refused(open_gguf, path, error, message)


def test_every_drafter_says_what_plain_decoding_says(tmp_path: Path) -> None:
    folder = str(saved(tmp_path, family_model("qwen3moe", initializer_range=0.05)))
    prompt, texts = [5, 9, 17, 33, 5, 9, 17, 33, 5, 9], []
    for drafter in (None, "ngram", folder):
        engine = redwood.load(folder, drafter, backend="native", threads=2)
        texts.append(engine.generate(prompt, max_tokens=24, temperature=0.0).token_ids)
    assert texts[0] == texts[1] == texts[2]


EAGER_REFUSES = LATENT
"""Families whose stock modules do not let a tree through."""


@pytest.mark.parametrize("family", FAMILIES)
def test_the_eager_backend_serves_trees_or_says_why_not(family: str) -> None:
    model = family_model(family)
    if family in EAGER_REFUSES:
        with pytest.raises(UnsupportedError):
            wrap_model(model)
    else:
        check_logits(wrap_model(model), family_model(family), limit=2e-4)


def test_blocks_of_four_bits_of_gpt_oss_are_read_as_they_are(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    folder = saved(tmp_path, family_model("gptoss"))
    changes: dict[str, torch.Tensor | None] = {}
    want = {}
    for name, rows, cols in (("gate_up_proj", 128, 32), ("down_proj", 32, 64)):
        stem = f"model.layers.1.mlp.experts.{name}"
        blocks = torch.randint(0, 256, (5, rows, cols // 32, 16), dtype=torch.uint8)
        scales = torch.randint(120, 130, (5, rows, cols // 32), dtype=torch.uint8)
        changes |= {stem: None, f"{stem}_blocks": blocks, f"{stem}_scales": scales}
        want[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    method = {"quant_method": "mxfp4"}
    rewritten(folder, changes, quantization_config=method)
    parts = {
        "expert_gate": want["gate_up_proj"][:, :, ::2],  # [experts, inputs, outputs]
        "expert_up": want["gate_up_proj"][:, :, 1::2],
        "expert_down": want["down_proj"],
    }
    with open_folder(folder) as source:
        for role, numbers_wanted in parts.items():
            weight = source.get(role, 1)
            assert weight is not None and weight.kind == "MXFP4"
            got = numbers(weight).reshape(5, -1, weight.cols)
            assert torch.equal(got, numbers_wanted.transpose(1, 2))
    whole = {f"model.layers.1.mlp.experts.{name}": tensor for name, tensor in want.items()}
    plain = rewritten(saved(tmp_path / "plain", family_model("gptoss")), whole)
    texts = [load_native(path, None, kv="f32", threads=1) for path in (folder, plain)]
    quick, exact = (b.extend([Nodes(b.open(), PROMPT)])[0] for b in texts)
    # Activations are rounded to 8 bits where the weights are blocks.
    assert float((quick - exact).pow(2).mean().sqrt()) < 0.06 * float(exact.std())
    rewritten(folder, {"model.layers.1.mlp.experts.down_proj_scales": None})
    with pytest.raises(ModelError, match="down_proj_scales"):
        open_folder(folder)
