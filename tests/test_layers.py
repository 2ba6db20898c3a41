"""Imports point downward; no file is two ideas."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "redwood"
LAYERS = [
    {"errors", "_defaults", "_moved", "_native"},
    {"_storage"},
    {"tree"},
    {"sampling"},
    {"verify"},
    {"models", "algorithms"},
    {"datastore", "backends"},
    {"table"},
    {"testing", "drafters"},
    {"profiling"},
    {"planner"},
    {"engine"},
    {"hf", "bench"},
    {"tuning"},
    {"server"},
    {"cli"},
    {"__main__"},
]
"""Modules and packages at the top; each may import those above it in this list."""


def _layer(module: str) -> int:
    top = module.split(".")[0]
    for number, names in enumerate(LAYERS):
        if top in names:
            return number
    raise AssertionError(f"{top} has no layer: give it one in this test, or put it in a package")


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
    for file in (SOURCE / "backends").rglob("*.py"):
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
