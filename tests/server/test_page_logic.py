"""The web page's JavaScript without a browser: `node --test` on its modules."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

STATIC = Path(__file__).parents[2] / "src" / "redwood" / "server" / "static"
_TESTS = Path(__file__).parents[1] / "page"
_OWN = [file for file in STATIC.iterdir() if file.is_file()]
_LEAST = 18  # the first Node with a test runner, fetch and streams


def _node() -> str:
    node = shutil.which("node")
    if node is None:
        pytest.skip("Node is not installed")
    said = subprocess.run([node, "--version"], capture_output=True, text=True, timeout=60).stdout
    if int(said.strip().lstrip("v").split(".")[0] or 0) < _LEAST:
        pytest.skip(f"Node {said.strip()} is older than {_LEAST}")
    return node


@pytest.mark.parametrize("tests", ["logic", "answers"])
def test_the_logic_of_the_page(tests: str, tmp_path: Path) -> None:
    node = _node()
    shutil.copytree(STATIC, tmp_path, dirs_exist_ok=True)
    (tmp_path / "package.json").write_text('{"type": "module"}')  # what a browser takes for granted
    ran = subprocess.run(
        [node, "--test", str(_TESTS / f"{tests}.test.mjs")],
        env={**os.environ, "STATIC": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_the_page_loads_nothing_from_elsewhere_and_has_nothing_inline() -> None:
    page = (STATIC / "index.html").read_text("utf-8")
    assert not re.search(r"<style|\sstyle=|\son[a-z]+=|javascript:", page)
    assert re.findall(r"<script[^>]*>(.*?)</script>", page, re.DOTALL) == [""]
    for file in _OWN:
        text = file.read_text("utf-8").replace("http://www.w3.org/", "")
        assert "http://" not in text and "https://" not in text, file.name
    for name in re.findall(r'(?:src|href)="(static/[^"]+)"', page):
        assert (STATIC / Path(name).name).is_file(), name


def test_no_module_makes_markup_from_text() -> None:
    for file in STATIC.glob("*.js"):
        text = file.read_text("utf-8")
        for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
            assert way not in text, f"{way} in {file.name}"


def test_files_stay_short() -> None:
    for file in _OWN:
        assert len(file.read_text("utf-8").splitlines()) < 400, file.name
