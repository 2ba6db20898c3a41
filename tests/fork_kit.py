"""Processes forked from one that has imported everything: an import of torch takes longer than
what most of them do. Each has its own exit code, environment and streams.

How Python itself starts for a conversion is left to tests/models/test_models_sources.py, for the
command line to tests/cli/test_cli_streams.py.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast  # noqa: F401

import redwood.models.gguf_tokenizer  # noqa: F401
from parallel_kit import fork_server
from redwood.models import _convert


def forked(
    task: Callable[..., Any],
    *given: Any,
    closed: Sequence[int] = (),
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs a function of a module in a process of its own.

    Args:
        closed: numbers of standard streams that are closed, and None in `sys`, as Python has them
            where it starts without.
        env: its environment, beside that of the first process.
    """
    with tempfile.TemporaryDirectory() as name:
        files = [Path(name) / "out", Path(name) / "err"]
        for file in files:
            file.touch()
        about = [str(file) for file in files], list(closed), dict(env or os.environ)
        process = fork_server().Process(target=_child, args=(*about, task, given))
        process.start()
        process.join()
        said = [file.read_text() for file in files]
    return subprocess.CompletedProcess([], process.exitcode, *said)


def _child(
    files: list[str], closed: list[int], env: dict[str, str], task: Any, given: Sequence[Any]
) -> None:
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    streams = [open(os.devnull), *(open(n, "w", closefd=False) for n in (1, 2))]
    sys.stdin, sys.stdout, sys.stderr = (
        None if number in closed else stream  # type: ignore[assignment]
        for number, stream in enumerate(streams)
    )
    for number in closed:
        os.close(number)
    os.environ.update(env)
    try:
        task(*given)
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None and not stream.closed:
                stream.flush()


def script(code: str, *args: str) -> None:
    """What `python -c` does."""
    sys.argv = ["-c", *args]
    exec(code, {"__name__": "__main__"})


def command(*args: str) -> None:
    """What `python -m redwood` does."""
    sys.argv = ["redwood", *args]
    runpy.run_module("redwood", run_name="__main__", alter_sys=True)


def _convert_quietly(*given: str) -> None:
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    _convert.run(*given)


@pytest.fixture
def forked_conversions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets conversions of GGUF files fork."""
    run = subprocess.run

    def started(words: Any, **options: Any) -> Any:
        if _convert._CHILD not in words:
            return run(words, **options)
        return forked(_convert_quietly, *words[-3:], env=options["env"])

    monkeypatch.setattr(subprocess, "run", started)
