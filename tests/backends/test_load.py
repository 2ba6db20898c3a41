"""Which backend runs a model, and what is read for it."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import redwood
from cli_kit import Ran
from conftest import save_model, tiny_tokenizer
from models_kit import FakeWorld, write_small_gguf
from redwood.backends import load as loading
from redwood.backends.base import AcceptedPath, Nodes
from redwood.backends.load import fetch_for, open_model
from redwood.backends.native.backend import NativeBackend
from redwood.errors import ArgumentError, CapacityError, ModelError, UnsupportedError

PROMPT = [5, 9, 17, 33, 65]


@pytest.fixture
def target(tiny_model_folder: Path) -> str:
    return str(tiny_model_folder)


@pytest.fixture
def gpt2(tmp_path: Path) -> str:
    config = transformers.GPT2Config(
        vocab_size=300, n_embd=32, n_head=4, n_layer=1, n_positions=64, eos_token_id=1
    )
    config.bos_token_id = 0
    model = transformers.GPT2LMHeadModel(config).eval()
    return str(save_model(tmp_path / "gpt2", model, tiny_tokenizer()))


@pytest.fixture
def unbuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Redwood as it is installed where nothing was compiled."""
    monkeypatch.setitem(sys.modules, "redwood._native", None)
    monkeypatch.delattr(redwood, "_native", raising=False)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def logits_of(backend: Any) -> torch.Tensor:
    row = backend.open()
    (logits,) = backend.extend([Nodes(row, PROMPT)])
    backend.commit([AcceptedPath(row, range(len(PROMPT)))])
    return logits


# --- which backend -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "native"),
        ({"backend": "native"}, "native"),
        ({"device": "cpu", "kv": "f32", "threads": 1}, "native"),
        ({"backend": "eager"}, "eager"),
        ({"dtype": "bfloat16"}, "eager"),
        ({"dtype": torch.float32}, "eager"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="device auto is CUDA here")
def test_a_cpu_without_a_dtype_means_native(
    target: str, caplog: pytest.LogCaptureFixture, options: dict[str, Any], name: str
) -> None:
    folder, backend = open_model(target, **options)
    assert (folder, backend.name) == (Path(target), name)
    assert warnings(caplog) == []


def test_both_backends_compute_the_same_model(target: str) -> None:
    native = logits_of(open_model(target, device="cpu", kv="f32")[1])
    eager = logits_of(open_model(target, device="cpu", backend="eager")[1])
    torch.testing.assert_close(native, eager, atol=1e-4, rtol=1e-4)


def test_auto_leaves_what_native_cannot_compute_to_eager_and_says_why(
    gpt2: str, caplog: pytest.LogCaptureFixture
) -> None:
    _, backend = open_model(gpt2, device="cpu")
    assert backend.name == "eager"
    (said,) = warnings(caplog)
    assert "model type 'gpt2' is not supported" in said and "the eager backend runs it" in said
    assert "\n" not in said


@pytest.mark.parametrize("options", [{"backend": "native"}, {"kv": "f16"}, {"weights": "int8"}])
def test_native_that_was_asked_for_is_not_replaced(gpt2: str, options: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match="'gpt2' is not supported"):
        open_model(gpt2, device="cpu", **options)


@pytest.mark.usefixtures("unbuilt")
def test_without_the_extension_auto_is_eager_with_one_warning(
    target: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert open_model(target, device="cpu")[1].name == "eager"
    (said,) = warnings(caplog)
    assert "the native backend was not built" in said and "\n" not in said


@pytest.mark.usefixtures("unbuilt")
@pytest.mark.parametrize("options", [{"backend": "native"}, {"threads": 2}])
def test_without_the_extension_native_says_how_to_get_it(
    target: str, options: dict[str, Any]
) -> None:
    with pytest.raises(UnsupportedError, match="install a C\\+\\+17 compiler"):
        open_model(target, device="cpu", **options)
    args = ["--backend", "native", "--device", "cpu"]
    assert "was not built" in Ran("generate", "-t", target, "Tom", *args).error()


# --- wrong options -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"backend": "magic"}, "backend 'magic' must be one of auto, native, eager"),
        ({"backend": "native", "dtype": "float32"}, "does not take dtype float32"),
        ({"backend": "native", "dtype": torch.float32}, "does not take dtype torch.float32"),
        ({"backend": "eager", "weights": "int8"}, "weights: only the native backend"),
        ({"backend": "eager", "kv": "f16", "threads": 1}, "kv, threads: only the native"),
        ({"dtype": "float32", "cpus": []}, "cpus: only the native backend"),
        ({"weights": "int3"}, "weights 'int3' must be one of auto, int4"),
        ({"weights": ["int4"]}, "weights"),
        ({"kv": "int8"}, "kv 'int8' must be one of auto, f16, f32"),
        ({"threads": 0}, "threads 0 must be at least 1"),
        ({"threads": 65}, "threads 65 must be at most 64"),
        ({"threads": True}, "threads True"),
        ({"cpus": [100_000]}, "not 100000"),
        ({"cpus": [-1]}, "cpus -1"),
        ({"cpus": ["0"]}, "cpus '0'"),
        ({"cpus": 0}, "cpus 0 must be a list"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_fetched(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], said: str
) -> None:
    for reader in ("locate", "resolve"):
        monkeypatch.setattr(loading, reader, None)
    for function in (open_model, fetch_for):
        with pytest.raises(ArgumentError) as caught:
            function("tiny", **{"device": "cpu", **options})
        assert said in str(caught.value)


@pytest.mark.parametrize("capacity", [1, 0, -3, 257, 3.5, True])
@pytest.mark.parametrize("backend", ["native", "eager"])
def test_capacities_that_cannot_be_are_refused(target: str, backend: str, capacity: Any) -> None:
    with pytest.raises(CapacityError, match=f"capacity {capacity} must be"):
        open_model(target, device="cpu", backend=backend, capacity=capacity)


@pytest.mark.parametrize("weights", ["auto", "int4", "int8", "bf16", "f32"])
def test_weights_are_held_as_asked(target: str, weights: str) -> None:
    exact = logits_of(open_model(target, device="cpu", weights="f32", kv="f32")[1])
    logits = logits_of(open_model(target, device="cpu", weights=weights, kv="f32")[1])
    off = float((logits - exact).abs().max() / exact.std())
    assert off == 0 if weights in ("auto", "f32") else 0 < off < 1.5


# --- what is read --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "dtypes"),
    [({}, ["none"]), ({"backend": "eager"}, ["bfloat16"]), ({"dtype": "float32"}, ["bfloat16"])],
)
def test_only_what_the_backend_reads_is_made(
    world: FakeWorld, options: dict[str, Any], dtypes: list[str]
) -> None:
    fetch_for("tiny", device="cpu", **options)
    assert [dtype for _, dtype in world.conversions] == dtypes


