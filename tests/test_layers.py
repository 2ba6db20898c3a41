"""Imports point downward; no file is two ideas."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "redwood"
LAYERS = [
    {"errors", "_native", "_rowmath_numpy", "_standard_streams"},
    {"rowmath", "_transformers", "_mapping", "turns"},
    {"chance"},
    {"tree", "stats", "text", "models", "tokenizers", "chat_template", "token_bound", "time_curve"},
    {"_profile_file"},
    {"profile", "datastore", "host_rows"},
    {"sampling"},
    {"verify", "drawing"},
    {"algorithms", "backends.base", "context"},
    {"backends", "requests", "testing"},
    {"timing", "growing", "proposing"},
    {"model_drafter", "ngram_drafter"},
    {"drafting"},
    {"pacing", "scheduling"},
    {"peek"},
    {"planner"},
    {"engine", "profile_key"},
    {"planning"},
    {"generate"},
    {"loading"},
    {"hf", "racing"},
    {"benchmarking"},
    {"calibration"},
    {"plotting", "tuning"},
    {"server"},
    {"replicas"},
    {"commands"},
    {"cli"},
    {"__main__"},
]


def _layer(module: str) -> int:
    for depth in (2, 1):
        name = ".".join(module.split(".")[:depth])
        for number, names in enumerate(LAYERS):
            if name in names:
                return number
    raise AssertionError(f"{module} has no layer: give it one in this test")


def _imports(file: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("redwood"):
            module = (node.module or "")[len("redwood.") :]
            found += [module] if module else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [
                a.name[len("redwood.") :] for a in node.names if a.name.startswith("redwood.")
            ]
    return found


FILES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(SOURCE)))
def test_imports_point_downward(file: Path) -> None:
    module = ".".join(file.relative_to(SOURCE).with_suffix("").parts)
    if module == "__init__":
        return  # the public face names everything
    package = module.split(".")[0]
    for imported in _imports(file):
        if imported == "__version__":
            continue
        same = imported.split(".")[0] == package
        assert same or _layer(imported) < _layer(module), f"{module} imports {imported}"


def test_algorithms_know_no_model_and_backends_no_algorithm() -> None:
    for file in (SOURCE / "algorithms").glob("*.py"):
        assert "transformers" not in file.read_text().replace("Transformers", "")
    for file in (SOURCE / "backends").glob("*.py"):
        assert not any(i.startswith("algorithms") for i in _imports(file))


def test_no_file_is_longer_than_400_lines() -> None:
    others = [
        f for folder in ("tests", "benchmarks", "examples") for f in ROOT.glob(f"{folder}/*.py")
    ]
    others += [f for folder in ("src", "tests") for f in ROOT.glob(f"{folder}/native/*")]
    long = [f.name for f in [*FILES, *others] if len(f.read_text().splitlines()) > 400]
    assert long == []


def test_nothing_reads_a_pickle_or_trusts_remote_code() -> None:
    for file in FILES:
        text = file.read_text()
        assert "import pickle" not in text and "torch.load" not in text, file
        assert "trust_remote_code=True" not in text, file
