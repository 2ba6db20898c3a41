"""What the tests of the command line share."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from redwood.cli.app import app
from redwood.engine.engine import RowEngine

_OUTSIDE = ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "REDWOOD_DEBUG", "COLUMNS")


class Ran:
    """What a command line did; colours and widths of whoever runs the tests do not count."""

    def __init__(self, *args: str, stdin: str | bytes | None = None, **env: str) -> None:
        result = CliRunner(env={**dict.fromkeys(_OUTSIDE), **env}).invoke(
            app, list(args), input=stdin
        )
        self.code, self.stdout, self.stderr = result.exit_code, result.stdout, result.stderr

    @property
    def json(self) -> Any:
        assert self.code == 0, self.stderr
        return json.loads(self.stdout)

    def error(self, code: int = 1) -> str:
        """The one line of an error."""
        assert self.code == code, (self.code, self.stdout, self.stderr)
        assert self.stderr.count("\n") == 1 and self.stderr.endswith("\n"), self.stderr
        assert self.stderr.startswith("error: ") and "Traceback" not in self.stderr
        return self.stderr


def chat_prompt(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def only_made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Has `redwood serve` run nothing; what it would run is put into the list."""
    made: list[Any] = []

    def run(self: Any) -> int:
        made.append(self.service)
        return 0

    monkeypatch.setattr("redwood.server.run.Runner.run", run)
    monkeypatch.setattr("redwood.server.logs.set_up", lambda shape: None)  # it outlives a test
    return made


def press_ctrl_c(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Interrupts any engine once, after so many steps."""
    step, calls = RowEngine.step, list[int]()

    def broken(self: RowEngine) -> Any:
        calls.append(1)
        if len(calls) == after + 1:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(RowEngine, "step", broken)