@pytest.mark.usefixtures("unbuilt")
def test_without_the_extension_the_model_is_fetched_for_eager(world: FakeWorld) -> None:
    with pytest.raises(UnsupportedError, match="was not built"):
        fetch_for("tiny", device="cpu", backend="native")
    assert world.downloads == []
    fetch_for("tiny", device="cpu")
    assert [dtype for _, dtype in world.conversions] == ["bfloat16"]


def test_a_damaged_gguf_is_an_error_on_either_backend(world: FakeWorld, tmp_path: Path) -> None:
    (tmp_path / "mine.gguf").write_bytes(b"not a GGUF")
    with pytest.raises(ModelError, match="mine.gguf"):
        open_model(str(tmp_path / "mine.gguf"), device="cpu")


@pytest.mark.usefixtures("forked_conversions")
def test_a_gguf_is_the_same_model_native_and_converted(tmp_path: Path) -> None:
    write_small_gguf(tmp_path / "small.gguf")
    name = str(tmp_path / "small.gguf")
    folder, native = open_model(name, device="cpu", kv="f32")
    assert native.name == "native" and not list(folder.glob("*.safetensors"))
    converted, eager = open_model(name, device="cpu", backend="eager")
    assert list(converted.glob("*.safetensors")) and native.capacity == eager.capacity == 64
    torch.testing.assert_close(logits_of(native), logits_of(eager), atol=1e-3, rtol=1e-3)
    for made in ("tokenizer.json", "generation_config.json"):
        assert (folder / made).read_bytes() == (converted / made).read_bytes()
    (record,) = [known for known in redwood.models.installed() if known.source == name]
    assert record.state == "ready" and record.path == converted
    redwood.models.verify(record.name)


# --- the packed file -----------------------------------------------------------------------------


def packed_folders(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "packed").glob("*"))


def test_large_weights_are_packed_once_and_small_ones_never(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from redwood.backends.native import load as native_load

    small = logits_of(open_model(target, device="cpu")[1])
    assert packed_folders(tmp_path) == []
    monkeypatch.setattr(native_load, "_IN_MEMORY", 0)
    made = logits_of(open_model(target, device="cpu")[1])
    (folder,) = packed_folders(tmp_path)
    monkeypatch.setattr(native_load.packed_files, "pack", None)
    mapped = logits_of(open_model(target, device="cpu")[1])
    assert torch.equal(small, made) and torch.equal(made, mapped)
    record = redwood.models.installed()[-1]
    assert (record.name, record.source) == (folder.name, target)


def test_a_relative_folder_is_listed_by_its_full_path(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from redwood.backends.native import load as native_load

    monkeypatch.setattr(native_load, "_IN_MEMORY", 0)
    monkeypatch.chdir(Path(target).parent)
    open_model(Path(target).name, device="cpu")
    assert redwood.models.installed()[-1].source == str(Path(target).resolve())


# --- the command line ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "Tom"],
        ["chat"],
        ["demo"],
        ["bench", "forward"],
        ["bench", "prompts", "--prompts", "p.jsonl"],
    ],
    ids=" ".join,
)
def test_every_command_hands_the_native_options_on(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").write_text('{"prompt": "Tom"}')
    given: dict[str, Any] = {}

    def refuse(folder: Path, gguf: Path | None, **options: Any) -> NativeBackend:
        given.update(options)
        raise ModelError("seen")

    monkeypatch.setattr(loading, "load_native", refuse)
    cpu = min(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    options = ["--weights", "int8", "--kv", "f32", "--threads", "2", "--cpus", f"{cpu},{cpu}"]
    assert Ran(*command, "-t", target, "--device", "cpu", *options).error() == "error: seen\n"
    assert {name: given[name] for name in ("weights", "kv", "threads", "cpus")} == {
        "weights": "int8",
        "kv": "f32",
        "threads": 2,
        "cpus": [cpu, cpu],
    }
