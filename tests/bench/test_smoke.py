"""`make smoke`, on tiny random models: what it runs, what it says of a row, how it ends."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import redwood
from parallel_kit import fork_server
from redwood.backends.eager.stock import DTYPES
from redwood.backends.native.packed import WEIGHTS as NATIVE_WEIGHTS
from redwood.backends.offload.forms import WEIGHTS as OFFLOAD_WEIGHTS
from redwood.backends.parallel.ranks import PARALLEL

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def smoke(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The script as a module, whose rows are forked from a process that has imported torch."""
    fork_server()
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("smoke")
    del sys.modules["smoke"]


def crash(*_: Any) -> None:
    """Stands for a row whose process dies: an instruction that the processor does not have."""
    os.kill(os.getpid(), signal.SIGILL)


def test_every_pair_that_the_documents_offer_is_run(smoke: Any) -> None:
    usual, full = list(smoke.cases(full=False)), list(smoke.cases(full=True))
    assert len({smoke.label(case) for case in full}) == len(full) > len(usual)
    for rows in (usual, full):
        native = {case["weights"] for case in rows if case.get("backend") == "native"}
        assert native == set(NATIVE_WEIGHTS) - {"draft"}
        eager = {DTYPES[case["dtype"]] for case in rows if case.get("backend") == "eager"}
        assert eager == set(DTYPES.values())
        streamed = {(c["dtype"], c["weights"]) for c in rows if "offload" in c}
        assert streamed == {(dtype, w) for dtype in smoke.DTYPES for w in OFFLOAD_WEIGHTS}
        assert {case["parallel"] for case in rows if "parallel" in case} == set(PARALLEL)
    assert {case["target"] for case in full} > {case["target"] for case in usual}


@pytest.mark.parametrize(
    "options",
    [
        {"backend": "native", "weights": "f32"},
        {"backend": "eager", "dtype": "float32"},
        {"offload": "disk", "dtype": "float32", "weights": "int8"},
        {"parallel": "pipeline"},
    ],
)
def test_a_row_compares_texts_with_and_without_trees(
    smoke: Any, options: dict[str, Any], tiny_model_folder: Path
) -> None:
    found = smoke.row({"target": str(tiny_model_folder), "capacity": 200, **options})
    assert found["status"] == "ok", found
    assert found["drafted"] > 0 and found["per_pass"] >= 1 and found["seconds"] > 0
    assert " ok " in smoke.shown(found)


def test_a_row_that_is_refused_or_dies_says_why(
    smoke: Any, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = {"target": str(tiny_model_folder), "backend": "eager", "capacity": 200}
    found = smoke.row({**case, "dtype": "int3"})
    assert found["status"] == "refused" and "dtype 'int3' must be" in found["why"]
    found = smoke.row({**case, "odd": 1})
    assert found["status"] == "failed" and "unexpected keyword argument 'odd'" in found["why"]
    monkeypatch.setattr(smoke, "run", crash)
    found = smoke.row(case)
    assert found["status"] == "failed" and found["why"] == "killed by SIGILL"


@pytest.mark.parametrize("backend", ["native", "eager"])
def test_wrong_trees_are_different_and_no_tie(
    smoke: Any, backend: str, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = redwood.load(tiny_model_folder, "ngram", backend=backend, budget=6)
    assert smoke.look(engine)["status"] == "ok"
    extend = engine.target.extend

    def swapped(rows: Any) -> Any:
        # Logits of the last two nodes, the wrong way round.
        return [
            made.flip(0) if len(nodes.token_ids) > 1 and nodes.parents else made
            for nodes, made in zip(rows, extend(rows), strict=True)
        ]

    monkeypatch.setattr(engine.target, "extend", swapped)
    found = smoke.look(engine)
    assert found["status"] == "different" and "nats apart" in found["why"]


def test_nothing_drafted_is_no_success(smoke: Any, tiny_model_folder: Path) -> None:
    engine = redwood.load(tiny_model_folder, None, backend="native")
    found = smoke.look(engine)
    assert (found["status"], found["why"]) == ("different", "nothing was drafted")


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("tie", 0), ("refused", 1), ("failed", 1)])
def test_it_ends_with_1_when_a_row_fails_and_writes_them_all(
    smoke: Any,
    status: str,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def row(case: Any) -> dict[str, Any]:
        return {"case": case, "seconds": 1.0, "why": "", "status": status}

    monkeypatch.setattr(smoke, "row", row)
    monkeypatch.setattr(smoke.forkserver, "ensure_running", lambda: None)
    file = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["smoke", "--only", "eager", "--json", str(file)])
    with pytest.raises(SystemExit) as ended:
        smoke.main()
    assert ended.value.code == code
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("name: ") and said[3].startswith("flags: ")
    written = json.loads(file.read_text())
    assert len(written["rows"]) == 6 and written["machine"]["cores"] == os.cpu_count()
    monkeypatch.setattr(sys, "argv", ["smoke", "--only", "abacus"])
    with pytest.raises(SystemExit) as ended:
        smoke.main()
    assert ended.value.code == 2
