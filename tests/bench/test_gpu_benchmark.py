"""The GPU benchmark, dry: every part of it on a CPU, on tiny random models. Speeds say nothing."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from redwood.sampling import SamplingParams

FOLDER = Path(__file__).parents[2] / "benchmarks" / "gpu"
DRY = ["--device", "cpu", "--tiny"]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The command's module; its neighbours are imported as a script would find them."""
    path, known = list(sys.path), set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("run")
    sys.path[:] = path
    for name in set(sys.modules) - known:
        if str(FOLDER.parent) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_the_dry_run_does_every_part(
    bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "out.json"
    bench.main([*DRY, "--json", str(file)])
    result = json.loads(file.read_text())
    assert result["setting"]["options"]["tiny"] is True and result["setting"]["gpu"] is None
    for part in bench.PARTS:
        assert {row["subject"] for row in result[part]} == {"small", "grown"}

    probes = [row for row in result["exact"] if "probe" in row]
    answers = [row for row in result["exact"] if "probe" not in row]
    assert len(probes) == 2 * 2 * 4 and all(row["passed"] for row in probes)
    assert len(answers) == 2 * 2 * 2 * 2
    assert all(row["differing_prompts"] == row["near_ties"] == 0 for row in answers)
    assert any(row["tokens_per_pass"] > 1.2 for row in answers)

    assert {(row["backend"], row["context"]) for row in result["curve"]} == {
        (backend, context) for backend in ("eager", "cuda_graph") for context in (16, 40)
    }
    ways = {(row["way"], row["budget"]) for row in result["table"]}
    assert len(ways) == 5 + 2 and len(result["table"]) == 2 * 2 * len(ways)
    assert all(row["tokens_per_s"] > 0 for row in result["table"])
    plain = [row for row in result["table"] if row["way"] == "plain, graphs"]
    assert all(row["over_plain_graphs"] == row["tokens_per_pass"] == 1.0 for row in plain)
    for row in result["plan"]:
        assert row["size"] == len(row["parents"]) and 0 < row["predicted_tokens_per_s"]

    shown = capsys.readouterr()
    assert "HF prompt lookup" in shown.out and "near ties" in shown.out and "NO" not in shown.out
    assert "grown plan" in shown.err


def _subject(bench: Any, name: str) -> Any:
    args = bench._parse(DRY)
    source = bench.open_source(args, torch.device("cpu"), torch.float32)
    return getattr(bench, name)(source, args)


def test_the_planned_tree_is_run_and_compared(bench: Any) -> None:
    subject = _subject(bench, "large")
    params = SamplingParams(max_tokens=12)
    row = bench.plan.plan(subject, {1: 1e4, 4: 1e4, 8: 1.1e4}, params, 8)
    assert row["size"] > 1 and row["levels"] > 1
    assert row["predicted_tokens_per_pass"] > 1.2 and row["measured_tokens_per_pass"] > 1.2
    assert row["acceptance"][0] > 0.2 and all(0 <= rate <= 1 for rate in row["acceptance"])


def test_acceptance_of_a_drafter_that_is_the_target_is_one(bench: Any) -> None:
    subject = _subject(bench, "small")
    subject.draft = subject.graphs.target
    rates, draft_ms = bench.plan.acceptance(subject, [-1, 0, 0, 1], SamplingParams(max_tokens=7))
    assert rates == [1.0, 0.0] and draft_ms > 0


def test_without_time_nothing_is_begun(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    bench.main([*DRY, "--minutes", "0", "--parts", "curve", "--subjects", "small"])
    assert "no time left for small: curve" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "cpu"], "add --tiny"),
        ([*DRY, "--parts", "exact,speed"], "'speed' is not one of exact, curve, table, plan"),
        ([*DRY, "--subjects", "huge"], "'huge' is not one of small, grown"),
    ],
)
def test_wrong_options_are_refused(
    bench: Any, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench.main(options)
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_cuda_it_says_so(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--quick"])
    assert "no CUDA device here; --device cpu --tiny" in capsys.readouterr().err
