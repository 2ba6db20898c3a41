"""Nothing is skipped in silence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = """
import pytest

@pytest.mark.skipif(True, reason={reason!r})
def test_skipped():
    pass

def test_passes():
    pass
"""


def _run(folder: Path, text: str, ci: str, *more: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_cases.py").write_text(text)
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "pytest", "-rs", "-p", "skips_kit", *more, "test_cases.py"]
    env = {**os.environ, "CI": ci, "PYTHONPATH": path}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("reason", "ci", "code"),
    [
        ("no Chromium here", "true", 1),
        ("no Chromium here", "", 0),
        ("no CUDA device", "true", 0),
        ('needs Ray: pip install "redwood[ray]"', "true", 0),
    ],
)
def test_an_unexpected_skip_fails_in_ci_alone(
    reason: str, ci: str, code: int, tmp_path: Path
) -> None:
    ran = _run(tmp_path, CASES.format(reason=reason), ci)
    assert ran.returncode == code, ran.stdout
    assert f"SKIPPED [1] test_cases.py:4: {reason}" in ran.stdout
    assert ("UNEXPECTED SKIP test_cases.py::test_skipped: no Chromium" in ran.stdout) == (code == 1)


@pytest.mark.parametrize("more", [(), ("-n", "1")])
def test_a_module_that_is_skipped_whole_counts_too(more: tuple[str, ...], tmp_path: Path) -> None:
    text = 'import pytest\npytest.importorskip("no_such_package")\ndef test_a(): pass\n'
    (tmp_path / "test_other.py").write_text("def test_b(): pass\n")
    ran = _run(tmp_path, text, "true", *more, "test_other.py")
    assert ran.returncode == 1, ran.stdout
    assert "UNEXPECTED SKIP test_cases.py: could not import 'no_such_package'" in ran.stdout
