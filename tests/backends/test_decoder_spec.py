"""What a decoder is told: equal to what Transformers computes with, or refused with the reason."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from decoder_kit import (
    CLASSES,
    gguf_settings,
    gguf_tensors,
    save_gguf,
    tiny_config,
    tiny_model,
    write_gguf,
)
from redwood.backends.native.rope import make_rope
from redwood.backends.native.spec import DecoderSpec
from redwood.backends.native.spec_gguf import spec_from_gguf
from redwood.backends.native.spec_hf import spec_from_config, spec_from_folder
from redwood.errors import ArgumentError, ModelError, RedwoodError, UnsupportedError
from redwood.models._gguf import GGUFFile

HERE = Path("here")


def spec_of(architecture: str, capacity: int | None = None, **changes: Any) -> DecoderSpec:
    return spec_from_config(tiny_config(architecture, **changes), HERE, capacity)


def gguf_spec(path: Path, capacity: int | None = None) -> DecoderSpec:
    with GGUFFile(path) as file:
        return spec_from_gguf(file, capacity)


def ulps(ours: Any, theirs: torch.Tensor) -> int:
    bits = np.array([np.asarray(ours, np.float32), theirs.numpy()]).view(np.int32)
    return int(np.abs(np.diff(bits.astype(np.int64), axis=0)).max())


@pytest.mark.parametrize("architecture", CLASSES)
def test_fields_of_each_architecture(architecture: str) -> None:
    spec, config = spec_of(architecture), tiny_config(architecture)
    layers, gemma = config.num_hidden_layers, architecture.startswith("gemma")
    assert spec.architecture == architecture
    assert (spec.vocab_size, spec.hidden, spec.layers, spec.ffn) == (96, 32, layers, 64)
    head_dim = 8 if architecture in ("llama", "qwen2", "phi3") else 16
    assert (spec.heads, spec.kv_heads, spec.head_dim, spec.context) == (4, 2, head_dim, 128)
    assert spec.norm_eps == float(np.float32(config.rms_norm_eps))
    assert spec.activation == ("gelu_tanh" if gemma else "silu")
    scalar = config.query_pre_attn_scalar if gemma else head_dim
    assert spec.attention_scale == float(np.float32(scalar**-0.5))
    assert spec.embedding_scale == (float(np.float32(math.sqrt(32))) if gemma else 1)
    caps = (50, 30) if architecture == "gemma2" else (0, 0)
    assert (spec.attention_softcap, spec.logit_softcap) == caps
    assert spec.tied == (gemma or architecture == "qwen3")
    assert (spec.attention_bias, spec.output_bias) == (architecture == "qwen2", False)
    assert spec.qk_norm == (architecture in ("qwen3", "gemma3"))
    assert spec.post_norms == gemma
    assert (
        spec.windows
        == {
            "llama": (0, 0, 0),
            "mistral": (5, 5, 5),
            "qwen2": (0, 4, 4),
            "qwen3": (0, 0, 0),
            "gemma2": (4, 0, 4),
            "gemma3": (4, 4, 4, 4, 4, 0, 4),
            "phi3": (5, 5, 5),
        }[architecture]
    )


@pytest.mark.parametrize("architecture", CLASSES)
def test_frequencies_equal_those_of_the_rotary_module(architecture: str) -> None:
    rotary = tiny_model(architecture).model.rotary_emb
    spec = spec_of(architecture)
    kinds = ("full_attention_", "sliding_attention_") if architecture == "gemma3" else ("",)
    assert len(spec.ropes) == len(kinds)
    for kind, rope in zip(kinds, spec.ropes, strict=True):
        # Ours are rounded right; PyTorch's powers may be off by one, and then their inverse by two.
        assert ulps(rope.inv_freq, getattr(rotary, f"{kind}inv_freq")) <= 2
        assert rope.attention_factor == getattr(rotary, f"{kind}attention_scaling") == 1
    assert spec.ropes[0].rotary_dim == (4 if architecture == "phi3" else spec.head_dim)
    if architecture == "gemma3":
        assert spec.rope_of_layer == (1, 1, 1, 1, 1, 0, 1)
        assert spec.ropes[0].inv_freq[1] < spec.ropes[1].inv_freq[1]


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0 + i / 7 for i in range(16)],
    "long_factor": [3.0 + i / 3 for i in range(16)],
    "original_max_position_embeddings": 512,
}
SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 3.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    YARN,
    {**YARN, "beta_fast": 20.0, "beta_slow": 2.0, "truncate": False},
    {**YARN, "attention_factor": 1.25},
    {**YARN, "mscale": 0.7, "mscale_all_dim": 0.9},
    {**YARN, "factor": 1.0},
    LONG,
    {**LONG, "attention_factor": 1.5},
    {**LONG, "factor": 16.0},
]


@pytest.mark.parametrize("theta", [10000.0, 500000.0, 123.4])
@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: s["rope_type"])
def test_each_scaling_equals_transformers(scaling: dict[str, Any], theta: float) -> None:
    fields = {**scaling, "rope_theta": theta}
    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=4,
        max_position_embeddings=2048,
        rope_parameters=dict(fields),
    )
    for capacity in (512, 513, None):
        want, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, seq_len=capacity or 2048)
        rope = make_rope(fields, 32, context=2048, capacity=capacity, where=HERE)
        assert ulps(rope.inv_freq, want) <= 4
        assert rope.attention_factor == pytest.approx(factor, rel=1e-7)
        if scaling["rope_type"] == "longrope":
            longer = capacity != 512
            assert (rope.inv_freq[0] < 0.5) == longer


def test_capacity_chooses_between_short_and_long_factors() -> None:
    rope = {**LONG, "short_factor": [1.0, 1.0], "long_factor": [2.0, 4.0]}
    rope["original_max_position_embeddings"] = 64
    changes = {"original_max_position_embeddings": 64, "rope_parameters": rope}
    first = [spec_of("phi3", capacity, **changes).ropes[0] for capacity in (None, 65, 64, 1)]
    assert [r.inv_freq[0] for r in first] == [0.5, 0.5, 1.0, 1.0]
    assert first[0].attention_factor == float(np.float32(math.sqrt(1 + math.log(2) / math.log(64))))
    for capacity in (0, -1, 2.5, True):
        with pytest.raises(ArgumentError):
            spec_of("phi3", capacity)  # type: ignore[arg-type]


def test_old_and_new_spellings_of_rotary_settings_agree(tmp_path: Path) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    del fields["rope_parameters"]
    scaling = {"type": "linear", "factor": 2.0}
    path.write_text(json.dumps({**fields, "rope_theta": 777.0, "rope_scaling": scaling}))
    new = {"rope_type": "linear", "factor": 2.0, "rope_theta": 777.0}
    assert spec_from_folder(tmp_path) == spec_of("llama", rope_parameters=new)


def test_old_and_new_spellings_of_gemma3_agree(tmp_path: Path) -> None:
    tiny_config("gemma3").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    del fields["rope_parameters"], fields["layer_types"]
    old = {"rope_theta": 5e5, "rope_local_base_freq": 9e3, "sliding_window_pattern": 3}
    scaling = {"rope_type": "linear", "factor": 8.0}
    path.write_text(json.dumps({**fields, **old, "rope_scaling": scaling}))
    full = {**scaling, "rope_theta": 5e5}
    local = {"rope_type": "default", "rope_theta": 9e3}
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    assert spec_from_folder(tmp_path) == spec_of(
        "gemma3",
        rope_parameters={"full_attention": full, "sliding_attention": local},
        layer_types=(kinds * 3)[:7],
    )


def test_windows_follow_the_switches() -> None:
    assert spec_of("mistral", sliding_window=None).windows == (0, 0, 0)
    assert spec_of("phi3", sliding_window=None).windows == (0, 0, 0)
    assert spec_of("qwen2", use_sliding_window=False).windows == (0, 0, 0)
    on = {"use_sliding_window": True, "sliding_window": 9}
    assert spec_of("qwen3", **on, max_window_layers=2).windows == (0, 0, 9)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    assert spec_of("qwen3", **on, layer_types=kinds).windows == (9, 0, 9)
    assert spec_of("gemma2", layer_types=kinds[::-1]).windows == (4, 0, 4)


REFUSED: list[tuple[str, dict[str, Any], type[RedwoodError], str]] = [
    ("qwen3", {"mlp_bias": True}, UnsupportedError, "mlp_bias"),
    ("llama", {"hidden_act": "relu"}, UnsupportedError, "activation 'relu'"),
    ("gemma2", {"hidden_activation": "gelu"}, UnsupportedError, "activation 'gelu'"),
    ("gemma3", {"attn_logit_softcapping": 50.0}, UnsupportedError, "for Gemma 3"),
    ("gemma3", {"use_bidirectional_attention": True}, UnsupportedError, "bidirectional"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": -2.0, "rope_theta": 1e4}},
        ModelError,
        "factor -2.0",
    ),
    (
        "qwen2",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1]}},
        UnsupportedError,
        "multimodal",
    ),
    ("llama", {"partial_rotary_factor": 0.5}, UnsupportedError, "partial_rotary_factor 0.5"),
    (
        "mistral",
        {"layer_types": ["full_attention"] * 3},
        UnsupportedError,
        "ignores layer_types in mistral",
    ),
    ("llama", {"num_key_value_heads": 3}, ModelError, "4 heads do not share 3"),
    (
        "qwen3",
        {"layer_types": ["sliding_attention"] * 3, "use_sliding_window": False},
        ModelError,
        "sliding_window None",
    ),
    ("llama", {"rms_norm_eps": -1.0}, ModelError, "norm_eps -1.0"),
    ("gemma2", {"final_logit_softcapping": 0.0}, ModelError, "final_logit_softcapping 0.0"),
    ("gemma2", {"query_pre_attn_scalar": 0}, ModelError, "attention_scale"),
]


@pytest.mark.parametrize("architecture, changes, error, message", REFUSED)
def test_what_cannot_be_served_is_refused_with_the_reason(
    architecture: str, changes: dict[str, Any], error: type[RedwoodError], message: str
) -> None:
    with pytest.raises(error, match="^here: ") as caught:
        spec_of(architecture, **changes)
    assert message in str(caught.value)


CONFIGS: list[tuple[str, type[RedwoodError], str]] = [
    ("{", ModelError, "is not JSON"),
    ("[" * 100000, ModelError, "is not JSON"),
    ("[]", ModelError, "is not a JSON object"),
    ("{}", UnsupportedError, "model type None"),
    ('{"model_type": ["llama"]}', UnsupportedError, "model type ['llama']"),
    ('{"model_type": "mamba"}', UnsupportedError, "model type 'mamba'"),
    ('{"model_type": "jamba"}', UnsupportedError, "model type 'jamba'"),
    ('{"model_type": "t5gemma"}', UnsupportedError, "model type 't5gemma'"),
    (
        '{"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}',
        UnsupportedError,
        "not LlamaForCausalLM",
    ),
    (
        '{"model_type": "llama", "quantization_config": {"bits": 4}}',
        UnsupportedError,
        "quantization_config",
    ),
    ('{"model_type": "llama", "hidden_size": "many"}', ModelError, "is not usable"),
    ('{"model_type": "llama", "num_attention_heads": 0}', ModelError, "is not usable"),
]


@pytest.mark.parametrize("text, error, message", CONFIGS)
def test_a_bad_config_is_named(
    text: str, error: type[RedwoodError], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(error) as caught:
        spec_from_folder(tmp_path)
    assert message in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="config.json cannot be read: No such file"):
        spec_from_folder(tmp_path)


@pytest.mark.parametrize("architecture", CLASSES)
def test_a_gguf_file_and_a_folder_give_one_spec(architecture: str, tmp_path: Path) -> None:
    changes = {"sliding_window": None} if architecture == "mistral" else {}
    model = tiny_model(architecture, **changes)
    model.save_pretrained(tmp_path)
    want = spec_from_folder(tmp_path)
    if architecture == "mistral":
        want = dataclasses.replace(want, architecture="llama")
    assert gguf_spec(save_gguf(tmp_path / "m.gguf", model)) == want
    assert spec_from_config(model.config, HERE) == spec_from_folder(tmp_path)


def test_what_a_gguf_file_leaves_out_is_what_llama_cpp_assumes(tmp_path: Path) -> None:
    model, path = tiny_model("gemma2"), tmp_path / "m.gguf"
    absent: dict[str, Any] = {"attention.sliding_window": None, "rope.freq_base": None}
    spec = gguf_spec(save_gguf(path, model, **absent, **{"attention.scale": None}))
    assert spec.windows == (4096, 0, 4096) and spec.attention_scale == 0.25
    assert spec.ropes[0].inv_freq[1] == pytest.approx(10000 ** (-1 / 8), rel=1e-6)
    for key, value in (("attention.key_length", None), ("rope.dimension_count", 8)):
        assert gguf_spec(save_gguf(path, tiny_model("llama"), **{key: value})).head_dim == 8
    full = {"attention.sliding_window": None}
    assert gguf_spec(save_gguf(path, tiny_model("gemma3"), **full)).windows == (0,) * 7
    local = gguf_spec(save_gguf(path, tiny_model("gemma3"), **{"rope.freq_base_swa": 500.0}))
    assert local.ropes[1].inv_freq[1] == pytest.approx(500 ** (-1 / 8), rel=1e-6)


def test_gguf_scalings_equal_those_of_configs(tmp_path: Path) -> None:
    model, path = tiny_model("qwen3"), tmp_path / "m.gguf"
    given = {"rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64}
    for kind in (None, "none", "linear", "yarn"):
        settings = {**given, "rope.scaling.type": kind}
        if kind == "yarn":
            settings["rope.scaling.yarn_beta_fast"] = 16.0
        fields = {"rope_type": kind or "linear", "rope_theta": 10000.0, "factor": 4.0}
        fields |= {"original_max_position_embeddings": 64, "beta_fast": 16.0}
        if kind == "none":
            fields = {"rope_type": "default", "rope_theta": 10000.0}
        want = make_rope(fields, 16, context=128, capacity=None, where=HERE)
        assert gguf_spec(save_gguf(path, model, **settings)).ropes == (want,)


def test_factors_of_llama3_in_a_gguf_file_divide_the_frequencies(tmp_path: Path) -> None:
    model = tiny_model("llama")
    tensors: dict[str, Any] = gguf_tensors(model)
    tensors["rope_freqs.weight"] = np.array([1, 2, 4, 8], np.float32)
    spec = gguf_spec(write_gguf(tmp_path / "m.gguf", "llama", gguf_settings(model), tensors))
    plain = np.array(spec_from_config(model.config, HERE).ropes[0].inv_freq)
    assert np.allclose(spec.ropes[0].inv_freq, plain / [1, 2, 4, 8], rtol=2e-7, atol=0)


def test_factors_of_phi3_in_a_gguf_file_are_chosen_by_capacity(tmp_path: Path) -> None:
    model = tiny_model("phi3")
    tensors: dict[str, Any] = gguf_tensors(model)
    tensors["rope_factors_short.weight"] = np.array([1, 1], np.float32)
    tensors["rope_factors_long.weight"] = np.array([2, 4], np.float32)
    settings = {**gguf_settings(model), "rope.scaling.attn_factor": 1.25}
    settings["rope.scaling.original_context_length"] = 64
    path = write_gguf(tmp_path / "m.gguf", "phi3", settings, tensors)
    first = [gguf_spec(path, capacity).ropes[0] for capacity in (None, 65, 64)]
    assert [rope.inv_freq[0] for rope in first] == [0.5, 0.5, 1.0]
    assert {rope.attention_factor for rope in first} == {1.25}
    del tensors["rope_factors_long.weight"]
    with pytest.raises(ModelError, match="lacks the tensor rope_factors_long"):
        gguf_spec(write_gguf(tmp_path / "m.gguf", "phi3", settings, tensors))


GGUF_REFUSED: list[tuple[dict[str, Any], type[RedwoodError], str]] = [
    ({"block_count": None}, ModelError, "block_count is missing"),
    ({"block_count": 0}, ModelError, "block_count 0 must be"),
    ({"block_count": "three"}, ModelError, "block_count 'three' must be"),
    ({"attention.head_count": [4, 2, 4]}, UnsupportedError, "differs between layers"),
    ({"attention.layer_norm_rms_epsilon": math.nan}, ModelError, "finite"),
    ({"attention.value_length": 4}, UnsupportedError, "value_length 4"),
    ({"attention.causal": False}, UnsupportedError, "attention.causal False"),
    ({"expert_count": 8}, ModelError, "expert_used_count is missing"),
    ({"residual_scale": 0.5}, UnsupportedError, "setting llama.residual_scale"),
    ({"final_logit_softcapping": 30.0}, UnsupportedError, "Gemma only"),
    ({"attn_logit_softcapping": 30.0}, UnsupportedError, "gemma2 only"),
    ({"attention.sliding_window": 8}, UnsupportedError, "to which layers"),
    ({"attention.sliding_window": 8.0}, ModelError, "whole number"),
    ({"rope.dimension_count": 4}, UnsupportedError, "head size 8"),
    ({"rope.dimension_count": 7}, UnsupportedError, "even"),
    ({"rope.freq_base": 0.0}, ModelError, "rope_theta"),
    ({"rope.freq_base_swa": 5.0}, UnsupportedError, "Gemma only"),
    ({"rope.scaling.type": "dynamic"}, UnsupportedError, "scaling.type dynamic"),
    ({"rope.scaling.type": "longrope"}, ModelError, "rope_factors_short"),
    ({"rope.scaling.attn_factor": 2.0}, UnsupportedError, "attn_factor 2.0"),
    ({"rope.scaling.yarn_attn_factor": 2.0}, UnsupportedError, "yarn_attn_factor"),
]


@pytest.mark.parametrize("changes, error, message", GGUF_REFUSED)
def test_a_setting_of_a_gguf_file_that_does_not_fit_is_named(
    changes: dict[str, Any], error: type[RedwoodError], message: str, tmp_path: Path
) -> None:
    path = save_gguf(tmp_path / "m.gguf", tiny_model("llama"), **changes)
    with pytest.raises(error) as caught:
        gguf_spec(path)
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_other_gguf_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    for architecture, general, message in (
        ("rwkv7", {}, "architecture 'rwkv7'"),
        ("llama", {"general.type": "adapter"}, "is a adapter"),
    ):
        write_gguf(path, architecture, {}, {}, general)
        with pytest.raises(UnsupportedError, match=message):
            gguf_spec(path)
