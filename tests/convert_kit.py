"""Conversions of GGUF files in forked processes: an import of torch takes longer than the work.

They stay processes of their own, with their own exit code and lines. How Python itself is started
for one is left to tests/models/test_models_sources.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast  # noqa: F401

import redwood.models.gguf_tokenizer  # noqa: F401
from parallel_kit import fork_server
from redwood.models import _convert


def forked(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Stands for `subprocess.run` of a conversion."""
    with tempfile.TemporaryDirectory() as name:
        files = [Path(name) / "out", Path(name) / "err"]
        given = [str(file) for file in files], options["env"], command[-3:]
        process = fork_server().Process(target=_child, args=given)
        process.start()
        process.join()
        said = [file.read_text() for file in files]
    return subprocess.CompletedProcess(command, process.exitcode, *said)


def _child(files: list[str], env: dict[str, str], given: list[str]) -> None:
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    os.environ.update(env)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    try:
        _convert.run(*given)
    finally:
        sys.stdout.flush()


@pytest.fixture
def forked_conversions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets conversions fork."""
    run = subprocess.run

    def started(command: Any, **options: Any) -> Any:
        return (forked if _convert._CHILD in command else run)(command, **options)

    monkeypatch.setattr(subprocess, "run", started)
