"""`llm`, the command-line tool, with an extra-openai-models.yaml."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from checks import KEY, LONG, MODEL, PLAIN, STOP, URL, report, same, wait_rows

HOME = tempfile.TemporaryDirectory()
MODELS = "".join(
    f"- model_id: {name}\n  model_name: {model}\n  api_base: {URL}/v1\n  api_key_name: redwood\n"
    for name, model in (("redwood", MODEL), ("missing", "none"))
)
(Path(HOME.name) / "extra-openai-models.yaml").write_text(MODELS)
COMMAND = [sys.executable, "-m", "llm", "prompt", "--no-log"]
ENVIRONMENT = {**os.environ, "LLM_USER_PATH": HOME.name, "PYTHONUNBUFFERED": "1"}


def options(case: dict[str, Any], *more: str, model: str = "redwood", key: str = KEY) -> list[str]:
    """The command for a case."""
    body = case["body"]
    given = [
        word for name in ("temperature", "max_tokens") for word in ("-o", name, str(body[name]))
    ]
    prompt = body["messages"][0]["content"]
    return [*COMMAND, "-m", model, "--key", key, *given, *more, prompt]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """What it printed."""
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)


def plain() -> None:
    same(run(options(PLAIN, "--no-stream")).stdout.strip(), PLAIN["texts"][0].strip())


def stream() -> None:
    same(run(options(PLAIN)).stdout.strip(), PLAIN["texts"][0].strip())


def usage() -> None:
    for more in ([], ["--no-stream"]):
        told = run(options(PLAIN, "-u", *more)).stderr
        assert f"{PLAIN['num_tokens']} output" in told, told


def stop() -> None:
    (word,) = STOP["body"]["stop"][:1]
    (whole,) = PLAIN["texts"]
    seen = run(options({"body": {**PLAIN["body"]}}, "-o", "stop", word)).stdout
    same(seen.strip(), whole.partition(word)[0].strip())


def error() -> None:
    done = run(options(PLAIN, model="missing"))
    assert done.returncode and "there is no model" in done.stderr, done


def bad_key() -> None:
    done = run(options(PLAIN, key="wrong"))
    assert done.returncode and "valid API key" in done.stderr, done


def cancel() -> str:
    body = {"temperature": 1.0, "max_tokens": 4000, "messages": LONG}
    going = subprocess.Popen(
        options({"body": body}), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    wait_rows(True)
    time.sleep(0.2)
    going.send_signal(signal.SIGINT)
    going.wait(30)
    return f"rows free after {wait_rows(False):.2f} s"


report(
    version("llm"),
    {
        "plain": plain,
        "stream": stream,
        "usage": usage,
        "stop": stop,
        "error": error,
        "bad key": bad_key,
        "cancel": cancel,
    },
)
