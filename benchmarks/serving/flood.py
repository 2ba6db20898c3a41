"""Three thousand connections at once, and clients that are killed.

    python benchmarks/serving/flood.py
    python benchmarks/serving/flood.py --connections 300 --kills 5

Of the connections, those for which there is neither a row nor a place in the queue must get 429
with Retry-After, all others the right answer. A client killed (SIGKILL) at any byte must free its
row within a second.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from cases import Case, known, user
from raw import Reply, ask, request
from running import Server, add_server, save, serving, setting

CHAT = "/v1/chat/completions"
ROW_S = 1.0
CLIENT = """
import socket, sys, time
host, port, sent, wanted = sys.argv[1], *map(int, sys.argv[2:])
data = sys.stdin.buffer.read()
made = socket.create_connection((host, port))
made.sendall(data[:sent])
while wanted > 0 and (part := made.recv(wanted)):
    wanted -= len(part)
print("there", flush=True)
time.sleep(600)
"""


async def flood(server: Server, cases: Sequence[Case], num: int, wait_s: float) -> dict[str, Any]:
    """Opens all connections at once; each sends one request."""
    open_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if open_files < num + 100:
        raise SystemExit(f"only {open_files} open files are allowed: ulimit -n {num + 100}")
    counts: Counter[str] = Counter()
    notes: list[str] = []
    refused: list[float] = []
    start = time.monotonic()

    async def one(index: int) -> None:
        case = cases[index % len(cases)]
        stream = index % 2 == 0
        begun = time.monotonic()
        data = request(server, case.path, case.changed(stream=stream))
        reply = await ask(server, data, wait_s)
        result = judged(reply, case, stream)
        counts[result] += 1
        if result == "429":
            refused.append(time.monotonic() - begun)
        if "!" in result:
            notes.append(f"{result} {reply.status} {reply.body[:300]!r}")

    await asyncio.gather(*(one(index) for index in range(num)))
    refused.sort()
    return {
        "connections": num,
        "results": dict(counts),
        "seconds": round(time.monotonic() - start, 1),
        "refused_after_s": {
            name: round(refused[int(share * (len(refused) - 1))], 2) if refused else None
            for name, share in (("p50", 0.5), ("p99", 0.99), ("most", 1.0))
        },
        "notes": notes[:20],
    }


def judged(reply: Reply, case: Case, stream: bool) -> str:
    """What a connection got; with a ! where it may not."""
    if reply.status == 429 and reply.complete and reply.error:
        return "429" if reply.headers.get("retry-after", "").isdigit() else "429 without a time!"
    if reply.status == 200 and reply.complete and (reply.done or not stream):
        return "right" if reply.texts() == case.texts else "wrong text!"
    return f"{reply.status}!" if reply.status else "no answer!"


def kills(server: Server, num: int, seed: int) -> dict[str, Any]:
    """Kills clients at random bytes; returns how long their rows stayed in use."""
    rng = random.Random(seed)
    results: Counter[str] = Counter()
    times: list[float] = []
    for _ in range(num):
        stream = rng.random() < 0.6
        body = {"messages": [user("Count up for ever.")], "stream": stream, "ignore_eos": True}
        data = request(server, CHAT, body)
        sent = len(data) if rng.random() < 0.8 else rng.randrange(len(data))
        read = rng.randrange(0, 8000) if stream and sent == len(data) else 0
        command = [sys.executable, "-S", "-E", "-c", CLIENT, server.host, str(server.port)]
        command += [str(sent), str(read)]
        client = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert client.stdin is not None and client.stdout is not None
        client.stdin.write(data)
        client.stdin.close()
        client.stdout.readline()
        if sent == len(data) and not read:
            time.sleep(rng.random() * 0.3)  # anywhere between arrival and decoding
        busy = server.rows() != (0, 0)
        client.kill()
        taken = server.idle_within(5)
        client.wait()
        client.stdout.close()
        results[("in use" if busy else "not in use") + (", streamed" if stream else ", whole")] += 1
        if taken is None:
            results["row kept for five seconds!"] += 1
        elif busy:
            times.append(taken)
    times.sort()
    late = sum(taken > ROW_S for taken in times)
    return {
        "kills": num,
        "results": dict(results),
        "row_free_after_s": {"median": times[len(times) // 2], "most": times[-1]} if times else {},
        "later_than_a_second": late + results["row kept for five seconds!"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_server(parser)
    parser.add_argument("--connections", type=int, default=3000)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--wait", type=float, default=280.0, help="seconds for an answer")
    parser.add_argument("--name", default="flood", help="of the result file")
    options = parser.parse_args()
    cases = known(options.target, options.drafter)
    short = [case for case in cases if case.body["max_tokens"] == 8 and "n" not in case.body]
    with serving(options) as server:
        asyncio.run(ask(server, request(server, short[0].path, short[0].body)))
        before = server.facts()
        flooded = asyncio.run(flood(server, short, options.connections, options.wait))
        idle_s = server.idle_within(10)
        print(flooded, f"idle after {idle_s} s", flush=True)
        killed = kills(server, options.kills, options.seed)
        print(killed)
        time.sleep(6)  # the server closes lingering connections after five seconds
        after = server.facts()
        last = asyncio.run(ask(server, request(server, short[0].path, short[0].body)))
        trouble = server.log_lines("Traceback", " error ", " critical ")
    right = judged(last, short[0], stream=False) == "right"
    result = {
        "setting": setting(),
        "flood": flooded,
        "idle_after_s": idle_s,
        "kills": killed,
        "right_afterwards": right,
        "process_before": before,
        "process_after": after,
        "log_trouble": trouble[:20],
        "exit_code": server.exit_code,
    }
    save(options.name, result)
    print(before, after, "right afterwards" if right else "WRONG AFTERWARDS", trouble[:5])
    bad = any("!" in name for name in flooded["results"]) or killed["later_than_a_second"]
    sys.exit(1 if bad or not right or idle_s is None else 0)


if __name__ == "__main__":
    main()
