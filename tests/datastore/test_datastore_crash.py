"""Whatever interrupts a writer, readers find the old state or the new one."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from datastore_kit import TOKENIZER, documents_in, files_in, store_of
from redwood.datastore import Datastore, add, chunk, create
from redwood.datastore.store import MANIFEST
from redwood.errors import DatastoreError

TEXTS = [[i, i + 1, i + 2, 7] for i in range(20)]
MORE = [[100 + i] * 5 for i in range(30)]


def _intact(path: Path) -> list[list[int]]:
    """The documents of a store that must be whole."""
    store = Datastore.open(path)
    store.verify()
    return documents_in(store)


_WRITER = """
import sys
from redwood.datastore import add
number = int(sys.argv[2])
print("ready", flush=True)
while True:
    add(sys.argv[1], [[number, number], [number]])
    print(number, flush=True)
    number += 1
"""


def test_a_killed_writer_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    """Kill -9 at random moments: what was reported is there, and nothing in parts."""
    rng, path = random.Random(0), tmp_path / "s"
    create(path, TOKENIZER, chunk_tokens=64)
    begin = 0
    for _ in range(12):
        with subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(path), str(begin)],
            stdout=subprocess.PIPE,
            text=True,
        ) as writer:
            assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
            lines = [writer.stdout.readline() for _ in range(rng.randrange(4))]
            time.sleep(rng.uniform(0.0, 0.02))
            writer.send_signal(signal.SIGKILL)
            lines += writer.stdout.readlines()
        reported = [int(line) for line in lines if line.endswith("\n")]
        documents = _intact(path)
        count = len(documents) // 2
        assert documents == [d for i in range(count) for d in ([i, i], [i])]
        assert count >= (reported[-1] + 1 if reported else begin)
        begin = count
    assert begin > 12  # the writers did write
    add(path, [[1]])  # the next writer tidies up
    used = {entry.file for entry in Datastore.open(path).manifest.chunks}
    assert set(files_in(path)) == used | {MANIFEST}


class _Killed(BaseException):
    """As good as kill -9: nothing after it runs, clean-up included."""


def _die_at(step: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Lets the process 'die' before its step-th change of the disk: later ones do nothing."""
    calls = list[int]()

    def guard(function: Any) -> Any:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) > step:
                raise _Killed
            return function(*args, **kwargs)

        return guarded

    for name in ("fsync", "replace", "rename", "unlink", "remove"):
        monkeypatch.setattr(os, name, guard(getattr(os, name)))
    monkeypatch.setattr(Path, "replace", guard(Path.replace))
    monkeypatch.setattr(Path, "unlink", guard(Path.unlink))
    return lambda: len(calls)


@pytest.mark.parametrize("creating", [True, False])
def test_death_before_any_step_leaves_the_old_or_the_new(tmp_path: Path, creating: bool) -> None:
    seen = set()
    for step in range(60):
        path = tmp_path / str(step)
        if not creating:
            store_of(path, TEXTS, chunk_tokens=32)
        else:
            path.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            steps = _die_at(step, patch)
            try:
                if creating:
                    store_of(path, MORE, chunk_tokens=32)
                else:
                    add(path, MORE)
            except _Killed:
                pass
            done = steps() <= step
        if creating and not (path / MANIFEST).exists():
            seen.add("nothing")
            assert documents_in(store_of(path, TEXTS)) == TEXTS  # and can be made again
            continue
        documents = _intact(path)
        assert documents in ([MORE] if creating else [TEXTS, TEXTS + MORE])
        seen.add("new" if documents != TEXTS else "old")
        before = len(documents)
        add(path, [[5]])
        assert len(_intact(path)) == before + 1
        if done:
            break
    assert done and seen == {"nothing" if creating else "old", "new"}


