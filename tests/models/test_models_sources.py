"""Folders, GGUF files, the hub, nonsense; and the real models."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from models_kit import (
    FakeWorld,
    assert_nothing_left,
    flip_bit,
    resolve,
    write_model,
    write_small_gguf,
)
from redwood import models
from redwood.errors import ModelError
from redwood.models import _cache, _convert

# --- folders, GGUF files, the hub, nonsense --------------------------------------------------


def test_a_folder_with_safetensors_is_itself(cache: Path, tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    assert resolve(tmp_path) == tmp_path


def test_a_folder_with_shards_needs_all_of_them(cache: Path, tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert resolve(tmp_path) == tmp_path
    index["weight_map"]["c"] = "model-2.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="model-2.safetensors is not a whole safetensors file"):
        resolve(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ModelError, match="not an index"):
        resolve(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.pth"])
def test_a_folder_with_pickles_only_is_refused(cache: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"not the weights")
    (tmp_path / name).write_bytes(b"\x80")
    with pytest.raises(ModelError, match=f"only pickled weights \\({name}\\).*save_pretrained"):
        resolve(tmp_path)


def test_a_folder_without_configuration_or_weights_is_refused(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no config.json"):
        resolve(tmp_path)
    (tmp_path / "inside.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="did you mean .*inside.gguf"):
        resolve(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="has no weights"):
        resolve(tmp_path)


def test_a_pointer_in_place_of_weights_is_refused(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("version 1\noid sha256:00\nsize 5\n")
    with pytest.raises(ModelError, match="downloaded in full"):
        resolve(tmp_path)


def test_a_gguf_file_is_converted_once_per_content(
    world: FakeWorld, cache: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.gguf"
    mine.write_bytes(b"mine")
    folder = resolve(mine)
    assert folder.parent == cache / "converted"
    assert folder.name == f"gguf-{hashlib.sha256(b'mine').hexdigest()[:16]}"
    source, dtype = world.conversions[0]
    assert (source.name, dtype) == ("mine.gguf", "float32")
    assert source.parent != tmp_path  # apart from whatever lies beside the user's file
    assert resolve(mine) == folder == resolve(shutil.copy(mine, tmp_path / "copy.gguf"))
    assert len(world.conversions) == 1
    assert models.gguf_path(str(mine)) == mine and mine.read_bytes() == b"mine"
    mine.write_bytes(b"edited")
    assert resolve(mine) != folder and len(world.conversions) == 2


def test_an_unchanged_gguf_file_is_not_read_again(
    world: FakeWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "mine.gguf"
    mine.write_bytes(b"mine")
    folder = resolve(mine)
    monkeypatch.setattr(_cache, "sha256_of", None)
    assert resolve(mine) == folder


def test_a_converted_gguf_file_is_listed_mended_verified_and_removed(
    world: FakeWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine.gguf"
    mine.write_bytes(b"mine")
    folder = resolve(mine)
    record = models.installed()[-1]
    assert (record.name, record.state, record.source) == (folder.name, "ready", str(mine))
    models.verify(folder.name)
    flip_bit(folder / "model.safetensors")
    assert models.installed()[-1].state == "damaged"
    with pytest.raises(ModelError, match=f"models fetch {mine}"):
        models.verify(folder.name)
    assert resolve(mine) == folder and len(world.conversions) == 2
    assert "making it again" in capsys.readouterr().err
    assert models.remove(folder.name) > 0 and not folder.exists()


def test_a_file_that_is_not_gguf_inside_is_refused(cache: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.gguf"
    mine.write_bytes(b"not a GGUF at all, only its name")
    with pytest.raises(ModelError, match="mine.gguf is not a GGUF file that can be read"):
        resolve(mine)
    assert_nothing_left(cache)


def test_another_kind_of_file_is_refused(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"\x80")
    with pytest.raises(ModelError, match="is a file but not a .gguf"):
        resolve(tmp_path / "weights.bin")


@pytest.mark.parametrize(
    ("returncode", "stderr", "error", "message"),
    [
        (1, "Traceback\nValueError: no such layer\n", ModelError, "bfloat16: ValueError: no such"),
        (1, "safetensors: I/O error: x (os error 28)\n", OSError, "No space left"),
        (-9, "", ModelError, "signal 9; was there enough memory"),
    ],
)
def test_a_failed_conversion_gives_its_reason(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    returncode: int,
    stderr: str,
    error: type[Exception],
    message: str,
) -> None:
    done = SimpleNamespace(returncode=returncode, stderr=stderr)
    monkeypatch.setattr(subprocess, "run", lambda *command, **options: done)
    with pytest.raises(error, match=message):
        _convert.convert(tmp_path / "a.gguf", tmp_path / "a", "bfloat16")


def test_a_model_on_the_hub_is_downloaded_without_pickles_and_code(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}

    def snapshot_download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        write_model(tmp_path)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve("some-org/some.model") == tmp_path
    assert asked["name"] == "some-org/some.model"
    assert "*.safetensors" in asked["allow_patterns"]
    assert not {"*.py", "*.bin", "*.pt", "*"} & set(asked["allow_patterns"])


def test_a_hub_that_cannot_be_reached_gives_one_line(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def snapshot_download(name: str, **options: Any) -> str:
        raise ConnectionError("Name or service not known\nand more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ModelError, match="ConnectionError: Name or service not known;") as caught:
        resolve("Org/SmolLM2-135M-Instruct")
    assert "\n" not in str(caught.value)
    assert "did you mean smollm2-135m-instruct?" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("smollm2-135-instruct", "smollm2-135m-instruct"),
        ("SmolLM2-135M-Instruct", "smollm2-135m-instruct"),
        ("smollm2", "smollm2-135m-instruct"),
        ("qwen2.5-coder-1.5b", "qwen2.5-coder-1.5b-instruct"),
    ],
)
def test_a_misspelt_name_gets_a_suggestion(cache: Path, name: str, suggestion: str) -> None:
    with pytest.raises(ModelError, match=f"did you mean {suggestion}?"):
        resolve(name)


@pytest.mark.parametrize("name", ["", "nonsense", "./nowhere", "../x/y", "a/b/c", "x" * 5000, "\0"])
def test_an_unknown_name_lists_what_is_accepted(cache: Path, name: str) -> None:
    with pytest.raises(ModelError, match="give one of") as caught:
        resolve(name)
    assert all(known in str(caught.value) for known in models.PACKAGED)
    assert len(str(caught.value)) < 500
    assert not cache.exists()


# --- the real ones --------------------------------------------------------------------------------


def test_the_catalogue_is_consistent() -> None:
    assert models.DEFAULT_MODEL in models.PACKAGED
    for name, model in models.PACKAGED.items():
        assert name == model.name
        assert len(model.requirements) == len(model.members)
        assert all("==" in requirement for requirement in model.requirements)
        assert len(model.sha256) == 64 and model.file_name.endswith(".gguf")
        assert model.dtype in _convert._ITEM_BYTES


def test_importing_models_stays_light() -> None:
    script = (
        "import sys, redwood.models\n"
        "heavy = {'torch', 'transformers', 'gguf', 'huggingface_hub'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or None)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)


def test_a_real_conversion_keeps_weights_stop_tokens_and_splitting(
    cache: Path, tmp_path: Path
) -> None:
    from tokenizers import Tokenizer

    write_small_gguf(tmp_path / "small.gguf")
    (tmp_path / "tokenizer_config.json").write_text("{ of some other model")
    folder = resolve(tmp_path / "small.gguf")
    weights = load_file(folder / "model.safetensors")
    expected = np.random.default_rng(0).standard_normal((260, 32), np.float32)
    np.testing.assert_array_equal(weights["model.embed_tokens.weight"], expected)
    assert {weight.dtype for weight in weights.values()} == {np.dtype(np.float32)}
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 0]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode("\n\n1<|im_end|>").tokens == ["ĊĊ", "1", "<|im_end|>"]


@pytest.mark.slow
def test_a_gguf_that_lacks_weights_is_refused(cache: Path, tmp_path: Path) -> None:
    write_small_gguf(tmp_path / "small.gguf", skip="blk.0.attn_v")
    with pytest.raises(ModelError, match="1 weights are not in the file, .*v_proj"):
        resolve(tmp_path / "small.gguf")
    assert_nothing_left(cache)


@pytest.mark.slow
def test_the_real_smollm2_is_fetched_and_ends_its_turns(cache: Path) -> None:
    folder = models.resolve(models.DEFAULT_MODEL)
    models.verify(models.DEFAULT_MODEL)
    assert models.gguf_path(models.DEFAULT_MODEL) is not None
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert vocabulary["<|im_end|>"] == ends[0]
    assert tokenizer["pre_tokenizer"]["pretokenizers"][0]["type"] == "Digits"
    assert models.remove(models.DEFAULT_MODEL) > 600_000_000
