"""A table's file that is wrong, or whose writer was interrupted: one clear line, or the old one."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from redwood.algorithms.source_rates import LearnedRates
from redwood.algorithms.successors import AnyTable, SuccessorTable, successor_table
from redwood.errors import TableError
from redwood.table import KeptTable, TargetId, check_file, read_info, read_table, write_table
from redwood.table.file import clear_table
from redwood.table.keeping import keep_saving

TARGET = TargetId("tiny", "w", "t", 300)


def filled(seed: int = 0, size: int = 50, python: bool = False) -> AnyTable:
    """A table that has seen some rows."""
    table = SuccessorTable(1 << 19) if python else successor_table(1 << 19)
    learn(table, seed, size)
    return table


def learn(table: AnyTable, seed: int = 0, size: int = 50) -> None:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 300, size).tolist()
    ids = np.array([rng.permutation(300)[:4] for _ in tokens], np.int32)
    probs = np.tile(np.array([0.5, 0.2, 0.1, 0.05], np.float32), (size, 1))
    table.learn([1, 2, 3], tokens, list(range(-1, size - 1)), ids, probs)


def saved(path: Path, table: AnyTable | None = None, target: TargetId = TARGET) -> bytes:
    table = filled() if table is None else table
    rates = LearnedRates()
    rates.rates.count(3, True)
    write_table(path, target, table.entries(), table.rows, rates.to_dict(), {"a": 7})
    return path.read_bytes()


@pytest.mark.parametrize("python", [False, True])
def test_a_table_comes_back_as_it_was(tmp_path: Path, python: bool) -> None:
    table = filled(python=python)
    saved(tmp_path / "t", table)
    info, entries = read_table(tmp_path / "t", TARGET)
    assert np.array_equal(entries, table.entries())
    assert (info.rows, info.filled, info.target) == (table.rows, {"a": 7}, TARGET)
    assert check_file(tmp_path / "t") == info == read_info(tmp_path / "t")
    again, rates = successor_table(1 << 19), LearnedRates()
    kept = KeptTable(tmp_path / "t", TARGET, again, rates)
    assert again.rows == table.rows and np.array_equal(again.entries(), table.entries())
    assert rates.to_dict() == info.rates != {}
    assert not kept.save()  # nothing new
    learn(again, seed=1)
    kept.close()
    assert read_info(tmp_path / "t").rows == table.rows + 50
    assert os.stat(tmp_path / "t").st_mode & 0o077 == 0


def test_every_bit_counts(tmp_path: Path) -> None:
    whole = saved(tmp_path / "t", filled(size=6))
    for place in range(0, len(whole), 5):
        broken = bytearray(whole)
        broken[place] ^= 1 << place % 8
        (tmp_path / "t").write_bytes(broken)
        with pytest.raises(TableError, match="damaged|no table|format"):
            read_table(tmp_path / "t", None)
    for size in [*range(0, len(whole), 97), len(whole) - 1]:
        (tmp_path / "t").write_bytes(whole[:size])
        with pytest.raises(TableError, match="damaged|no table"):
            read_table(tmp_path / "t", TARGET)
    (tmp_path / "t").write_bytes(whole + b"\0")
    with pytest.raises(TableError, match="damaged"):
        read_table(tmp_path / "t", TARGET)


def _with_header(whole: bytes, **changes: Any) -> bytes:
    """The file with another header, and a digest that fits."""
    import hashlib

    size = struct.unpack_from("<I", whole, 12)[0]
    header = json.loads(whole[16 : 16 + size])
    begin = 16 + size + -(16 + size) % 64
    made = json.dumps({**header, **changes}).encode()
    start = whole[:12] + struct.pack("<I", len(made)) + made
    body = start + bytes(-len(start) % 64) + whole[begin:-32]
    return body + hashlib.sha256(body).digest()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"entries": 1}, "bytes instead of"),
        ({"entries": -1}, "bytes instead of"),
        ({"rows": "x"}, "damaged"),
        ({"more": 1}, "no field"),
        ({"rates": {"cells": [1], "hits": [2.0], "trials": [1.0]}}, "counts that cannot be"),
        ({"target": {"name": "", "weights": "w", "tokenizer": "t", "vocab_size": 2}}, "tokens"),
    ],
)
def test_a_header_that_cannot_be(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    whole = saved(tmp_path / "t")
    (tmp_path / "t").write_bytes(_with_header(whole, **changes))
    with pytest.raises(TableError, match=match):
        check_file(tmp_path / "t")


def test_entries_that_no_table_can_hold(tmp_path: Path) -> None:
    entries = filled().entries().copy()
    entries[0, 40:44] = np.array([np.nan], np.float32).view(np.uint8)
    write_table(tmp_path / "t", TARGET, entries, 5)
    with pytest.raises(TableError, match="damaged: it has an entry"):
        check_file(tmp_path / "t")
    table = successor_table(1 << 19)
    with pytest.raises(TableError, match="an entry that no table can hold"):
        KeptTable(tmp_path / "t", TARGET, table)
    assert len(table) == 0


@pytest.mark.parametrize(
    ("other", "match"),
    [
        (replace(TARGET, weights="v"), "another model, tiny .other weights"),
        (replace(TARGET, tokenizer="u"), "another tokenizer"),
        (replace(TARGET, vocab_size=301), "another model"),
    ],
)
def test_a_table_of_another_model(tmp_path: Path, other: TargetId, match: str) -> None:
    before, table = saved(tmp_path / "t"), successor_table(1 << 19)
    with pytest.raises(TableError, match=match):
        KeptTable(tmp_path / "t", other, table)
    assert len(table) == 0 and (tmp_path / "t").read_bytes() == before
    KeptTable(tmp_path / "t", replace(TARGET, name="moved"), table).close()
    assert len(table) > 0


def test_a_newer_version_and_what_is_no_table(tmp_path: Path) -> None:
    whole = saved(tmp_path / "t")
    (tmp_path / "t").write_bytes(whole[:8] + struct.pack("<I", 2) + whole[12:])
    with pytest.raises(TableError, match="has format 2, and this Redwood reads 1"):
        read_info(tmp_path / "t")
    with pytest.raises(TableError, match="does not exist"):
        read_info(tmp_path / "none")
    for path, match in ((tmp_path, "is a folder"), (tmp_path / "no" / "t", "does not exist")):
        with pytest.raises(TableError, match=match):
            KeptTable(path, TARGET, successor_table(1 << 19))


@pytest.mark.parametrize("call", ["fsync", "open"])
def test_a_full_disk_leaves_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = saved(tmp_path / "t")
    table = successor_table(1 << 19)
    kept = KeptTable(tmp_path / "t", TARGET, table)
    learn(table, seed=3)

    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(TableError, match=r"disk of .* is full .*as before"):
            kept.save()
        end = keep_saving(lambda: [kept], 0.01)
        time.sleep(0.2)
        end()
    said = [r for r in caplog.records if "is full" in r.getMessage()]
    assert len(said) == 1  # many failures of one kind are one line
    assert (tmp_path / "t").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [".t.lock", "t"]
    kept.close()
    assert read_info(tmp_path / "t").rows == table.rows


_WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_table_file import TARGET, learn
from redwood.algorithms.successors import successor_table
from redwood.table import KeptTable
table = successor_table(1 << 22)
kept = KeptTable(sys.argv[1], TARGET, table)
print(table.rows, flush=True)
for seed in range(10_000):
    learn(table, seed, 500)
    kept.save()
    print(table.rows, flush=True)
"""