def _failing_write(after: int) -> Any:
    """`Path.open` whose files are on a disk that is full after so many bytes."""
    left = [after]
    plain_open = Path.open

    def opened(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = plain_open(self, mode, *args, **kwargs)
        if "w" in mode:
            write = file.write

            def full(data: Any) -> Any:
                left[0] -= len(data)
                if left[0] < 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return write(data)

            class Full:
                def __getattr__(self, name: str) -> Any:
                    return full if name == "write" else getattr(file, name)

                def __enter__(self) -> Any:
                    return self

                def __exit__(self, *exc: object) -> None:
                    file.close()

            return Full()
        return file

    return opened


def test_a_full_disk_leaves_the_old_and_no_rests(tmp_path: Path) -> None:
    path = tmp_path / "s"
    store_of(path, TEXTS, chunk_tokens=64)
    before = files_in(path)
    for after in range(0, 1500, 50):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "open", _failing_write(after))
            with pytest.raises(DatastoreError, match=r"disk of .* is full \(a chunk needs up to"):
                add(path, MORE)
        assert files_in(path) == before
        assert _intact(path) == TEXTS
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", _failing_write(100))
        with pytest.raises(DatastoreError, match="is full"):
            store_of(tmp_path / "t", TEXTS)
    assert not (tmp_path / "t").exists()


def _add_with_small_files(path: Path, limit: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        add(path, [[i % 60_000 for i in range(50_000)]])
    except DatastoreError as error:
        assert "is full" in str(error)
        os._exit(3)
    os._exit(0)


@pytest.mark.parametrize("limit", [100, 5_000, 200_000])
def test_the_systems_own_refusal_to_write_is_a_full_disk(tmp_path: Path, limit: int) -> None:
    path = tmp_path / "s"
    store_of(path, TEXTS)
    before = files_in(path)
    child = multiprocessing.get_context("spawn").Process(
        target=_add_with_small_files, args=(path, limit)
    )
    child.start()
    child.join()
    assert child.exitcode == 3
    assert (files_in(path), _intact(path)) == (before, TEXTS)


def test_a_manifest_that_cannot_be_written_leaves_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from redwood.datastore import build

    path = tmp_path / "s"
    store_of(path, TEXTS)
    before = files_in(path)

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(build, "write_manifest", full)
    with pytest.raises(DatastoreError, match="the datastore is as before"):
        add(path, MORE)
    assert (files_in(path), _intact(path)) == (before, TEXTS)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "I/O error")])
def test_an_interruption_after_the_last_step_leaves_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """The manifest has been replaced, and names chunks that must not be tidied away."""
    from redwood import _storage

    path = tmp_path / "s"
    store_of(path, TEXTS)

    def fail(*args: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(_storage, "sync_folder", fail)
        with pytest.raises((KeyboardInterrupt, DatastoreError)):
            add(path, MORE)
    assert _intact(path) == TEXTS + MORE
    with monkeypatch.context() as patch:
        patch.setattr(_storage, "sync_folder", fail)
        with pytest.raises((KeyboardInterrupt, DatastoreError)):
            store_of(tmp_path / "t", TEXTS)
    assert not (tmp_path / "t").exists()


def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s"
    store_of(path, TEXTS)

    def refuse(*args: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(chunk.os, "fsync", refuse)
    with pytest.raises(DatastoreError, match="cannot write to .*Permission denied"):
        add(path, MORE)
    assert _intact(path) == TEXTS


def _write_some(path: Path, number: int) -> None:
    for i in range(10):
        add(path, [[number, i]])


def test_writers_wait_for_each_other_and_readers_for_nobody(tmp_path: Path) -> None:
    path = tmp_path / "s"
    create(path, TOKENIZER, chunk_tokens=32)
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_some, args=(path, n)) for n in range(4)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        documents = documents_in(Datastore.open(path))
        for n in range(4):  # every writer's documents in order, without a gap
            mine = [i for number, i in documents if number == n]
            assert mine == list(range(len(mine)))
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert len(_intact(path)) == 40
