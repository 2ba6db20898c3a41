"""Two replicas on Ray Serve: one killed in the middle of 200 streams, and all replaced under load.

    python benchmarks/serving/replicas.py

Starts `redwood deploy --run`, streams every request once undisturbed, which gives the texts that
are right (temperature 0), then again while the process of one replica gets SIGKILL, then again
while the application is deployed anew. Each answer must be that text, complete, or end with exactly
one error: as a response, or as a last event after a part of that text. Needs `redwood[ray]`.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
from cases import user
from load import OPEN
from raw import Wire, parse, request
from running import Server, add_server, save, serving, setting

import redwood

CHAT = "/v1/chat/completions"
_PATIENCE_S = 120.0  # for one answer: beyond it hangs
_BACK_S = 90.0
_DEPLOY = """
import json, sys, ray
from ray import serve
from redwood.server.replicas import application
ray.init(address="auto", logging_level="ERROR", log_to_driver=False)
serve.run(application(json.loads(sys.argv[1])), name="redwood", route_prefix="/")
"""


def body(index: int, most: int) -> dict[str, Any]:
    """A request of its own kind."""
    text = f"{OPEN[index % len(OPEN)]} This is question {index}."
    fixed = {"temperature": 0, "max_tokens": most, "ignore_eos": True, "stream": True}
    return {"messages": [user(text)], **fixed}


async def stream(server: Server, index: int, most: int) -> dict[str, Any]:
    """One answer, however it ends."""
    received, outcome, start = b"", "", time.perf_counter()
    try:
        async with asyncio.timeout(_PATIENCE_S), Wire(server) as wire:
            await wire.send(request(server, CHAT, body(index, most)))
            while part := await wire.read():
                received += part
    except TimeoutError:
        outcome = "hung"
    except ConnectionError:
        outcome = "torn"
    reply = parse(received)
    errors = [each["error"] for each in reply.events if "error" in each]
    said = "".join(
        choice["delta"].get("content") or ""
        for each in reply.events
        for choice in each.get("choices", ())
    )
    if not outcome and not reply.complete:
        outcome = "torn"
    if not outcome and reply.status == 200:
        ended = reply.done if not errors else len(errors) == 1 and "error" in reply.events[-1]
        outcome = ("error event" if errors else "whole") if ended else "torn"
    elif not outcome:
        outcome = "error" if reply.error else "unclear"
        errors = [reply.error] if reply.error else []
    return {
        "index": index,
        "outcome": outcome,
        "text": said,
        "code": errors[0]["code"] if errors else None,
        "status": reply.status,
        "seconds": time.perf_counter() - start,
    }


async def measure(
    server: Server, num: int, concurrency: int, most: int, disturb: Callable[[int], None]
) -> list[dict[str, Any]]:
    """All answers; `disturb` is told after each how many there are."""
    left, found = iter(range(num)), list[dict[str, Any]]()

    async def client() -> None:
        for index in left:
            found.append(await stream(server, index, most))
            disturb(len(found))

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return sorted(found, key=lambda each: int(each["index"]))


def judged(found: Sequence[dict[str, Any]], right: Sequence[str]) -> dict[str, Any]:
    """How the answers ended, and whether what they said was right."""
    kinds = Counter(each["outcome"] for each in found)
    wrong = [
        each["index"]
        for each, text in zip(found, right, strict=True)
        if not (
            each["text"] == text if each["outcome"] == "whole" else text.startswith(each["text"])
        )
    ]
    times = sorted(each["seconds"] for each in found)
    return {
        "answers": len(found),
        "outcomes": dict(kinds),
        "codes": dict(Counter(each["code"] for each in found if each["code"])),
        "wrong_texts": wrong,
        "p50_s": round(times[len(times) // 2], 2),
        "slowest_s": round(times[-1], 2),
        "good": not wrong and set(kinds) <= {"whole", "error event", "error"},
    }


def engines(server: Server) -> list[psutil.Process]:
    """The processes of the replicas."""
    assert server.process is not None
    children = server.process.children(recursive=True)
    return [each for each in children if "redwood:engine" in " ".join(each.cmdline())]


def well(server: Server) -> int:
    """Replicas that answer."""
    states = json.loads(server.get("/health")[1])["replicas"].values()
    return sum(state["status"] == "ok" for state in states)


def back(server: Server, num: int) -> float | None:
    """Seconds until so many replicas are well again; None if that takes too long."""
    start, fewer = time.monotonic(), False
    while time.monotonic() - start < _BACK_S:
        found = well(server)
        fewer = fewer or found < num
        if fewer and found == num:
            return round(time.monotonic() - start, 1)
        time.sleep(0.5)
    return None


def lost(server: Server) -> dict[str, float]:
    """What the router counted."""
    found: Counter[str] = Counter()
    for name, value in server.metrics().items():
        if name.startswith("replica_lost_requests_total"):
            found["begun" if 'answer="begun"' in name else "asked_again"] += int(value)
    return dict(found)


def plan_args(options: argparse.Namespace, more: Sequence[str], port: int) -> str:
    """What the running deployment was made of, as `application` takes it."""
    import yaml

    words = [sys.executable, "-m", "redwood", "deploy", "--port", str(port), *more]
    words += ["--target", options.target, "--drafter", options.drafter]
    words += ["--threads", str(options.threads)]
    printed = subprocess.run(words, capture_output=True, check=True).stdout
    return json.dumps(yaml.safe_load(printed)["applications"][0]["args"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_server(parser)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=24)
    options = parser.parse_args()
    more = ["--replicas", "2", "--replica-cpus", "1", "--max-rows", "8"]
    asked = (options.requests, options.concurrency, options.max_tokens)
    lines: dict[str, Any] = {}
    with serving(options, [*more, "--run"], command="deploy") as server:
        undisturbed = asyncio.run(measure(server, *asked, lambda done: None))
        right = [each["text"] for each in undisturbed]
        lines["undisturbed"] = judged(undisturbed, right)
        print(lines["undisturbed"], flush=True)

        waits = list[float | None]()
        watching = threading.Thread(target=lambda: waits.append(back(server, 2)))

        def kill(done: int) -> None:
            if done == options.requests // 3:
                engines(server)[0].send_signal(signal.SIGKILL)
                watching.start()

        found = asyncio.run(measure(server, *asked, kill))
        watching.join()
        lines["killed"] = {
            **judged(found, right),
            "lost": lost(server),
            "both_well_after_s": waits[0],
        }
        print(lines["killed"], flush=True)

        args = plan_args(options, more, server.port)
        before, deployed = {each.pid for each in engines(server)}, list[float]()

        def deploy() -> None:
            start = time.monotonic()
            subprocess.run([sys.executable, "-c", _DEPLOY, args], check=True)
            deployed.append(round(time.monotonic() - start, 1))

        updating = threading.Thread(target=deploy)
        found = asyncio.run(
            measure(server, *asked, lambda done: updating.start() if done == 20 else None)
        )
        updating.join()
        lines["updated"] = {
            **judged(found, right),
            "new_processes": len({each.pid for each in engines(server)} - before),
            "took_s": deployed[0] if deployed else None,
        }
        print(lines["updated"], flush=True)
    facts: dict[str, Any] = {
        name: getattr(options, name) for name in ("requests", "concurrency", "max_tokens")
    }
    files = sorted((Path(redwood.__file__).parent / "replicas").glob("*.py"))
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    facts |= {"deploy": " ".join(more), "replicas_files_sha256": digest[:16]}
    save("replicas", {**lines, **facts, **setting("ray")})
    if not all(line["good"] for line in lines.values()):
        raise SystemExit("an answer was wrong, torn, or never came")


if __name__ == "__main__":
    main()
