"""A server of one's own for a benchmark: started, asked how it is, ended by SIGTERM.

Every command of this folder takes the options of `add_server`: without --url it starts
`redwood serve` on a free port, and in the end it checks that SIGTERM ended it with 0.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

sys.path.append(str(Path(__file__).parents[1]))  # for `common`
KEY = "a-key-for-benchmarks"
TARGET, DRAFTER = "smollm2-135m-instruct", "ngram"
_ROOT = Path(__file__).parents[2]
_START_S, _END_S = 300.0, 60.0


def add_server(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say which server is meant."""
    parser.add_argument("--url", help="of a server that runs; left out: one is started")
    parser.add_argument("--key", default=KEY, help="its API key")
    parser.add_argument("--target", default=TARGET)
    parser.add_argument("--drafter", default=DRAFTER)
    parser.add_argument("--threads", type=int, default=1, help="of the server")


class Server:
    """A server, ours or somebody's.

    Args:
        url: its base, without /v1.
        key: for its requests.
        popen: its process, if it is ours.
        log: where that writes.
    """

    def __init__(
        self, url: str, key: str, popen: subprocess.Popen[bytes] | None = None, log: str = ""
    ) -> None:
        self.url, self.key, self.log, self._popen = url, key, log, popen
        parts = urlsplit(url)
        self.host, self.port = parts.hostname or "127.0.0.1", parts.port or 80
        self.process = None if popen is None else psutil.Process(popen.pid)
        self.exit_code: int | None = None

    def get(self, path: str) -> tuple[int, bytes]:
        """Status and body of a GET."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=30)
        try:
            headers = {"Authorization": f"Bearer {self.key}", "Connection": "close"}
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def metrics(self) -> dict[str, float]:
        """All metrics: name with labels, without the prefix -> value."""
        lines = self.get("/metrics")[1].decode().splitlines()
        pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name.removeprefix("redwood:"): float(value) for name, _, value in pairs}

    def rows(self) -> tuple[int, int]:
        """Answers that run, and that wait."""
        found = self.metrics()
        return int(found["num_requests_running"]), int(found["num_requests_waiting"])

    def idle_within(self, seconds: float) -> float | None:
        """Seconds until nothing runs or waits; None if that takes longer."""
        start = time.monotonic()
        while time.monotonic() - start <= seconds:
            if self.rows() == (0, 0):
                return time.monotonic() - start
            time.sleep(0.02)
        return None

    def facts(self) -> dict[str, float]:
        """What the process uses: memory, open files, threads, seconds of processor."""
        if self.process is None:
            return {}
        with self.process.oneshot():
            times = self.process.cpu_times()
            return {
                "rss_mib": round(self.process.memory_info().rss / 2**20, 2),
                "files": self.process.num_fds(),
                "threads": self.process.num_threads(),
                "cpu_s": round(times.user + times.system, 2),
            }

    def stop(self) -> None:
        """Ends it by SIGTERM; `exit_code` says how. One that is not ours is left alone."""
        if self._popen is None:
            return
        self._popen.send_signal(signal.SIGTERM)
        try:
            self.exit_code = self._popen.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self.exit_code = self._popen.wait()

    def log_lines(self, *words: str) -> list[str]:
        """Lines of its log that hold one of these words."""
        lines = Path(self.log).read_text(errors="replace").splitlines() if self.log else []
        return [line for line in lines if any(word in line for word in words)]

    def wait_ready(self) -> None:
        """Waits until it takes requests."""
        deadline = time.monotonic() + _START_S
        while True:
            if self._popen is not None and self._popen.poll() is not None:
                raise SystemExit(f"the server ended at once: {Path(self.log).read_text()[-2000:]}")
            try:
                if self.get("/ready")[0] == 200:
                    return
            except OSError:
                pass
            if time.monotonic() > deadline:
                raise SystemExit("the server did not start in time")
            time.sleep(0.2)


@contextmanager
def serving(
    options: argparse.Namespace, more: Sequence[str] = (), *, command: str = "serve"
) -> Iterator[Server]:
    """The server that the options name, or one of our own with `more` arguments to its command.

    Raises:
        SystemExit: it did not start, or SIGTERM did not end it with 0.
    """
    if options.url:
        yield Server(options.url.removesuffix("/").removesuffix("/v1"), options.key)
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["setpriv", "--pdeathsig", "TERM"]  # it ends with us, however that may be
    words += [sys.executable, "-m", "redwood", command, "--port", str(port)]
    words += ["--target", options.target, "--drafter", options.drafter]
    words += ["--threads", str(options.threads), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "REDWOOD_API_KEY": options.key}
    with tempfile.NamedTemporaryFile(suffix=".serve.log") as log:
        popen = subprocess.Popen(words, stdout=log, stderr=log, env=environment)
        server = Server(f"http://127.0.0.1:{port}", options.key, popen, log.name)
        try:
            server.wait_ready()
            yield server
        except BaseException:
            print("\n".join(server.log_lines("")[-30:]), file=sys.stderr)
            raise
        finally:
            server.stop()
        if server.exit_code != 0:
            raise SystemExit(f"SIGTERM ended the server with {server.exit_code}, not 0")


def setting(*packages: str) -> dict[str, Any]:
    """Machine, commit and versions, for a result file."""
    from common import command as common_command, setting as common_setting  # isort: skip

    names = ("fastapi", "starlette", "uvicorn", "h11", "pydantic", "llguidance", *packages)
    files = sorted((_ROOT / "src/redwood/server").glob("*.py"))
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    changed = subprocess.run(
        ["git", "status", "--porcelain", "src"], cwd=_ROOT, capture_output=True, check=False
    ).stdout
    return common_setting(
        changed_since_commit=bool(changed.strip()),
        server_files_sha256=digest[:16],
        python=sys.version.split()[0],
        versions={name: version(name) for name in names},
        command=f"python {common_command()}",
        date=time.strftime("%Y-%m-%d", time.gmtime()),
    )


def save(name: str, data: dict[str, Any]) -> None:
    """Writes benchmarks/results/serving_NAME.json."""
    from common import save as common_save

    common_save(f"serving_{name}", json.loads(json.dumps(data)))
