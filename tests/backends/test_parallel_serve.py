"""`redwood serve` under torchrun itself."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx

import redwood
from parallel_kit import PATIENCE_S, need_parallel_loading
from server_kit import CHAT

need_parallel_loading()


def test_a_server_under_torchrun_answers_and_stops(tiny_model_folder: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    serve = ["-m", "redwood", "serve", "--parallel", "pipeline", "--port", "0", "--target"]
    log = tmp_path / "log"
    with log.open("w") as stderr:
        running = subprocess.Popen([*launch, "2", *serve, str(tiny_model_folder)], stderr=stderr)
    try:
        url = _url(log, running)
        answer = httpx.post(f"{url}/chat/completions", json=CHAT, timeout=PATIENCE_S).json()
        running.send_signal(signal.SIGTERM)
        running.wait(PATIENCE_S)
    finally:
        running.kill()
    alone = redwood.load(tiny_model_folder, backend="eager")
    expected = alone.generate(CHAT["messages"], temperature=0, max_tokens=12)
    assert answer["choices"][0]["message"]["content"] == expected.text
    said = log.read_text()
    assert "stopping: 0 requests may end" in said
    assert "error: " not in said and "ends, too" not in said


def _url(log: Path, running: subprocess.Popen[bytes]) -> str:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and running.poll() is None:
        found = re.search(r"serving .* at (http\S+)", log.read_text())
        if found:
            return found[1]
        time.sleep(0.05)
    raise AssertionError(log.read_text())
