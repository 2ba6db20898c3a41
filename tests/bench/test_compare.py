"""The parts of the comparison with other programs that need none of them."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from redwood.cli.bench import Task
from redwood.errors import ArgumentError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import peers.llama_server
    import peers.prompts
    import peers.summary

    yield peers
    for name in [name for name in sys.modules if name.partition(".")[0] == "peers"]:
        del sys.modules[name]


def turn(speed: float, token_ids: list[int], others: float = 0.0) -> dict[str, Any]:
    made = {"tokens_per_s": speed, "token_ids": token_ids, "others": others, "first_ms": 20.0}
    return made | {"decode_ms": 30.0, "whole_ms": 50.0, "per_pass": 1.5}


RUNS = {
    "Redwood none": [turn(10, [1, 2]), turn(20, [3, 4, 9]), turn(10, [5])],
    "Redwood ngram auto": [turn(40, [1, 2]), turn(60, [3, 4, 9]), turn(10, [5])],
    "openvino plain": [turn(8, [1, 2]), turn(10, [3, 4]), turn(10, [5])],
    "openvino lookup": [turn(16, [1, 7]), turn(30, [3, 4]), turn(90, [5], others=0.5)],
}


def test_the_nearest_peer_is_the_one_with_the_best_median(peers: ModuleType) -> None:
    found = peers.summary.summary(RUNS, [9], greedy=True, limit=0.1)
    assert (found["best"], found["nearest"]) == ("Redwood ngram auto", "openvino lookup")
    assert found["ratio"][0] == pytest.approx((40 / 16 + 60 / 30) / 2)


def test_a_prompt_that_was_disturbed_for_one_counts_for_nobody(peers: ModuleType) -> None:
    found = peers.summary.summary(RUNS, [9], greedy=True, limit=0.1)
    assert (found["timed"], found["prompts"]) == (2, 3)
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["Redwood none"]["tokens_per_s"] == pytest.approx((15, 12.5, 17.5))
    assert rows["openvino lookup"]["others"] == 0.5
    assert peers.summary.summary(RUNS, [9], greedy=True, limit=0.5)["timed"] == 3


def test_texts_are_compared_with_the_plain_ones_up_to_the_end_token(peers: ModuleType) -> None:
    rows = peers.summary.summary(RUNS, [9], greedy=True, limit=0.1)["rows"]
    same = {row["name"]: (row["same_as_own_plain"], row["same_as_redwood_plain"]) for row in rows}
    assert same["openvino plain"] == (3, 3)
    assert same["openvino lookup"] == (2, 2)
    sampled = peers.summary.summary(RUNS, [9], greedy=False, limit=0.1)["rows"]
    assert not any("same_as_own_plain" in row for row in sampled)


def test_a_group_without_its_plain_mode_has_no_ratio_to_it(peers: ModuleType) -> None:
    runs = {name: RUNS[name] for name in ("Redwood none", "openvino lookup")}
    row = peers.summary.summary(runs, [9], greedy=True, limit=0.1)["rows"][1]
    assert "to_own_plain" not in row and "same_as_own_plain" not in row
    assert row["same_as_redwood_plain"] == 2


def test_nothing_quiet_gives_no_rows(peers: ModuleType) -> None:
    found = peers.summary.summary(RUNS, [9], greedy=True, limit=-1.0)
    assert found == {"timed": 0, "prompts": 3, "rows": []}
    assert not peers.summary.enough(found)


def test_a_prompt_on_which_a_peer_failed_is_left_out_and_said(peers: ModuleType) -> None:
    failed = {"token_ids": [], "tokens_per_s": 0.0, "others": 0.0, "error": "RuntimeError"}
    runs = {**RUNS, "openvino draft": [turn(12, [1, 2]), failed, turn(11, [5])]}
    found = peers.summary.summary(runs, [9], greedy=True, limit=0.9)
    assert found["timed"] == 2
    said = peers.summary.verdict(found, {"Redwood": "", "openvino": ""})
    assert said.endswith("openvino draft failed 1 times.")


def test_half_of_the_prompts_must_be_quiet(peers: ModuleType) -> None:
    assert peers.summary.enough({"timed": 2, "prompts": 4})
    assert not peers.summary.enough({"timed": 2, "prompts": 5})
    run = {"target": "model", "set": "editing", "temperature": 0.0}
    line = peers.summary.line(run | {"result": {"timed": 1, "prompts": 3, "nearest": "x"}})
    assert "no result" in line


def test_the_tables_show_both_winners(peers: ModuleType) -> None:
    from rich.console import Console

    found = peers.summary.summary(RUNS, [9], greedy=True, limit=0.1)
    console = Console(width=160, file=io.StringIO())
    console.print(peers.summary.table("title", found))
    assert "Redwood ngram auto" in console.file.getvalue()  # type: ignore[attr-defined]
    said = peers.summary.verdict(found, {"Redwood": "x.gguf", "openvino": "int4"})
    assert "2.25" in said and "openvino lookup" in said and "x.gguf; int4" in said
    run = {"target": "model", "set": "editing", "temperature": 0.0, "result": found}
    line = peers.summary.line(run)
    assert line.startswith("| model | editing | 0.0 | 2 | Redwood ngram auto: 50.0 | openvino ")
    assert line.count("|") == peers.summary.HEADER.splitlines()[0].count("|")
    alone = peers.summary.summary({"Redwood none": RUNS["Redwood none"]}, [9], greedy=True, limit=1)
    assert peers.summary.line(run | {"result": alone}).count("|") == line.count("|")
    assert peers.summary.verdict(alone, {}) == "No peer took part."


def test_a_limit_takes_prompts_from_all_parts_of_the_file(peers: ModuleType) -> None:
    tasks = [Task(i, f"prompt {i}", None) for i in range(10)]
    chosen = peers.prompts.spread_out(tasks, 4)
    assert [task.line for task in chosen] == [0, 2, 5, 7]
    assert peers.prompts.spread_out(tasks, 20) == tasks == peers.prompts.spread_out(tasks, None)


def test_a_set_is_read_by_its_first_turns(peers: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "set.jsonl"
    entries = [{"turns": ["first", "second"], "category": "writing"}, {"prompt": "alone"}]
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    found = peers.prompts.read_prompts("specbench", file, None)
    assert [(task.prompt, task.category) for task in found] == [
        ("first", "writing"),
        ("alone", None),
    ]
    file.write_text("{}\n")
    with pytest.raises(ArgumentError, match="line 1"):
        peers.prompts.read_prompts("specbench", file, None)


def test_spec_bench_needs_its_file_and_editing_has_one(peers: ModuleType) -> None:
    with pytest.raises(SystemExit, match="specbench needs its file"):
        peers.prompts.prompt_file("specbench", None)
    assert len(peers.prompts.read_prompts("editing", None, 3)) == 3


def test_server_modes_are_joined_and_take_options(peers: ModuleType) -> None:
    command = peers.llama_server.command
    assert command("plain", ["server"], None, 2) == ["server"]
    made = command("ngram-cache+draft-simple --port 1", ["server"], Path("d.gguf"), 2)
    assert made[:3] == ["server", "--spec-type", "ngram-cache,draft-simple"]
    assert made[-8:] == ["-md", "d.gguf", "-td", "2", "-tbd", "2", "--port", "1"]
    with pytest.raises(SystemExit, match="draft-simple"):
        command("draft-simple", ["server"], None, 2)
