"""Many clients at once, rude ones among them: nobody hangs, no text is wrong, nothing is left over.

REDWOOD_FLOOD sets the number of requests (2000).
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import socket
import time
from collections import Counter
from collections.abc import Callable

import psutil
import pytest

from server_kit import CHAT, Live, known_answer, wait_for

pytestmark = pytest.mark.slow
FLOOD = int(os.environ.get("REDWOOD_FLOOD", "2000"))
WAVE = 500
BODY = json.dumps(CHAT).encode()
LONG = json.dumps({**CHAT, "max_tokens": 200, "ignore_eos": True, "stream": True}).encode()


def request(body: bytes) -> bytes:
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def ask(port: int, times: list[float]) -> tuple[int, str]:
    """Status and text of one request."""
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request(BODY))
    answer = await asyncio.wait_for(reader.read(-1), 120)
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split()[1])
    if status != 200:
        times.append(time.perf_counter() - start)
        assert b"retry-after" in head
        return status, ""
    return status, json.loads(body)["choices"][0]["message"]["content"]


async def leave(port: int) -> None:
    """Breaks off after the first text."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request(LONG))
    await asyncio.wait_for(reader.read(300), 60)
    writer.close()


async def flood(port: int, times: list[float]) -> Counter[tuple[int, str]]:
    found: Counter[tuple[int, str]] = Counter()
    for start in range(0, FLOOD, WAVE):
        rude = [leave(port) for _ in range(10)]
        asked = [ask(port, times) for _ in range(min(WAVE, FLOOD - start))]
        answers = await asyncio.gather(*asked, *rude)
        found.update(each for each in answers if each is not None)
    return found


def test_a_flood_with_rude_clients(live: Callable[..., Live]) -> None:
    server = live(rows=16, max_queue=64, send_timeout_s=1.0, queue_timeout_s=100)
    right = known_answer(server.engine)
    process = psutil.Process()
    stalled = []
    server.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    asyncio.run(flood(server.port, []))  # warm: what is allocated once is not a leak
    gc.collect()
    memory, files = process.memory_info().rss, process.num_fds()
    for _ in range(20):  # readers that never read
        stalled.append(socket.create_connection(("127.0.0.1", server.port)))
        stalled[-1].sendall(request(LONG))
    times: list[float] = []
    start = time.perf_counter()
    found = asyncio.run(flood(server.port, times))
    seconds = time.perf_counter() - start
    for each in stalled:
        each.close()
    codes = Counter[int]()
    for (status, text), count in found.items():
        codes[status] += count
        assert status != 200 or text == right
    assert set(codes) <= {200, 429} and codes[200] >= 80
    server.alive_and_right()
    wait_for(lambda: process.num_fds() <= files + 2, "closed files")
    gc.collect()
    grown = (process.memory_info().rss - memory) / 2**20
    slowest = sorted(times)[int(len(times) * 0.99)] if times else 0.0
    print(
        f"{FLOOD} requests in waves of {WAVE}: {dict(codes)} in {seconds:.1f} s; 99 % of the "
        f"refusals within {slowest:.2f} s; memory {grown:+.1f} MiB"
    )
    assert grown < 50


def test_stopping_under_load_again_and_again(live: Callable[..., Live]) -> None:
    for _ in range(20):
        server = live(rows=4, drain_timeout_s=0.5)

        async def load(port: int) -> None:
            await asyncio.gather(*(ask(port, []) for _ in range(40)), return_exceptions=True)

        async def both(stop: Callable[[], None], port: int) -> None:
            loading = asyncio.ensure_future(load(port))
            await asyncio.sleep(0.05)
            stop()
            await loading

        asyncio.run(both(server.runner.stop, server.port))
        server.thread.join(120)
        assert not server.thread.is_alive(), "it hangs"
        assert server.code == 0
        assert not server.engine.busy
