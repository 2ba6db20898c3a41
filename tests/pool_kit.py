"""What the tests of several models in one server share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

import redwood
from redwood import Engine, NgramDrafter
from redwood.server.auth import Keys
from redwood.server.kv_capacity import token_bytes
from redwood.server.listening import address_of, listen
from redwood.server.metrics import Metrics
from redwood.server.models.entry import Model, ModelSpec
from redwood.server.models.pool import Pool
from redwood.server.models.room import Room
from redwood.server.run import Runner
from redwood.server.service import Service
from redwood.server.settings import Settings
from server_kit import CHAT, PATIENCE_S, Staged, known_answer, wait_for

MIB = 2**20


@dataclass(frozen=True)
class SteadyRoom(Room):
    """Room in which a model takes what was predicted: tiny ones are less than a process's noise."""

    def held(self) -> int:
        return 0


class Stock:
    """A model on disk: what loading it does is up to the test.

    Attributes: `loads`: how often it was begun; `fault`: raised by it; `stages`: the models that
    were handed out, the last one last; `need`: bytes it is predicted to take.
    """

    def __init__(self, base: Engine, need: int = 100 * MIB) -> None:
        self.base, self.need = base, need
        self.loads = 0
        self.fault: BaseException | None = None
        self.stages: list[Staged] = []
        self._open = threading.Event()
        self._open.set()

    def pause(self) -> None:
        """Stops loading in the middle."""
        self._open.clear()

    def go_on(self) -> None:
        """Lets it go on."""
        self._open.set()

    def load(self) -> Engine:
        self.loads += 1
        self._open.wait(PATIENCE_S)
        if self.fault is not None:
            raise self.fault
        self.stages.append(Staged(self.base.target))
        return Engine(
            self.stages[-1],  # type: ignore[arg-type]
            NgramDrafter(),
            tokenizer=self.base.tokenizer,
            eos_ids=sorted(self.base.eos_ids),
            budget=6,
            max_rows=4,
        )


class LivePool:
    """A server with several models on a port of its own, in a thread; the first model is loaded.

    Args:
        stocks: the models by name.
        most: bytes that they may take together.
        rows: of `Pool`.
    """

    def __init__(
        self,
        stocks: dict[str, Stock],
        most: int | None = None,
        idle_s: float | None = None,
        keys: tuple[str, ...] = (),
        rows: int = 64,
        **settings: Any,
    ) -> None:
        self.stocks = stocks
        options = {"model_names": tuple(stocks), "port": 0, "drain_timeout_s": 5.0, **settings}
        self.settings = Settings(**options)
        known = Keys(keys)

        def spec(name: str, stock: Stock) -> ModelSpec:
            own = replace(self.settings, model_names=(name,))

            def serve(engine: Engine, metrics: Metrics, share: float) -> Service:
                return Service(engine, own, known, share=share, metrics=metrics)

            return ModelSpec(own, stock.load, serve, lambda: stock.need)

        specs = [spec(name, stock) for name, stock in stocks.items()]
        self.pool = Pool(specs, self.settings, known, SteadyRoom(most, len(specs)), idle_s, rows)
        self.pool.adopt(next(iter(stocks.values())).load())
        self.listener = listen(self.settings)
        self.url = address_of(self.listener)
        self.runner = Runner(self.pool, self.listener)
        self.code: int | None = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        assert self.runner.started.wait(PATIENCE_S)
        headers = {"authorization": f"Bearer {keys[0]}"} if keys else {}
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE_S, headers=headers)

    def _run(self) -> None:
        self.code = self.runner.run()

    def stop(self) -> None:
        """Drains and ends."""
        for stock in self.stocks.values():
            stock.go_on()
            for stage in stock.stages:
                stage.go_on()
        self.http.close()
        self.runner.stop()
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive()
        self.listener.close()

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def model(self, name: str) -> Model:
        return next(model for model in self.pool.models if model.name == name)

    def states(self) -> dict[str, str]:
        """The state of each model, as /health says it."""
        return dict(self.http.get("/health").json()["models"])

    def chat(self, model: str | None, **changes: Any) -> httpx.Response:
        body = {k: v for k, v in {**CHAT, "model": model, **changes}.items() if v is not None}
        return self.http.post("/v1/chat/completions", json=body)

    def text(self, model: str | None, **changes: Any) -> str:
        response = self.chat(model, **changes)
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["message"]["content"])

    def in_background(self, model: str, **changes: Any) -> Asked:
        return Asked(lambda: self.chat(model, **changes))

    def metric(self, line: str) -> float:
        for found in self.http.get("/metrics").text.splitlines():
            name, _, value = found.rpartition(" ")
            if name == line:
                return float(value)
        return 0.0

    def wait_for_state(self, name: str, state: str) -> None:
        wait_for(lambda: self.model(name).state == state, f"{name} {state}")

    def all_right(self) -> None:
        """After a fault: healthy, idle, and each model gives its own known answer."""
        wait_for(lambda: not self.pool.num_open, "an idle server")
        assert self.http.get("/health").status_code == 200
        for name, stock in self.stocks.items():
            stock.fault = None
            self.model(name).fault = None
            assert self.text(name) == known_answer(stock.base)
        wait_for(lambda: not self.pool.num_open, "an idle server")
        assert not self.pool.num_entering


class Asked:
    """A request that is made in a thread; its response, or None if it raised."""

    def __init__(self, ask: Callable[[], httpx.Response]) -> None:
        self._response: httpx.Response | None = None

        def run() -> None:
            self._response = ask()

        self._thread = threading.Thread(target=run)
        self._thread.start()

    @property
    def waits(self) -> bool:
        return self._thread.is_alive()

    def response(self) -> httpx.Response:
        self._thread.join(PATIENCE_S)
        assert self._response is not None
        return self._response


@pytest.fixture(scope="session")
def other_engine(tiny_draft_folder: Path) -> Engine:
    """An engine of another model than `tiny_engine`'s, with other answers."""
    engine = redwood.load(str(tiny_draft_folder), backend="eager")
    token_bytes(engine.target)
    return engine


@pytest.fixture
def pool(tiny_engine: Engine, other_engine: Engine) -> Iterator[Callable[..., LivePool]]:
    """Starts servers of the models a, b and c, of 100 MiB each; c is a again."""
    started: list[LivePool] = []

    def start(names: str = "ab", **options: Any) -> LivePool:
        bases = {"a": tiny_engine, "b": other_engine, "c": tiny_engine}
        started.append(LivePool({name: Stock(bases[name]) for name in names}, **options))
        return started[-1]

    yield start
    for each in started:
        each.stop()
