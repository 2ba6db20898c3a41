"""Stopping: what runs may end, within a bound; the rest is told; nothing is left over."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from redwood.server.run import leave
from server_kit import CHAT, PATIENCE_S, Live, Raw, events, known_answer, wait_for


def test_what_runs_and_waits_may_end_and_new_requests_are_refused(
    live: Callable[..., Live],
) -> None:
    server = live(rows=1, drain_timeout_s=PATIENCE_S)
    right = known_answer(server.engine)
    server.stage.pause()
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(server.chat, stream=True)
        wait_for(lambda: server.service.admission.num_running == 1, "the first")
        waiting = pool.submit(server.chat)
        wait_for(lambda: server.service.num_open == 2, "the second")
        server.runner.stop()
        wait_for(lambda: server.http.get("/ready").status_code == 503, "a refusal")
        assert server.http.get("/ready").json()["status"] == "shutting_down"
        assert server.http.get("/health").status_code == 200
        response = server.chat()
        assert server.error(response, 503)["code"] == "shutting_down"
        assert int(response.headers["retry-after"]) >= 1
        server.stage.go_on()
        streamed = events(running.result().text)
        assert streamed[-1] == "[DONE]"
        assert streamed[-2]["choices"][0]["finish_reason"] == "length"
        assert waiting.result().json()["choices"][0]["message"]["content"] == right
    server.thread.join(PATIENCE_S)
    assert server.code == 0


def test_past_the_bound_what_is_left_is_told_and_cut(live: Callable[..., Live]) -> None:
    server = live(drain_timeout_s=0.2)
    go = threading.Event()
    server.stage.before = lambda call: None if call < 6 else (go.wait(PATIENCE_S), None)[1]
    with ThreadPoolExecutor(2) as pool, Raw(server.port) as client:
        whole = pool.submit(server.chat)
        client.post({**CHAT, "stream": True})
        client.read_until(b'"content":"')
        wait_for(lambda: server.service.num_open == 2, "both")
        server.runner.stop()
        assert b'"shutting_down"' in client.read_until(b"shutting_down")
        assert server.error(whole.result(), 503)["code"] == "shutting_down"
    go.set()
    server.thread.join(PATIENCE_S)
    assert server.code == 0
    assert server.metric('redwood:requests_cancelled_total{reason="shutdown"}') == 2


def test_a_second_signal_does_not_wait(live: Callable[..., Live]) -> None:
    server = live(drain_timeout_s=1000.0)
    server.stage.pause()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.chat)
        wait_for(lambda: server.service.num_open == 1, "the request")
        server.runner.stop()
        wait_for(lambda: server.service.draining, "the drain")
        server.runner.stop()
        assert server.error(running.result(), 503)["code"] == "shutting_down"
    server.stage.go_on()
    server.thread.join(PATIENCE_S)
    assert server.code == 0


def test_a_thread_that_is_stuck_does_not_keep_the_process(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    left: list[int] = []
    monkeypatch.setattr("redwood.server.run.os._exit", left.append)
    assert leave(0) == 0 and left == []
    go = threading.Event()
    thread = threading.Thread(target=go.wait, name="redwood-stuck", daemon=True)
    thread.start()
    leave(3, 0.01)
    go.set()
    thread.join()
    assert left == [3] and "redwood-stuck" in caplog.text


@pytest.fixture
def process(tiny_model_folder: Path, tmp_path: Path) -> Iterator[tuple[Any, str]]:
    """`redwood serve` as a process of its own, and its URL."""
    args = ["--target", str(tiny_model_folder), "--backend", "eager", "--port", "0"]
    args += ["--drain-timeout", "20", "--api-key-file", str(tmp_path / "keys")]
    (tmp_path / "keys").write_text("sentinel-key-1\n")
    log = open(tmp_path / "log", "w+")
    running = subprocess.Popen(
        [sys.executable, "-m", "redwood", "serve", *args],
        stdout=subprocess.PIPE,
        stderr=log,
        env={**os.environ, "HF_TOKEN": "sentinel-token"},
    )

    def url() -> str:
        found = re.search(r"serving \S+ at (http://\S+)/v1", (tmp_path / "log").read_text())
        return found[1] if found else ""

    try:
        wait_for(lambda: url() or running.poll() is not None, "a server", 120)
        yield running, url()
    finally:
        running.kill()
        running.communicate()
        log.close()


def test_sigterm_lets_a_stream_end_and_exits_with_0(
    process: tuple[Any, str], tmp_path: Path
) -> None:
    running, url = process
    headers = {"authorization": "Bearer sentinel-key-1"}
    body = {**CHAT, "max_tokens": 120, "ignore_eos": True, "stream": True}
    with httpx.Client(headers=headers, timeout=PATIENCE_S) as client:
        with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            running.send_signal(signal.SIGTERM)
            rest = list(lines)
    assert rest[-2] == "data: [DONE]" and '"finish_reason":"length"' in rest[-4]
    children = psutil.Process(running.pid).children(recursive=True)
    assert running.wait(PATIENCE_S) == 0
    assert not [child for child in children if child.is_running()]
    log = (tmp_path / "log").read_text()
    assert "sentinel" not in log and "Traceback" not in log
    assert running.stdout.read() == b""
    assert "redwood serve" not in log and log.count("path=/v1/chat/completions") == 1
