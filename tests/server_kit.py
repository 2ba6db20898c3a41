"""What the tests of the server share: one that listens, models that misbehave, raw clients."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import httpx
import pytest

import redwood
from redwood import Engine, NgramDrafter
from redwood.server.auth import Keys
from redwood.server.kv_capacity import token_bytes
from redwood.server.listening import address_of, listen
from redwood.server.run import Runner
from redwood.server.service import Service
from redwood.server.settings import Settings

if TYPE_CHECKING:
    from openai import OpenAI

PATIENCE_S = 20.0  # for anything that must happen; a loaded machine is slow
_KNOWN: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
CHAT = {"messages": [{"role": "user", "content": "Tom"}], "temperature": 0, "max_tokens": 12}


def wait_for(happened: Callable[[], Any], what: str = "it", patience: float = PATIENCE_S) -> None:
    """Waits until something is true."""
    deadline = time.monotonic() + patience
    while not happened():
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.005)


class Staged:
    """A backend that does what a test wants at its forwards.

    Attributes: `calls` so far; `before(call)` runs first and may raise or wait; `after(call,
    logits)` returns what is to be seen of them.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.calls = 0
        self.before: Callable[[int], None] = lambda call: None
        self.after: Callable[[int, list[Any]], list[Any]] = lambda call, logits: logits
        self._open = threading.Event()
        self._open.set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def extend(self, rows: Sequence[Any]) -> list[Any]:
        self.calls += 1
        self._open.wait(PATIENCE_S)
        self.before(self.calls)
        return self.after(self.calls, self._backend.extend(rows))

    def pause(self) -> None:
        """Stops the model before its next forward."""
        self._open.clear()

    def go_on(self) -> None:
        """Lets it go on."""
        self._open.set()


class Live:
    """A server on a port of its own, in a thread.

    Args:
        engine: its model becomes `stage`.
        keys: that clients need.
        memory: of `Service`.
        settings: of `Settings`.
    """

    def __init__(
        self, engine: Engine, keys: Sequence[str] = (), memory: Any = None, **settings: Any
    ) -> None:
        self.stage = Staged(engine.target)
        engine.target = self.stage
        self.engine = engine
        options = {"model_names": ("tiny",), "port": 0, "drain_timeout_s": 5.0, **settings}
        self.settings = Settings(**options)
        self.service = Service(engine, self.settings, Keys(keys), memory)
        self.listener = listen(self.settings)
        self.url = address_of(self.listener)
        self.runner = Runner(self.service, self.listener)
        self.code: int | None = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        assert self.runner.started.wait(PATIENCE_S)
        headers = {"authorization": f"Bearer {keys[0]}"} if keys else {}
        self.http = httpx.Client(
            base_url=self.url, timeout=PATIENCE_S, headers=headers, verify=False
        )
        self._key = keys[0] if keys else "none"

    @cached_property
    def openai(self) -> OpenAI:
        """OpenAI's client, which does not try again."""
        from openai import OpenAI  # a second, which other tests need not wait

        url = f"{self.url}/v1"
        return OpenAI(base_url=url, api_key=self._key, max_retries=0, timeout=PATIENCE_S)

    def _run(self) -> None:
        self.code = self.runner.run()

    def stop(self) -> None:
        """Drains and ends."""
        self.stage.go_on()
        self.http.close()
        if "openai" in vars(self):
            self.openai.close()
        self.runner.stop()
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive()
        self.listener.close()

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def chat(self, **changes: Any) -> httpx.Response:
        """A chat request; None takes a field away."""
        body = {k: v for k, v in {**CHAT, **changes}.items() if v is not None}
        return self.http.post("/v1/chat/completions", json=body)

    def text(self, **changes: Any) -> str:
        """The answer to one."""
        response = self.chat(**changes)
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["message"]["content"])

    def error(self, response: httpx.Response, status: int) -> dict[str, Any]:
        """The error of a response, which must have OpenAI's shape."""
        assert response.status_code == status, (response.status_code, response.text)
        assert response.headers["content-type"] == "application/json"
        assert response.headers["x-request-id"]
        body = response.json()
        assert set(body) == {"error"}
        assert set(body["error"]) == {"message", "type", "param", "code"}
        assert body["error"]["message"] and body["error"]["type"] and body["error"]["code"]
        return dict(body["error"])

    def metric(self, line: str) -> float:
        """The value of a metric, named with its labels; 0 where there is none."""
        for found in self.service.metrics.text().decode().splitlines():
            name, _, value = found.rpartition(" ")
            if name == line:
                return float(value)
        return 0.0

    def idle(self) -> bool:
        """Whether nothing runs or waits, in the engine and around it."""
        admission = self.service.admission
        return not (
            self.engine.busy
            or admission.num_running
            or admission.num_waiting
            or self.service.num_open
        )

    def alive_and_right(self) -> None:
        """After a fault: healthy, idle, and a known prompt gets its known answer."""
        wait_for(self.idle, "an idle engine")
        assert self.http.get("/health").status_code == 200
        assert self.text() == known_answer(self.engine)


