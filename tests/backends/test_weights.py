"""Every weight of every architecture, from folders and GGUF files."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from decoder_kit import (
    CLASSES,
    PlainDecoder,
    gguf_settings,
    gguf_tensors,
    numbers,
    permuted,
    save_gguf,
    tiny_model,
    write_gguf,
)
from redwood import models
from redwood.backends.native.roles import GLOBAL_ROLES, LAYER_ROLES
from redwood.backends.native.weights import (
    WeightSource,
    open_folder,
    open_gguf,
)
from redwood.errors import ArgumentError, ModelError, RedwoodError, UnsupportedError

TOKENS = torch.arange(5, 19)


def logits_of(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        answer: torch.Tensor = model(input_ids=TOKENS[None], use_cache=False).logits[0]
    return answer


def roles_of(source: WeightSource) -> dict[tuple[str, int | None], torch.Tensor]:
    keys: list[tuple[str, int | None]] = [(role, None) for role in GLOBAL_ROLES]
    keys += [(role, layer) for layer in range(source.spec.layers) for role in LAYER_ROLES]
    found = {key: source.get(*key) for key in keys}
    return {key: numbers(weight) for key, weight in found.items() if weight}


@pytest.mark.parametrize("architecture", CLASSES)
def test_a_plain_decoder_over_a_folder_gives_the_logits_of_transformers(
    architecture: str, tmp_path: Path
) -> None:
    model = tiny_model(architecture)
    model.save_pretrained(tmp_path)
    with open_folder(tmp_path) as source:
        got = PlainDecoder(source).logits(TOKENS)
    torch.testing.assert_close(got, logits_of(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", CLASSES)
def test_a_plain_decoder_over_a_gguf_file_gives_the_logits_of_transformers(
    architecture: str, tmp_path: Path
) -> None:
    # Converters write no window for Mistral.
    changes = {"sliding_window": None} if architecture == "mistral" else {}
    model = tiny_model(architecture, **changes)
    with open_gguf(save_gguf(tmp_path / "m.gguf", model)) as source:
        got = PlainDecoder(source).logits(TOKENS)
    want = logits_of(model)
    if architecture == "gemma2":
        assert source.spec.attention_softcap == 50 and source.spec.logit_softcap == 30
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "gemma3"])
def test_biases_of_all_projections_of_attention(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture, attention_bias=True)
    model.save_pretrained(tmp_path)
    want = logits_of(model)
    with open_folder(tmp_path) as source:
        assert source.spec.attention_bias and source.spec.output_bias
        torch.testing.assert_close(PlainDecoder(source).logits(TOKENS), want, rtol=1e-4, atol=1e-4)
    with open_gguf(save_gguf(tmp_path / "m.gguf", model)) as source:
        assert source.spec.attention_bias and source.spec.output_bias
        torch.testing.assert_close(PlainDecoder(source).logits(TOKENS), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bytes_of_a_folder_are_those_of_the_state_dict(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model("qwen2").to(dtype)
    model.save_pretrained(tmp_path)
    state = model.state_dict()
    kind = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    with open_folder(tmp_path) as source:
        weight = source.get("down", 2)
        assert weight is not None
        assert (weight.kind, weight.rows, weight.cols, weight.add) == (kind, 32, 64, 0)
        assert weight.row_order is None and weight.row_bytes == 64 * dtype.itemsize
        raw = weight.read()
        bias = source.get("k_bias", 0)
        assert bias is not None and (bias.rows, bias.cols) == (1, 16)
    assert not raw.flags.writeable and raw.flags.c_contiguous
    want = state["model.layers.2.mlp.down_proj.weight"].view(torch.uint8).flatten().numpy()
    assert np.array_equal(raw, want)  # after close


def test_fused_tensors_of_phi3_are_cut_into_their_rows(tmp_path: Path) -> None:
    model = tiny_model("phi3")
    state = model.state_dict()
    model.save_pretrained(tmp_path)
    for source in (open_folder(tmp_path), open_gguf(save_gguf(tmp_path / "m.gguf", model))):
        with source:
            parts = {role: numbers(source.get(role, 1)) for role in ("q", "k", "v", "gate", "up")}  # type: ignore[arg-type]
        qkv = torch.cat([parts[role] for role in "qkv"])
        assert torch.equal(qkv, state["model.layers.1.self_attn.qkv_proj.weight"])
        gate_up = torch.cat([parts["gate"], parts["up"]])
        assert torch.equal(gate_up, state["model.layers.1.mlp.gate_up_proj.weight"])
        assert [len(parts[role]) for role in ("q", "k", "v", "gate")] == [32, 16, 16, 64]


def test_row_order_undoes_the_converter_on_quantized_rows(tmp_path: Path) -> None:
    model = tiny_model("llama")
    tensors: dict[str, Any] = gguf_tensors(model)
    random = np.random.default_rng(0).integers(0, 256, (32, 34), dtype=np.uint8)
    random[:, 1] &= 0x3F  # no infinite scales
    packed = permuted(torch.tensor(random), 4).numpy()
    tensors["blk.0.attn_q.weight"] = (packed, "Q8_0")
    path = write_gguf(tmp_path / "m.gguf", "llama", gguf_settings(model), tensors)
    with open_gguf(path) as source:
        weight = source.get("q", 0)
        assert weight is not None and weight.kind == "Q8_0" and weight.row_order is not None
        assert weight.row_order.dtype == np.int32
        rows = weight.read().reshape(32, weight.row_bytes)
        assert np.array_equal(rows[weight.row_order], random)
        assert source.get("v", 0).row_order is None  # type: ignore[union-attr]


def test_norms_of_gemma_are_less_one_in_folders_only(tmp_path: Path) -> None:
    model = tiny_model("gemma3")
    model.save_pretrained(tmp_path)
    folder, file = open_folder(tmp_path), open_gguf(save_gguf(tmp_path / "m.gguf", model))
    with folder, file:
        ours, theirs = roles_of(folder), roles_of(file)
        for role, layer in ours:
            weight = folder.get(role, layer)
            assert weight is not None and weight.add == ("norm" in role)
            assert file.get(role, layer).add == 0  # type: ignore[union-attr]
    assert ours.keys() == theirs.keys() and len(ours) == 2 + 13 * 7
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    with open_folder(tmp_path / "one") as one, open_folder(tmp_path / "many") as many:
        ours, theirs = roles_of(one), roles_of(many)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    index = tmp_path / "many" / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    gone = fields["weight_map"].pop("model.norm.weight")
    index.write_text(json.dumps(fields))
    assert "disagree about 'model.norm.weight'" in refusal(tmp_path / "many")
    fields["weight_map"]["model.norm.weight"] = "../one/model.safetensors"
    index.write_text(json.dumps(fields))
    assert "outside its folder" in refusal(tmp_path / "many")
    index.write_text("[]")
    assert "cannot be read" in refusal(tmp_path / "many")
    fields["weight_map"]["model.norm.weight"] = gone
    index.write_text(json.dumps(fields))
    (tmp_path / "many" / gone).unlink()
    assert gone in refusal(tmp_path / "many")


def refusal(path: Path, error: type[RedwoodError] = ModelError) -> str:
    with pytest.raises(error) as caught:
        (open_folder if path.is_dir() else open_gguf)(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny_model("llama").save_pretrained(folder)
    return folder


def changed(llama: Path, folder: Path, **tensors: torch.Tensor | None) -> Path:
    """The folder with tensors changed, added, or taken out; - in a name stands for a dot."""
    shutil.copytree(llama, folder, dirs_exist_ok=True)
    state = load_file(llama / "model.safetensors")
    state |= {name.replace("-", "."): t for name, t in tensors.items() if t is not None}
    gone = {name.replace("-", ".") for name, t in tensors.items() if t is None}
    kept = {name: t for name, t in state.items() if name not in gone}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


NORM, ONES = "model-norm-weight", torch.ones(32)
DAMAGE: list[tuple[dict[str, torch.Tensor | None], type[RedwoodError], str]] = [
    ({NORM: None}, ModelError, "lacks the tensor 'model.norm.weight'"),
    ({NORM: torch.ones(31)}, ModelError, "has shape (31,) instead of (32,)"),
    ({NORM: torch.ones(1, 32)}, ModelError, "has shape (1, 32) instead of (32,)"),
    ({NORM: torch.ones(32).double()}, UnsupportedError, "is F64"),
    ({"model-layers-3-mlp-up_proj-weight": ONES}, ModelError, "says it has 3 layers"),
    ({"model-layers-1-mlp-up_proj-bias": ONES}, UnsupportedError, "is no part of a llama model"),
    ({"model-layers-1-self_attn-q_norm-weight": ONES}, UnsupportedError, "is no part of"),
]


@pytest.mark.parametrize("tensors, error, message", DAMAGE)
def test_a_tensor_that_does_not_fit_is_named(
    tensors: dict[str, torch.Tensor | None],
    error: type[RedwoodError],
    message: str,
    llama: Path,
    tmp_path: Path,
) -> None:
    assert message in refusal(changed(llama, tmp_path, **tensors), error)


def test_frequencies_that_transformers_skips_are_skipped(llama: Path, tmp_path: Path) -> None:
    name = "model-layers-0-self_attn-rotary_emb-inv_freq"
    open_folder(changed(llama, tmp_path, **{name: torch.ones(4)})).close()


def test_a_folder_without_whole_safetensors_is_refused(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    for length in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert "not a whole safetensors file" in refusal(tmp_path)
    path.unlink()
    assert "has neither model.safetensors nor" in refusal(tmp_path)


def test_an_unequal_head_overrules_a_config_that_says_tied(llama: Path, tmp_path: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    state = load_file(llama / "model.safetensors")
    for head, tied in ((state["lm_head.weight"], False), (None, True)):
        equal = state["model.embed_tokens.weight"].clone()
        folder = changed(llama, tmp_path / str(tied), **{"lm_head-weight": equal if tied else head})
        (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
        with open_folder(folder) as source:
            assert source.spec.tied is tied and (source.get("output") is None) is tied


def test_gguf_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    settings, tensors = gguf_settings(model), gguf_tensors(model)
    vector = np.ones(32, np.float32)

    def refused(error: type[RedwoodError], **changes: Any) -> str:
        made = {**tensors, **{name.replace("-", "."): t for name, t in changes.items()}}
        kept = {name: t for name, t in made.items() if t is not None}
        return refusal(write_gguf(tmp_path / "m.gguf", "qwen2", settings, kept), error)

    assert "lacks the tensor 'blk.1.ffn_gate.weight'" in refused(
        ModelError, **{"blk-1-ffn_gate-weight": None}
    )
    assert "lacks the tensor 'blk.2.attn_k.bias'" in refused(
        ModelError, **{"blk-2-attn_k-bias": None}
    )
    assert "says it has 3 layers" in refused(ModelError, **{"blk-3-attn_norm-weight": vector})
    assert "no part of a qwen2" in refused(UnsupportedError, **{"blk-1-ffn_up-bias": vector})
    assert "no part of" in refused(UnsupportedError, **{"blk-1-attn_q_norm-weight": vector})
    assert "no matrix token_embd.weight" in refused(ModelError, **{"token_embd-weight": None})
    assert "instead of (32,)" in refused(ModelError, **{"output_norm-weight": vector[:16]})


def test_roles_and_layers_are_checked(llama: Path) -> None:
    with open_folder(llama) as source:
        for role, layer in (("queries", 0), ("q", None), ("embed", 0), ("q", 3), ("q", -1)):
            with pytest.raises(ArgumentError):
                source.get(role, layer)
        assert source.get("q_norm", 0) is None
        late = source.get("embed")
    assert late is not None
    with pytest.raises(ModelError):
        late.read()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct"])
def test_packaged_files_agree_with_their_conversion(name: str) -> None:
    file = models.gguf_path(name)
    if file is None:
        pytest.skip(f"{name} was not fetched")
    folder = models.resolve(name, progress=False)
    with open_gguf(file) as ours, open_folder(folder) as theirs:
        assert ours.spec == theirs.spec
        for layer in (0, ours.spec.layers - 1):
            for role in LAYER_ROLES:
                mine, converted = ours.get(role, layer), theirs.get(role, layer)
                assert (mine is None) == (converted is None)
                if mine is not None and converted is not None:
                    values = numbers(mine)
                    if converted.kind == "BF16":
                        values = values.bfloat16().float()
                    assert torch.equal(values, numbers(converted)), (role, layer)


ODD: list[Any] = [
    None,
    0,
    -1,
    7,
    2**31 - 1,
    10**40,
    0.5,
    math.nan,
    "x",
    [],
    [1],
    {},
    {"a": 1},
    True,
]


@pytest.mark.parametrize("architecture", CLASSES)
def test_any_value_of_any_setting_is_read_or_refused(architecture: str, tmp_path: Path) -> None:
    tiny_model(architecture).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    for key in [*fields, "head_dim", "rope_theta", "rope_scaling", "layer_types"]:
        for value in ODD:
            path.write_text(json.dumps({**fields, key: value}))
            with contextlib.suppress(ModelError, UnsupportedError):
                open_folder(tmp_path).close()


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "phi3"])
def test_any_value_of_any_gguf_setting_is_read_or_refused(
    architecture: str, tmp_path: Path
) -> None:
    model = tiny_model(architecture)
    more = ["rope.scaling.type", "rope.scaling.factor", "attention.sliding_window_pattern"]
    for key in [*gguf_settings(model), *more, "rope.dimension_count", "attention.scale"]:
        for value in (
            None,
            0,
            7,
            2**31 - 1,
            0.5,
            -1.0,
            math.nan,
            math.inf,
            "x",
            "yarn",
            [1],
            [1.5],
        ):
            path = save_gguf(tmp_path / "m.gguf", model, **{key: value})
            with contextlib.suppress(ModelError, UnsupportedError):
                open_gguf(path).close()


def test_any_flipped_bit_before_the_data_is_read_or_refused(tmp_path: Path) -> None:
    path = save_gguf(tmp_path / "m.gguf", tiny_model("qwen2", num_hidden_layers=1))
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    for _ in range(400):
        damaged = bytearray(whole)
        damaged[random.integers(24, 1800)] ^= 1 << random.integers(8)
        path.write_bytes(damaged)
        with contextlib.suppress(ModelError, UnsupportedError):
            open_gguf(path).close()
