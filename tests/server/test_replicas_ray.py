"""Two replicas on Ray Serve, one killed while both answer. Skipped where Ray is not installed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from redwood import Engine
from server_kit import CHAT, events, known_answer, wait_for

pytest.importorskip("ray.serve", reason='needs Ray: pip install "redwood[ray]"')
PATIENCE_S = 60.0
LONG = {**CHAT, "max_tokens": 200, "ignore_eos": True, "stream": True}


class Deployed:
    """`redwood deploy --run` as a process."""

    def __init__(self, model: Path, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = ["deploy", "--run", "--target", str(model), "--backend", "eager"]
        words += ["--replicas", "2", "--replica-cpus", "0.5", "--port", str(port)]
        words += ["--drain-timeout", "10"]
        self.log = folder / "log"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "redwood", *words],
                stdout=log,
                stderr=log,
                env={**os.environ, "REDWOOD_CACHE": str(folder / "cache")},
            )
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S)
        wait_for(self.started, "a deployment", 2 * PATIENCE_S)

    def started(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        return "serving " in self.log.read_text()

    def engines(self) -> list[psutil.Process]:
        """The processes of the replicas."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [each for each in children if "redwood:engine" in " ".join(each.cmdline())]

    def states(self) -> list[dict[str, Any]]:
        """What the replicas say of themselves."""
        return list(self.http.get("/health").json()["replicas"].values())

    def idle(self) -> bool:
        """Whether two replicas are well and idle."""
        states = self.states()
        return len(states) == 2 and all(
            (each["status"], each["running"], each["waiting"]) == ("ok", 0, 0) for each in states
        )

    def counted(self, name: str) -> float:
        """The sum of a metric over the replicas."""
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    def chat(self, **changes: Any) -> httpx.Response:
        return self.http.post("/v1/chat/completions", json={**CHAT, **changes})


@pytest.fixture(scope="module")
def deployed(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    made = Deployed(tiny_model_folder, tmp_path_factory.mktemp("deployed"))
    yield made
    made.http.close()
    made.process.send_signal(signal.SIGTERM)
    assert made.process.wait(PATIENCE_S) == 0, made.log.read_text()


def text_of(told: list[Any]) -> tuple[str, Any]:
    """What a stream said, and its last event."""
    deltas = [each["choices"][0]["delta"] for each in told if "choices" in each]
    return "".join(each.get("content") or "" for each in deltas), told[-1]


def test_a_client_that_leaves_frees_its_row(deployed: Deployed) -> None:
    with deployed.http.stream("POST", "/v1/chat/completions", json=LONG) as response:
        next(response.iter_lines())
    wait_for(lambda: all(each["running"] == 0 for each in deployed.states()), "a free row")
    assert deployed.counted('redwood:requests_cancelled_total{reason="disconnect"') == 1


def test_when_a_replica_is_killed_every_request_is_answered_or_told(
    deployed: Deployed, tiny_engine: Engine
) -> None:
    wait_for(deployed.idle, "two idle replicas", PATIENCE_S)
    short = known_answer(tiny_engine)
    right, _ = text_of(events(deployed.http.post("/v1/chat/completions", json=LONG).text))
    begun, silent = threading.Barrier(9), threading.Event()

    def stream() -> list[Any]:
        text, met = "", False
        with deployed.http.stream("POST", "/v1/chat/completions", json=LONG) as response:
            assert response.status_code == 200
            for line in response.iter_lines():
                text += line + "\n"
                if not met and '"content":"' in line and '"content":""' not in line:
                    met = True
                    begun.wait(PATIENCE_S)
                    silent.wait(PATIENCE_S)
        return events(text)

    with ThreadPoolExecutor(16) as pool:
        streams = [pool.submit(stream) for _ in range(8)]
        begun.wait(PATIENCE_S)
        victim = deployed.engines()[0]
        victim.send_signal(signal.SIGSTOP)
        silent.set()
        asked = [pool.submit(deployed.chat, stream=number % 2 == 0) for number in range(8)]
        time.sleep(0.5)  # some of them are now with one that says nothing
        victim.kill()
        told = [each.result() for each in streams]
        answers = [each.result() for each in asked]
    failed = [each for each in told if each[-1] != "[DONE]"]
    assert 0 < len(failed) < 8
    for each in told:
        said, last = text_of(each)
        if last == "[DONE]":
            assert said == right
        else:
            assert right.startswith(said)
            assert last["error"]["code"] == "replica_lost"
            assert json.dumps(each).count('"error"') == 1
    for response in answers[1::2]:
        assert response.json()["choices"][0]["message"]["content"] == short
    for response in answers[::2]:
        assert text_of(events(response.text)) == (short, "[DONE]")
    begun_lost = deployed.counted('redwood:replica_lost_requests_total{answer="begun"')
    assert begun_lost == len(failed)
