"""The limit of tokens of keys and values: system, cgroups, ulimit; which error clients get."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from redwood import Engine
from redwood.backends.base import Nodes
from redwood.backends.load import open_model
from redwood.server import kv_capacity
from redwood.server.kv_capacity import free_bytes, limit_kv_tokens, max_kv_tokens
from server_kit import Live

GIB = 2**30


def machine(root: Path, files: dict[str, Any]) -> Path:
    """Writes the system's own files."""
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    return root


def test_the_system_says_what_is_available(tmp_path: Path) -> None:
    assert free_bytes(tmp_path) is None
    machine(tmp_path, {"proc/meminfo": f"MemTotal: 99 kB\nMemAvailable: {3 * 2**20} kB"})
    assert free_bytes(tmp_path) == 3 * GIB


@pytest.mark.parametrize("group", ["0::/a/b", "0::/"])
def test_a_control_group_leaves_its_limit_less_what_is_no_file(tmp_path: Path, group: str) -> None:
    inner = Path("sys/fs/cgroup") / group[4:]
    machine(
        tmp_path,
        {
            "proc/meminfo": f"MemAvailable: {9 * 2**20} kB",
            "proc/self/cgroup": group,
            str(inner / "memory.max"): 4 * GIB,
            str(inner / "memory.current"): 3 * GIB,
            str(inner / "memory.stat"): f"anon {GIB}\nfile {2 * GIB}",
        },
    )
    assert free_bytes(tmp_path) == 3 * GIB


def test_an_outer_group_counts_and_one_without_a_limit_does_not(tmp_path: Path) -> None:
    machine(
        tmp_path,
        {
            "proc/self/cgroup": "0::/a/b",
            "sys/fs/cgroup/a/b/memory.max": "max",
            "sys/fs/cgroup/a/b/memory.current": 5,
            "sys/fs/cgroup/a/memory.max": 2 * GIB,
            "sys/fs/cgroup/a/memory.current": GIB,
        },
    )
    assert free_bytes(tmp_path) == GIB


def test_groups_of_the_first_kind_count(tmp_path: Path) -> None:
    folder = "sys/fs/cgroup/memory/docker/x/"
    machine(
        tmp_path,
        {
            "proc/self/cgroup": "9:cpu:/docker/x\n4:hugetlb,memory:/docker/x",
            f"{folder}memory.limit_in_bytes": 6 * GIB,
            f"{folder}memory.usage_in_bytes": 2 * GIB,
            f"{folder}memory.stat": f"total_cache {GIB}",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": 2**63 - 4096,
            "sys/fs/cgroup/memory/memory.usage_in_bytes": 0,
        },
    )
    assert free_bytes(tmp_path) == 5 * GIB


def fake(token_bytes: int | None, mapped: int = 0) -> Any:
    return SimpleNamespace(
        token_bytes=token_bytes, weight_bytes={"q": mapped}, device=torch.device("cpu")
    )


def test_mapped_weights_stay_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_capacity, "free_bytes", lambda: 3 * GIB)
    assert max_kv_tokens(fake(1024, GIB), None) == int(0.8 * 2 * GIB / 1024)
    assert max_kv_tokens(fake(1024, GIB), None, share=0.25) == int(0.2 * 2 * GIB / 1024)
    assert max_kv_tokens(fake(1024, 4 * GIB), None) == 1
    unknown: Any = SimpleNamespace(device=torch.device("cpu"))
    assert max_kv_tokens(unknown, None) is None


@pytest.mark.parametrize("kind", ["eager", "native"])
def test_the_memory_of_a_token_is_what_a_row_takes(tiny_model_folder: Path, kind: str) -> None:
    _, backend = open_model(str(tiny_model_folder), backend=kind)
    row = backend.open()
    backend.extend([Nodes(row, [5] * 64)])
    if kind == "native":
        assert backend.token_bytes * 64 == backend.cache_bytes  # type: ignore[attr-defined]
    else:
        held = backend._rows[row].layers.values()  # type: ignore[attr-defined]
        taken = sum(x.nbytes for pair in held for x in pair)
        slots = next(iter(held))[0].shape[1]
        backend.release(row)
        assert backend.token_bytes * slots == 2 * taken  # type: ignore[attr-defined]


def test_an_engine_is_bounded_by_what_is_free_and_no_further(
    tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bounded(free: int | None, given: int | None = None) -> int | None:
        monkeypatch.setattr(kv_capacity, "free_bytes", lambda: free)
        engine = Engine(tiny_engine.target, tokenizer=tiny_engine.tokenizer, max_rows=3)
        limit_kv_tokens(engine, given)
        return engine.kv_tokens

    size = tiny_engine.target.token_bytes  # type: ignore[attr-defined]
    assert bounded(100 * size) == 80
    assert bounded(100 * GIB) == 3 * 256
    assert bounded(None) is None
    assert bounded(100 * size, given=7) == 7 and bounded(100 * size, given=0) is None


def test_answers_keep_within_the_room_and_long_prompts_are_told_of_it(
    live: Callable[..., Live],
) -> None:
    server = live(kv_tokens=60)
    answer = server.chat(max_tokens=None, ignore_eos=True).json()
    assert answer["usage"]["total_tokens"] == 60  # though the context holds 256
    long = [{"role": "user", "content": "7" * 100}]
    error = server.error(server.chat(messages=long), 400)
    assert error["code"] == "context_length_exceeded" and "60 tokens" in error["message"]
    assert server.metric("redwood:kv_tokens_limit") == 60
    server.alive_and_right()