def known_answer(engine: Engine) -> str:
    """What the model itself says to `CHAT`, by another engine on the same weights."""
    backend = engine.target
    while isinstance(backend, Staged):
        backend = backend._backend
    if backend in _KNOWN:
        return _KNOWN[backend]
    plain = Engine(backend, tokenizer=engine.tokenizer, eos_ids=sorted(engine.eos_ids), budget=1)
    made = plain.generate(CHAT["messages"], temperature=0, max_tokens=CHAT["max_tokens"])
    return _KNOWN.setdefault(backend, made.text)


def break_release(server: Live, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Has the model release rows and then raise; returns the list of those rows."""
    model, released = server.stage._backend, list[int]()
    real = model.release

    def broken(row: int) -> None:
        real(row)
        released.append(row)
        raise RuntimeError("stuck")

    monkeypatch.setattr(model, "release", broken)
    return released


class Raw:
    """A client that does what no library would.

    Args:
        receive_buffer: bytes that the system takes in unread; None: as it likes.
    """

    def __init__(self, port: int, receive_buffer: int | None = None) -> None:
        self.socket = socket.socket()
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(PATIENCE_S)
        self.socket.connect(("127.0.0.1", port))

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *exc: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def post(self, body: Any, *, path: str = "/v1/chat/completions", **headers: str) -> None:
        """Sends a request with a JSON body, or with these bytes."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        named = {
            "Host": "127.0.0.1",
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            **{name.replace("_", "-"): value for name, value in headers.items()},
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in named.items() if value)
        self.send(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + data)

    def read_until(self, sign: bytes) -> bytes:
        """Reads until these bytes have come."""
        got = b""
        while sign not in got:
            part = self.socket.recv(4096)
            assert part, got
            got += part
        return got

    def read_all(self) -> bytes:
        """Reads until the server closes the connection."""
        got = b""
        while part := self.socket.recv(65536):
            got += part
        return got


def events(text: str) -> list[Any]:
    """The events of a stream; [DONE] as it is."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


@pytest.fixture(scope="session")
def tiny_engine(tiny_model_folder: Path) -> Engine:
    """An engine whose model others may share."""
    engine = redwood.load(str(tiny_model_folder), backend="eager")
    token_bytes(engine.target)  # asked by every server, and only the first time a forward
    return engine


@pytest.fixture
def live(tiny_engine: Engine) -> Iterator[Callable[..., Live]]:
    """Starts servers of the tiny model; stops them in the end."""
    started: list[Live] = []

    def start(*, keys: Sequence[str] = (), rows: int = 4, **settings: Any) -> Live:
        engine = Engine(
            tiny_engine.target,
            NgramDrafter(),
            tokenizer=tiny_engine.tokenizer,
            eos_ids=sorted(tiny_engine.eos_ids),
            budget=6,
            max_rows=rows,
        )
        started.append(Live(engine, keys, **settings))
        return started[-1]

    yield start
    for each in started:
        each.stop()
