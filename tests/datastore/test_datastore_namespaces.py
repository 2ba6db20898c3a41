"""Answers of one user never become drafts for another, unless a group was named."""

from __future__ import annotations

import logging
import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from datastore_kit import TOKENIZER, Words, documents_in
from redwood.datastore import Namespaces, namespaces
from redwood.datastore.store import MANIFEST
from redwood.errors import ArgumentError, DatastoreError, UnsupportedError


def _documents(kept: Namespaces, name: str) -> list[list[int]]:
    return [document for store in kept.stores(name) for document in documents_in(store)]


def test_every_namespace_sees_its_own_answers_and_no_others(tmp_path: Path) -> None:
    with Namespaces(tmp_path / "n", TOKENIZER) as kept:
        kept.append("key-a", [[1, 2, 3], [], [4]])
        kept.append("key-b", [[7, 8]])
        assert kept.stores("key-a") == [], "nothing is written before a flush"
        assert kept.flush() == 3
        assert _documents(kept, "key-a") == [[1, 2, 3], [4]]
        assert _documents(kept, "key-b") == [[7, 8]]
        assert kept.stores("key-c") == []
        kept.append("key-a", [[5]])
    again = Namespaces(tmp_path / "n", TOKENIZER)
    assert _documents(again, "key-a") == [[1, 2, 3], [4], [5]], "closing flushes"


def test_groups_share_only_when_they_are_named(tmp_path: Path) -> None:
    kept = Namespaces(tmp_path, TOKENIZER, shared={"a": "team", "b": "team"})
    kept.append("a", [[1]])
    kept.append("team", [[2]])  # a user whose key is the name of a group is no member
    kept.append("c", [[3]])
    kept.flush()
    assert _documents(kept, "a") == _documents(kept, "b") == [[1]]
    assert _documents(kept, "team") == [[2]]
    assert _documents(kept, "c") == [[3]]


@pytest.mark.parametrize(
    "name", ["../../outside", "/etc/x", "a/b", "sk-secret", "\udc80", "." * 300]
)
def test_names_are_no_paths_and_do_not_show(tmp_path: Path, name: str) -> None:
    kept = Namespaces(tmp_path / "n", TOKENIZER)
    kept.append(name, [[1]])
    kept.flush()
    assert _documents(kept, name) == [[1]]
    shown = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")]
    assert all(path.startswith("n") and "secret" not in path for path in shown)
    text = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"sk-secret" not in text


@pytest.mark.parametrize("name", ["", None, 5])
def test_answers_of_nobody_are_not_kept(tmp_path: Path, name: Any) -> None:
    kept = Namespaces(tmp_path, TOKENIZER)
    with pytest.raises(ArgumentError, match="must have a name"):
        kept.append(name, [[1]])
    with pytest.raises(ArgumentError, match="must have a name"):
        kept.stores(name)


@pytest.mark.skipif(os.name == "nt", reason="no modes there")
def test_the_folder_is_the_owners_alone(tmp_path: Path) -> None:
    kept = Namespaces(tmp_path / "n", TOKENIZER)
    kept.append("a", [[1]])
    kept.flush()
    (folder,) = (tmp_path / "n").iterdir()
    assert folder.stat().st_mode & 0o077 == 0


def test_disk_and_memory_are_bounded(tmp_path: Path) -> None:
    kept = Namespaces(tmp_path, TOKENIZER, most_tokens=160, most_queued=50)
    for i in range(300):
        kept.append("a", [[i, i, i, i]])
        if i % 10 == 9:
            kept.flush()
    (store,) = kept.stores("a")
    assert sum(map(len, store.chunks)) <= 160
    assert documents_in(store)[-1] == [299] * 4
    assert kept.num_dropped == 0
    for i in range(20):
        kept.append("a", [[i, i, i, i]])
    assert kept.num_dropped == 10
    assert kept.flush() == 10
    assert _documents(kept, "a")[-10:] == [[i] * 4 for i in range(10, 20)]


def test_a_snapshot_stays_while_the_namespace_grows(tmp_path: Path) -> None:
    kept = Namespaces(tmp_path, TOKENIZER)
    kept.append("a", [[1]])
    kept.flush()
    (before,) = kept.stores("a")
    kept.append("a", [[2]])
    kept.flush()
    assert documents_in(before) == [[1]]
    assert _documents(kept, "a") == [[1], [2]]


def test_models_do_not_meet(tmp_path: Path) -> None:
    first = Namespaces(tmp_path, Words("a", "b"))
    first.append("key", [[0, 1]])
    first.flush()
    assert Namespaces(tmp_path, Words("b", "a")).stores("key") == []
    assert _documents(Namespaces(tmp_path, Words("a", "b")), "key") == [[0, 1]]


