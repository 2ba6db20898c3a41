"""Open connections: bounded by the files there may be, and idle ones make room."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from redwood.errors import ArgumentError
from redwood.server import connections, watching
from redwood.server.connections import Guard, most_connections, spare_files
from redwood.server.metrics import Metrics
from server_kit import PATIENCE_S, Live, Raw, wait_for

HALF = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX-A"


class Transport:
    def __init__(self) -> None:
        self.aborted = self.closed = False
        self.left = 0

    def abort(self) -> None:
        self.aborted = True

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.aborted or self.closed

    def get_write_buffer_size(self) -> int:
        return self.left


class Cycle:
    def __init__(self, complete: bool) -> None:
        self.response_complete = complete


class Connection:
    def __init__(self, cycle: Cycle | None = None) -> None:
        self.cycle, self.transport = cycle, Transport()


@pytest.mark.parametrize(("limit", "held"), [(60, 25), (256, 40), (1024, 60), (65536, 900)])
def test_files_are_left_for_other_things_than_connections(limit: int, held: int) -> None:
    most, spare = most_connections(limit, held), spare_files(limit, held)
    assert most >= 4 and held + most + spare == limit and spare >= 8
    at_once = Guard(most, spare, Metrics("0", "m")).at_once
    assert held + most + 3 * at_once < limit  # accepted, to be closed, and closing
    assert most_connections(limit, held, 3) == 3


def test_more_connections_than_files_are_refused_at_the_start() -> None:
    with pytest.raises(ArgumentError, match="ulimit -n"):
        most_connections(1024, 60, 5000)
    with pytest.raises(ArgumentError, match="ulimit -n"):
        most_connections(30, 25)


def test_the_oldest_idle_connection_makes_room_and_no_other() -> None:
    now = [0.0]
    guard = Guard(4, 100, Metrics("0", "m"), lambda: now[0])
    busy, answered, silent = Connection(Cycle(False)), Connection(Cycle(True)), Connection()
    unread = Connection(Cycle(True))
    unread.transport.left = 5  # of its answer
    for each in (busy, unread, answered, silent):
        assert guard.came(each) is None
    error = guard.came(Connection())  # the others have only just come
    assert error is not None and (error.status, error.code) == (503, "too_many_connections")
    now[0] = 2.0
    for gone in (answered, silent):
        assert guard.came(Connection()) is None and gone.transport.aborted
        guard.went(gone)
    assert guard.came(Connection()) is not None and len(guard) == 4
    assert not busy.transport.aborted and not unread.transport.aborted


def test_a_flood_is_one_line_a_second(caplog: pytest.LogCaptureFixture) -> None:
    now = [5.0]
    metrics = Metrics("0", "m")
    guard = Guard(1, 100, metrics, lambda: now[0])
    guard.came(Connection(Cycle(False)))
    for second in range(3):
        for _ in range(1000):
            now[0] = 5.0 + second + 0.5 * (second > 0)
            guard.came(Connection())
            guard.failed(None, {"message": "socket.accept() out of system resource"})
    assert len(caplog.records) == 3
    assert "1000 were refused" in caplog.messages[1]
    assert b'dropped_total{reason="files"} 3000' in metrics.text()


def test_other_faults_of_the_loop_are_told_as_ever() -> None:
    told: list[Any] = []

    class Loop:
        def default_exception_handler(self, context: Any) -> None:
            told.append(context)

    Guard(1, 8, Metrics("0", "m")).failed(Loop(), {"message": "other"})
    assert told == [{"message": "other"}]


def test_health_answers_while_idle_sockets_and_half_heads_hold_all_places(
    live: Callable[..., Live], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "_MIN_IDLE_S", 0.0)
    server = live(max_connections=6)
    with Raw(server.port) as silent, Raw(server.port) as half, Raw(server.port) as kept:
        half.send(HALF)
        kept.send(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        kept.read_until(b"}")
        kept.send(HALF)  # after an answer, likewise
        others = [Raw(server.port) for _ in range(10)]
        assert httpx.get(f"{server.url}/health").status_code == 200
        for each in (silent, half, kept):
            with suppress(ConnectionResetError):
                assert each.read_all() == b""
        for other in others:
            other.socket.close()
    server.alive_and_right()


def test_where_all_connections_are_in_use_a_new_one_gets_503(live: Callable[..., Live]) -> None:
    server = live(max_connections=3, rows=8)
    server.stage.pause()
    busy = [Raw(server.port) for _ in range(3)]
    for each in busy:
        each.post({"messages": [{"role": "user", "content": "Tom"}], "max_tokens": 2})
    wait_for(lambda: server.service.num_open == 3, "three answers")
    with Raw(server.port) as late:
        head, body = late.read_all().split(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 ") and b"retry-after: " in head
    assert json.loads(body)["error"]["code"] == "too_many_connections"
    server.stage.go_on()
    for each in busy:
        assert each.read_until(b"\r\n\r\n").startswith(b"HTTP/1.1 200")
        each.socket.close()
    server.alive_and_right()


def test_half_a_head_after_an_answer_is_closed_and_a_busy_client_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(watching, "monotonic", lambda: now[0])
    half, busy = Connection(Cycle(True)), Connection(Cycle(True))
    quiet: watching.Quiet = watching.WeakKeyDictionary()
    for _ in range(9):
        watching.close_stalled({half, busy}, quiet, 30.0, 30.0)
        now[0] += 5.0
        busy.cycle = Cycle(True)  # another request, answered between two looks
    assert half.transport.closed and not busy.transport.is_closing()


def test_idle_sockets_beyond_the_open_files_leave_the_server_alive(
    tiny_model_folder: Path,
) -> None:
    def few_files() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        os.close(0)  # a server needs neither
        os.close(1)

    command = [sys.executable, "-m", "redwood", "serve", "--port", "0", "--backend", "eager"]
    command += ["--target", str(tiny_model_folder), "--drafter", "none"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, preexec_fn=few_files, env={**os.environ}
    ) as process:
        assert process.stderr is not None
        found, said = None, []
        while found is None:
            said.append(process.stderr.readline())
            assert said[-1], said
            found = re.search(r"at (http://127\.0\.0\.1:(\d+))/v1", said[-1])
        held = [socket.create_connection(("127.0.0.1", int(found[2]))) for _ in range(150)]
        asked = f"{found[1]}/health"
        codes = []

        def healthy() -> bool:
            try:
                codes.append(httpx.get(asked, timeout=PATIENCE_S).status_code)
            except httpx.TransportError:
                return False
            return codes[-1] == 200

        wait_for(healthy, "health while full")
        for each in held:
            each.close()
        wait_for(healthy, "health after")
        process.send_signal(signal.SIGTERM)
        rest = process.communicate(timeout=PATIENCE_S)[1]
    assert process.returncode == 0
    assert "Traceback" not in rest and len(rest.splitlines()) < 40
    assert "connections are open" in rest
