"""What may be skipped where tests must not be: with CI=true any other skip fails the run."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest

EXPECTED = (
    "no CUDA device",
    "there is a CUDA device here",
    "device auto is CUDA here",
    "needs Gemma 3 270M: pip install",
    r'needs Ray: pip install "redwood\[ray\]"',
    r"Transformers \S+ has no (tensor|pipeline) parallel loading",
)
"""Beginnings of reasons, as patterns: hardware and packages that tests do without."""


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails a run of CI in which a test was skipped for another reason."""
    reporter: Any = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") != "true" or reporter is None or session.exitstatus != 0:
        return
    if _unexpected(reporter):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Names what fails the run."""
    if os.environ.get("CI") == "true":
        for line in _unexpected(terminalreporter):
            terminalreporter.line(f"UNEXPECTED SKIP {line}", red=True)


def _unexpected(reporter: Any) -> list[str]:
    found = {}
    for report in reporter.stats.get("skipped", []):
        reason = str(report.longrepr[2]).removeprefix("Skipped: ")
        if not any(re.match(pattern, reason) for pattern in EXPECTED):
            found[f"{report.nodeid}: {reason}"] = None
    return list(found)
