"""Large answers to clients that read steadily, but slowly: they must arrive whole.

python benchmarks/serving/slow_link.py
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from typing import Any

from cases import user
from raw import Wire, parse, request
from running import Server, add_server, save, serving, setting

CHAT = "/v1/chat/completions"
EVERY_S = 0.1
BODY = {
    "messages": [user("Count up.")],
    "temperature": 0,
    "max_tokens": 200,
    "logprobs": True,
    "top_logprobs": 20,
    "ignore_eos": True,
}


async def read_slowly(server: Server, num: int, rate: int, connection: str) -> dict[str, Any]:
    """Reads `num` answers, at most `rate` bytes a second, with a small window."""
    data = request(server, CHAT, {**BODY, "n": num}, Connection=connection)
    received, begun, end = b"", 0.0, "closed"
    async with Wire(server, 4096) as wire:
        await wire.send(data)
        try:
            while part := await asyncio.wait_for(wire.read(int(rate * EVERY_S)), 300):
                begun = begun or time.monotonic()
                received += part
                if connection == "keep-alive" and parse(received).complete:
                    end = "complete"
                    break
                await asyncio.sleep(EVERY_S)
        except (ConnectionError, TimeoutError) as error:
            end = type(error).__name__
    reply = parse(received)
    return {
        "choices": num,
        "bytes_per_s": rate,
        "connection": connection,
        "bytes": len(reply.body),
        "announced": int(reply.headers.get("content-length", 0)),
        "complete": reply.complete,
        "end": end,
        "seconds": round(time.monotonic() - begun, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_server(parser)
    parser.add_argument("--choices", type=int, default=12)
    parser.add_argument("--rate", type=int, default=200_000, help="bytes a second")
    options = parser.parse_args()
    lines = []
    with serving(options) as server:
        for num in (1, options.choices):
            for connection in ("close", "keep-alive"):
                made = asyncio.run(read_slowly(server, num, options.rate, connection))
                print(made, flush=True)
                lines.append(made)
        cancelled = {k: v for k, v in server.metrics().items() if "cancelled_total" in k}
    save("slow_link", {"setting": setting(), "lines": lines, "cancelled": cancelled})
    sys.exit(0 if all(line["complete"] for line in lines) else 1)


if __name__ == "__main__":
    main()