def test_a_failed_write_is_logged_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept = Namespaces(tmp_path, TOKENIZER)
    kept.append("a", [[1]])
    kept.flush()

    def full(*args: object, **more: object) -> None:
        raise DatastoreError("the disk is full")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(namespaces, "add", full)
        kept.append("a", [[2]])
        assert kept.flush() == 0
    assert "the disk is full" in caplog.text
    kept.append("a", [[3]])
    assert kept.flush() == 2
    assert _documents(kept, "a") == [[1], [2], [3]]


def test_a_damaged_namespace_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = Namespaces(tmp_path, TOKENIZER)
    kept.append("a", [[1]])
    kept.flush()
    for file in tmp_path.rglob(MANIFEST):
        file.write_text("{}")
    fresh = Namespaces(tmp_path, TOKENIZER)
    assert fresh.stores("a") == [] and "are not used" in caplog.text
    fresh.append("a", [[2]])
    assert fresh.flush() == 0


def test_forgetting_removes_the_files(tmp_path: Path) -> None:
    kept = Namespaces(tmp_path, TOKENIZER)
    kept.append("a", [[1]])
    kept.append("b", [[1]])
    kept.flush()
    kept.append("a", [[2]])
    assert kept.forget("a") > 0 and kept.forget("a") == 0
    assert kept.flush() == 0 and kept.stores("a") == []
    assert _documents(kept, "b") == [[1]]


def test_the_thread_flushes_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = threading.Event()
    plain = Namespaces.flush

    def flush(self: Namespaces) -> int:
        count = plain(self)
        if count:
            flushed.set()
        return count

    monkeypatch.setattr(Namespaces, "flush", flush)
    with Namespaces(tmp_path, TOKENIZER) as kept:
        kept.append("a", [[1]])
        kept.start(interval_s=0.01)
        assert flushed.wait(30)
        with pytest.raises(ArgumentError, match="already"):
            kept.start()
        assert _documents(kept, "a") == [[1]]
    assert not any(t.name == "redwood-namespaces" for t in threading.enumerate())
    with pytest.raises(ArgumentError, match="interval_s"):
        Namespaces(tmp_path, TOKENIZER).start(0.0)


@pytest.mark.parametrize("wrong", [{"most_tokens": 127}, {"most_queued": 0}, {"most_tokens": True}])
def test_counts_out_of_range_are_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        Namespaces(tmp_path, TOKENIZER, **wrong)


def test_without_the_sorter_nothing_is_collected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pydivsufsort", None)
    with pytest.raises(UnsupportedError, match="pydivsufsort"):
        Namespaces(tmp_path, TOKENIZER)


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="descriptors do not show there")
@pytest.mark.parametrize("used", ["written", "read", "both"])
def test_datastores_of_many_users_keep_few_files_open(tmp_path: Path, used: str) -> None:
    kept = Namespaces(tmp_path, TOKENIZER, most_open=5)
    before, names = _descriptors(), [f"user {i}" for i in range(30)]
    for turn in range(2):
        for i, name in enumerate(names):
            kept.append(name, [[turn, i]])
            if used == "both":
                kept.stores(name)
        assert kept.flush() == len(names)
        if used != "written":
            assert all(_documents(kept, name) for name in names)
        assert _descriptors() <= before + 5
    assert [_documents(kept, name) for name in names] == [[[0, i], [1, i]] for i in range(30)]
    assert _descriptors() <= before + 5 and len(kept._open) <= 5


def test_the_datastores_used_last_stay_open_and_those_in_use_stay_readable(tmp_path: Path) -> None:
    kept = Namespaces(tmp_path, TOKENIZER, most_open=2)
    for name in "abc":
        kept.append(name, [[ord(name)]])
    kept.flush()
    (first,) = kept.stores("a")
    (second,) = kept.stores("b")
    assert kept.stores("a") == [first]
    kept.stores("c")  # b was used longest ago
    assert kept.stores("a") == [first]
    assert kept.stores("b") != [second]
    assert documents_in(second) == [[ord("b")]], "a request that has it keeps it"
    for i in range(10):
        assert kept.stores(f"nobody {i}") == []
    assert len(kept._open) <= 2


@pytest.mark.skipif(os.name == "nt", reason="no such limit there")
def test_few_files_are_kept_open_where_the_process_may_open_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import resource

    for limit, most in ((64, 8), (4, 1), (1024, 128), (10**6, 256), (resource.RLIM_INFINITY, 256)):
        monkeypatch.setattr(resource, "getrlimit", lambda kind, limit=limit: (limit, limit))
        assert Namespaces(tmp_path, TOKENIZER)._most_open == most
    with pytest.raises(ArgumentError, match="most_open"):
        Namespaces(tmp_path, TOKENIZER, most_open=0)


def test_an_error_of_the_system_while_writing_is_logged_and_what_waits_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept = Namespaces(tmp_path, TOKENIZER)
    kept.append("a", [[1]])
    with monkeypatch.context() as patched:
        patched.setattr(namespaces, "create", lambda *a, **k: os.open(tmp_path / "no", os.O_RDONLY))
        assert kept.flush() == 0
    assert "could not be kept" in caplog.text
    assert kept.flush() == 1 and _documents(kept, "a") == [[1]]