def _writer(path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(path), str(Path(__file__).parent)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_kill_9_while_saving_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    path, rng = tmp_path / "t", np.random.default_rng(0)
    seen = 0
    for _ in range(4):
        with _writer(path) as writer:
            assert writer.stdout is not None
            lines = [writer.stdout.readline() for _ in range(int(rng.integers(2, 5)))]
            time.sleep(float(rng.uniform(0.0, 0.01)))
            writer.send_signal(signal.SIGKILL)
            lines += writer.stdout.readlines()
        reported = [int(line) for line in lines if line.endswith("\n")]
        rows = check_file(path).rows
        assert reported[0] == seen  # the next one began with what was there
        assert rows in (reported[-1], reported[-1] + 500)
        seen = rows
    KeptTable(path, TARGET, successor_table(1 << 22)).save({})
    assert sorted(p.name for p in tmp_path.iterdir()) == [".t.lock", "t"]  # no rests


def test_the_second_process_reads_and_does_not_write(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "t"
    with _writer(path) as writer:
        assert writer.stdout is not None
        for _ in range(3):
            writer.stdout.readline()
        table = successor_table(1 << 22)
        kept = KeptTable(path, TARGET, table)
        assert table.rows >= 500 and not kept.writable
        learn(table)
        assert not kept.save()
        kept.close()
        with pytest.raises(TableError, match="another process keeps"):
            clear_table(path)
        writer.send_signal(signal.SIGKILL)
    said = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert len(said) == 1 and "is read and not written: another process" in said[0].getMessage()
    assert check_file(path).rows % 500 == 0
    assert clear_table(path) > 0 and read_info(path).entries == 0
    assert read_info(path).target == TARGET


def test_a_smaller_bound_keeps_the_newest(tmp_path: Path) -> None:
    large = successor_table(1 << 22)
    for seed in range(20):
        learn(large, seed, 1000)
    saved(tmp_path / "t", large)
    small = successor_table(1 << 19)
    KeptTable(tmp_path / "t", TARGET, small).close()
    assert small.nbytes == 1 << 19 and small.rows == large.rows
    assert 0 < len(small) < len(large)
    newest = large.entries()[-1].tobytes()
    assert newest in {entry.tobytes() for entry in small.entries()}


def test_closing_does_not_wait_for_a_step_that_never_ends(tmp_path: Path) -> None:
    table, put_off = successor_table(1 << 19), list[Any]()
    kept = KeptTable(tmp_path / "t", TARGET, table, when_free=put_off.append)
    learn(table)
    end = keep_saving(lambda: [kept], 0.01)
    while not put_off:
        time.sleep(0.01)
    begin = time.monotonic()
    kept.close(0.05)
    end()
    assert time.monotonic() - begin < 5.0
    assert read_info(tmp_path / "t").rows == table.rows
    put_off[0]()  # the step ends after all


def test_a_table_is_copied_when_the_step_ends(tmp_path: Path) -> None:
    table, put_off = successor_table(1 << 19), list[Any]()
    kept = KeptTable(tmp_path / "t", TARGET, table, when_free=put_off.append)
    learn(table)
    end = keep_saving(lambda: [kept], 0.01)
    while not put_off:
        time.sleep(0.01)
    assert not (tmp_path / "t").exists()
    put_off[0]()
    while not (tmp_path / "t").exists():
        time.sleep(0.01)
    kept.close()
    end()
    assert check_file(tmp_path / "t").rows == table.rows
