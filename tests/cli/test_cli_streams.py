"""The command line without standard streams, or without a working directory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from fork_kit import command, forked

PATIENCE_S = 120.0
TREE = ["tree", "--acceptance", "0.8,0.1", "--size", "4"]


def run(
    args: Sequence[str], before: Callable[[], object], **more: str
) -> subprocess.CompletedProcess[str]:
    """Runs the command; `before` is called in its process first."""
    return subprocess.run(
        [sys.executable, "-m", "redwood", *args],
        preexec_fn=before,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env={**os.environ, **more},
    )


def closed(*numbers: int) -> Callable[[], None]:
    def close() -> None:
        for number in numbers:
            os.close(number)

    return close


@pytest.mark.parametrize("args", [TREE, ["--version"], ["--help"], ["models", "list", "--json"]])
def test_an_answer_that_goes_nowhere_is_one_line(args: list[str]) -> None:
    ran = run(args, closed(1))
    assert ran.returncode == 1
    assert ran.stderr == "error: cannot read or write: stdout is closed\n"


@pytest.mark.parametrize("numbers", [(0,), (2,), (0, 2)])
def test_without_stdin_or_stderr_an_answer_is_given(numbers: tuple[int, ...]) -> None:
    ran = run(TREE, closed(*numbers))
    assert ran.returncode == 0 and ran.stdout and not ran.stderr


def test_without_any_stream_the_exit_code_tells() -> None:
    assert run(TREE, closed(0, 1, 2)).returncode == 1
    assert run(["tree", "--size", "x"], closed(0, 1, 2)).returncode == 2


def test_a_model_answers_without_stdin_and_not_without_stdout(tiny_model_folder: Path) -> None:
    model = ["-t", str(tiny_model_folder), "--drafter", "ngram", "--backend", "eager"]
    ran = run(["generate", "Tom", *model, "--max-tokens", "4"], closed(0, 2))
    assert ran.returncode == 0 and ran.stdout
    ran = forked(command, "generate", "Tom", *model, "--max-tokens", "4", closed=[1])
    assert ran.returncode == 1 and ran.stderr.endswith("stdout is closed\n")
    assert "Traceback" not in ran.stderr
    ran = forked(command, "chat", *model, closed=[0])
    assert ran.returncode == 0  # it ends, as at the end of a file
    assert "empty" in forked(command, "generate", "-", *model, closed=[0]).stderr


def test_no_file_gets_the_number_of_a_stream(tmp_path: Path) -> None:
    code = (
        "from redwood.cli._standard_streams import open_streams; open_streams(); import os, sys;"
        f"assert os.open({str(tmp_path / 'f')!r}, os.O_CREAT | os.O_WRONLY) > 2;"
        "assert sys.stdin.read() == ''; sys.stderr.write('x')"
    )
    for numbers in ((0, 1, 2), (0,), (1,), (2,), (0, 2)):
        made = subprocess.run([sys.executable, "-c", code], preexec_fn=closed(*numbers))
        assert made.returncode == 0
    assert (tmp_path / "f").read_bytes() == b""


@pytest.mark.parametrize(
    "args",
    [["generate", "Tom"], ["models", "list"], ["serve"], ["chat"], TREE, ["--version"]],
    ids=lambda args: args[0],
)
def test_a_working_directory_that_is_gone_is_one_line(args: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()

    def leave() -> None:
        os.chdir(folder)
        folder.rmdir()

    ran = run(args, leave)
    assert ran.returncode == 1 and ran.stdout == ""
    (line,) = ran.stderr.splitlines()
    assert line.startswith("error: the working directory is gone")


@pytest.mark.parametrize(
    ("args", "code"), [(TREE, 0), (["tree", "--size", "x"], 2), (["generate", ""], 1)]
)
def test_what_cannot_be_said_stops_nothing(args: list[str], code: int) -> None:
    assert run(args, lambda: os.dup2(os.open("/dev/full", os.O_WRONLY), 2)).returncode == code
