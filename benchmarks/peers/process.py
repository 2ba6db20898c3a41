"""Redwood's side of the peers: processes that stand still (SIGSTOP) when it is not their turn."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PAUSE = 0.1  # seconds before a turn: threads of the one before may spin for a while


class Process:
    """A program that is started when it is first needed, and ends with this one."""

    def __init__(self, command: list[str]) -> None:
        self.command = command
        self.log = tempfile.NamedTemporaryFile("w+", suffix=".peer.log")
        self.popen: subprocess.Popen[str] | None = None

    @property
    def pid(self) -> int:
        assert self.popen is not None
        return self.popen.pid

    def launch(self, *more: str, stdout: Any = None) -> None:
        """Starts it with some more arguments; what it prints goes to the log, or to `stdout`."""
        command = ["setpriv", "--pdeathsig", "KILL", *self.command, *more]
        out = self.log if stdout is None else stdout
        streams = {"stdin": subprocess.PIPE, "stdout": out, "stderr": self.log}
        self.popen = subprocess.Popen(command, text=True, **streams)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Lets it run inside."""
        os.kill(self.pid, signal.SIGCONT)
        try:
            yield
        finally:
            if self.popen is not None and self.popen.poll() is None:
                os.kill(self.pid, signal.SIGSTOP)

    def failed(self, reason: object) -> SystemExit:
        log = Path(self.log.name).read_text(errors="replace")[-2000:]
        return SystemExit(f"{shlex.join(self.command)}: {reason}\n{log}")

    def stop(self) -> None:
        if self.popen is not None:
            self.popen.kill()
            self.popen.wait()
            self.popen = None


class LinesPeer(Process):
    """A peer that answers JSON lines: see hf.py."""

    info: dict[str, Any]

    def start(self) -> None:
        """Starts it, waits until the model is there, and stops it until its turn."""
        self.launch(stdout=subprocess.PIPE)
        self.read()
        self.info = self.ask(do="info")
        os.kill(self.pid, signal.SIGSTOP)

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.popen is not None and self.popen.stdin is not None
        try:
            self.popen.stdin.write(json.dumps(request) + "\n")
            self.popen.stdin.flush()
        except OSError as error:
            raise self.failed(error) from error
        return self.read()

    def read(self) -> dict[str, Any]:
        assert self.popen is not None and self.popen.stdout is not None
        line = self.popen.stdout.readline()
        if not line:
            raise self.failed("it ended")
        return dict(json.loads(line))

    def warm_up(self, ids: list[int], **request: Any) -> None:
        """A few tokens: models are compiled, and sometimes loaded, by the first request."""
        with self.awake():
            answer = self.ask(do="generate", ids=ids, **request)
        if "error" in answer:
            raise self.failed(answer["error"])

    def turn(self, ids: list[int], **request: Any) -> dict[str, Any]:
        time.sleep(PAUSE)
        with self.awake():
            ask = lambda: self.ask(do="generate", ids=ids, **request)  # noqa: E731
            answer, others = watched(self.pid, ask)
        if "error" in answer:  # some requests make some peers fail, and the next one works again
            failed = {"token_ids": [], "tokens_per_s": 0.0, "others": others}
            return failed | {"error": answer["error"]}
        speed = 1e3 * answer["decoded"] / answer["decode_ms"] if answer["decoded"] else 0.0
        made = {"token_ids": answer["ids"], "tokens_per_s": speed, "others": others}
        made |= {key: answer[key] for key in ("first_ms", "decode_ms", "passes", "decoded")}
        made["whole_ms"] = answer["first_ms"] + answer["decode_ms"]
        return made | {"per_pass": answer["decoded"] / max(answer["passes"], 1)}


def watched(pid: int, call: Callable[[], Any]) -> tuple[Any, float]:
    """The call's result, and how many processors anybody but this process and `pid` used."""

    def seconds() -> float:
        ticks = [int(x) for x in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
        own = 0
        for process in {pid, os.getpid()}:
            after_name = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            own += int(after_name[11]) + int(after_name[12])
        return (sum(ticks) - ticks[3] - ticks[4] - own) / os.sysconf("SC_CLK_TCK")

    before, start = seconds(), time.perf_counter()
    return call(), (seconds() - before) / (time.perf_counter() - start)
