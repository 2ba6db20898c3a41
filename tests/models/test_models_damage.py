"""Damaged entries of the cache; list and remove."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from models_kit import (
    GGUF,
    FakeWorld,
    assert_nothing_left,
    flip_bit,
    resolve,
)
from redwood import models
from redwood.errors import ModelError
from redwood.models import _cache

# --- damage ------------------------------------------------------------------------------------


def truncate(folder: Path) -> None:
    with (folder / "model.safetensors").open("rb+") as file:
        file.truncate(70)


def drop_file(folder: Path) -> None:
    (folder / "config.json").unlink()


def garble_manifest(folder: Path) -> None:
    (folder / "redwood.json").write_text("{")


def drop_manifest(folder: Path) -> None:
    (folder / "redwood.json").unlink()


def empty_manifest(folder: Path) -> None:
    (folder / "redwood.json").write_text("[]")


def age_manifest(folder: Path) -> None:
    fields = json.loads((folder / "redwood.json").read_text())
    (folder / "redwood.json").write_text(json.dumps({**fields, "format": 0}))


def point_manifest_outside(folder: Path) -> None:
    fields = json.loads((folder / "redwood.json").read_text())
    fields["files"]["../x"] = fields["files"]["config.json"]
    (folder / "redwood.json").write_text(json.dumps(fields))


def flip_weights(folder: Path) -> None:
    flip_bit(folder / "model.safetensors")


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        drop_file,
        garble_manifest,
        drop_manifest,
        empty_manifest,
        age_manifest,
        point_manifest_outside,
        flip_weights,
    ],
)
def test_a_damaged_entry_is_made_again_from_the_gguf(
    world: FakeWorld, capsys: pytest.CaptureFixture[str], damage: Any
) -> None:
    folder = resolve("tiny")
    before = (folder / "model.safetensors").read_bytes()
    damage(folder)
    assert {record.name: record.state for record in models.installed()}["tiny"] == "damaged"
    assert resolve("tiny") == folder
    assert (folder / "model.safetensors").read_bytes() == before
    assert len(world.conversions) == 2 and len(world.downloads) == 3
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].endswith("; making it again")
    models.verify("tiny")


def test_a_damaged_gguf_is_fetched_again_and_nothing_converted(world: FakeWorld) -> None:
    resolve("tiny")
    gguf = models.gguf_path("tiny")
    assert gguf is not None
    flip_bit(gguf)
    with pytest.raises(ModelError, match="models remove tiny` and then `redwood models fetch tiny"):
        models.gguf_path("tiny")
    resolve("tiny")
    assert models.gguf_path("tiny") == gguf and gguf.read_bytes() == GGUF
    assert len(world.conversions) == 1 and len(world.downloads) == 6


def test_a_missing_gguf_is_fetched_only_on_request(world: FakeWorld, cache: Path) -> None:
    resolve("tiny")
    shutil.rmtree(cache / "gguf" / "tiny")
    resolve("tiny")
    assert models.gguf_path("tiny") is None and len(world.downloads) == 3
    models.fetch("tiny", progress=False)
    assert models.gguf_path("tiny") is not None and len(world.downloads) == 6


def test_an_untouched_file_is_not_read_again_and_a_touched_one_once(
    world: FakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = resolve("tiny")
    read: list[str] = []
    original = _cache.sha256_of

    def sha256_of(path: Path) -> str:
        read.append(path.name)
        return original(path)

    monkeypatch.setattr(_cache, "sha256_of", sha256_of)
    resolve("tiny")
    assert read == []
    os.utime(folder / "model.safetensors", ns=(1, 1))
    resolve("tiny")
    resolve("tiny")
    assert read == ["model.safetensors"] and len(world.conversions) == 1


def test_verify_finds_a_flipped_bit_that_kept_size_and_time(world: FakeWorld, cache: Path) -> None:
    folder = resolve("tiny")
    flip_bit(folder / "model.safetensors", keep_time=True)
    resolve("tiny")  # the cheap check cannot see it
    with pytest.raises(ModelError, match=r"model.safetensors was changed.*models remove tiny"):
        models.verify("tiny")
    models.remove("tiny")
    resolve("tiny")
    flip_bit(cache / "gguf" / "tiny" / "tiny.gguf", keep_time=True)
    with pytest.raises(ModelError, match="tiny.gguf was changed"):
        models.verify("tiny")


def test_a_read_only_cache_can_be_used(world: FakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = resolve("tiny")
    os.utime(folder / "config.json", ns=(1, 1))

    def refuse(*arguments: Any) -> None:
        raise PermissionError(errno.EACCES, "read-only")

    monkeypatch.setattr(_cache, "write_manifest", refuse)
    assert resolve("tiny") == folder


# --- list and remove -----------------------------------------------------------------------------


def test_installed_lists_every_state(world: FakeWorld, cache: Path) -> None:
    def record() -> models.Installed:
        return next(record for record in models.installed() if record.name == "tiny")

    assert [known.name for known in models.installed()] == list(models.PACKAGED)
    assert (record().state, record().size_bytes) == ("absent", 0)
    resolve("tiny")
    assert record().state == "ready" and record().path == cache / "converted" / "tiny"
    assert record().size_bytes > len(GGUF)
    shutil.rmtree(cache / "converted" / "tiny")
    assert record().state == "downloaded"
    flip_bit(cache / "gguf" / "tiny" / "tiny.gguf")
    assert record().state == "damaged"


def test_remove_tells_the_bytes_freed(world: FakeWorld, cache: Path) -> None:
    assert models.remove("tiny") == 0
    resolve("tiny")
    size_bytes = next(known.size_bytes for known in models.installed() if known.name == "tiny")
    assert models.remove("tiny") == size_bytes
    assert_nothing_left(cache)
    with pytest.raises(ModelError, match="'tiny': it is not in the cache"):
        models.verify("tiny")


@pytest.mark.parametrize("name", ["../other", "tiny/..", "", "gguf-../../x", "/etc", "tini", "."])
def test_only_names_of_entries_can_be_removed_or_verified(
    world: FakeWorld, cache: Path, name: str
) -> None:
    resolve("tiny")
    with pytest.raises(ModelError, match="models list"):
        models.remove(name)
    with pytest.raises(ModelError, match="models list"):
        models.verify(name)
    assert (cache / "converted" / "tiny").is_dir()


def test_cache_dir_follows_the_environment(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert models.cache_dir() == cache
    monkeypatch.setenv("REDWOOD_CACHE", "~/elsewhere")
    assert models.cache_dir() == Path.home() / "elsewhere"
    monkeypatch.delenv("REDWOOD_CACHE")
    assert models.cache_dir().name == "redwood"
