"""Requests that nobody means: schemathesis, and ten thousand of our own.

    python benchmarks/serving/fuzz.py                      # both
    python benchmarks/serving/fuzz.py --parts own --num 500

None may get a 500 or hang, and afterwards no row is in use and a known prompt gets its known
answer.
Schemathesis runs in an environment of its own (see clients.py) against the OpenAPI document.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from cases import Case, known
from clients import environment
from mutations import Mutations
from raw import Reply, ask, request
from running import Server, add_server, save, serving, setting

SERVER_OPTIONS = "--capacity 512 --max-output-tokens 4 --max-body-bytes 65536".split()
HANG_S = 60.0
AT_ONCE = 8


def own(server: Server, num: int, seed: int) -> dict[str, Any]:
    """Sends mutated requests; returns what came of them."""
    return asyncio.run(_own(server, Mutations(server, seed), num))


async def _own(server: Server, mutations: Mutations, num: int) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    bad: list[dict[str, str]] = []
    slowest = 0.0
    left = num

    async def worker() -> None:
        nonlocal left, slowest
        while left > 0:
            left -= 1
            name, data = mutations.next()
            start = time.monotonic()
            reply = await ask(server, data, HANG_S)
            taken = time.monotonic() - start
            slowest = max(slowest, taken)
            result = judged(reply, head=data.startswith(b"HEAD"))
            counts[f"{name}: {result}"] += 1
            if "!" in result:
                shown = {"request": repr(data[:3000]), "reply": repr(reply.body[:500])}
                bad.append({"kind": name, "result": result, "seconds": f"{taken:.1f}", **shown})

    await asyncio.gather(*(worker() for _ in range(AT_ONCE)))
    statuses = Counter[str]()
    for name, count in counts.items():
        statuses[name.partition(": ")[2]] += count
    return {
        "requests": counts.total(),
        "results": dict(sorted(statuses.items())),
        "by_kind": dict(sorted(counts.items())),
        "slowest_s": round(slowest, 3),
        "bad": bad[:30],
        "num_bad": len(bad),
    }


def judged(reply: Reply, *, head: bool) -> str:
    """What a reply is; with a ! where it may not be."""
    if not reply.status:
        return "no answer!"
    if reply.status >= 500:
        return f"{reply.status}!"
    if head:
        return f"{reply.status}"
    if not reply.complete:
        return f"{reply.status} cut off!"
    if reply.status == 200:
        broken = reply.error is not None
        return "200 with an error!" if broken else "200"
    if reply.error or (reply.status == 307 and reply.headers.get("location")):
        return f"{reply.status}"
    plain = reply.headers.get("content-type", "").startswith("text/plain")
    return f"{reply.status} of the parser" if plain and reply.status == 400 else "no error object!"


def schemathesis(server: Server, examples: int, most_s: int) -> dict[str, Any]:
    """Runs schemathesis with all its checks against the OpenAPI document."""
    program = environment("fuzz").parent / "schemathesis"
    with tempfile.TemporaryDirectory() as folder:
        document, report = Path(folder) / "openapi.json", Path(folder) / "report.json"
        document.write_bytes(server.get("/openapi.json")[1])
        command = f"""{program} run {document} --url {server.url} --checks all --seed 1
            --max-examples {examples} --max-time {most_s} --request-timeout 60 --no-color
            --generation-database none --suppress-health-check all --continue-on-failure
            --report json --report-json-path {report}""".split()
        command += ["--header", f"Authorization: Bearer {server.key}"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        told = json.loads(report.read_text())
    print("\n".join(done.stdout.splitlines()[-40:]))
    kinds = Counter[str](each["type"] for each in told["failures"])
    return {
        "test_cases": told["test_cases"],
        "failures": [
            {name: each.get(name) for name in ("type", "title", "count", "operations")}
            for each in told["failures"]
        ],
        "num_bad": kinds["ServerError"] + told["test_cases"]["errored"],
        "stop_reason": told.get("stop_reason"),
    }


def alive_and_right(server: Server, case: Case) -> str | None:
    """What is wrong afterwards, None if nothing is."""
    if server.idle_within(5) is None:
        return f"rows in use: {server.rows()}"
    if server.get("/health")[0] != 200:
        return "not healthy"
    body = {**case.body, "max_tokens": 4}
    reply = asyncio.run(ask(server, request(server, case.path, body)))
    if reply.status != 200 or not case.texts[0].startswith(reply.texts()[0]):
        return f"wrong answer: {reply.body[:500]!r}"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_server(parser)
    parser.add_argument("--parts", nargs="+", default=["own", "schemathesis"])
    parser.add_argument("--num", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--examples", type=int, default=150, help="of schemathesis, per route")
    parser.add_argument("--most", type=int, default=240, help="seconds for schemathesis")
    parser.add_argument("--name", default="fuzz", help="of the result file")
    options = parser.parse_args()
    if "schemathesis" in options.parts:
        environment("fuzz")
    cases = known(options.target, options.drafter)
    case = next(c for c in cases if "stop" not in c.body and c.body["temperature"] == 0.0)
    result: dict[str, Any] = {"setting": setting(), "server_options": SERVER_OPTIONS}
    wrong: list[str] = []
    with serving(options, SERVER_OPTIONS) as server:
        for part in options.parts:
            before, start = server.facts(), time.monotonic()
            if part == "own":
                found = own(server, options.num, options.seed)
            else:
                found = schemathesis(server, options.examples, options.most)
            found["seconds"] = round(time.monotonic() - start, 1)
            found["process_before"], found["process_after"] = before, server.facts()
            if trouble := alive_and_right(server, case):
                wrong.append(f"{part}: {trouble}")
            print({k: v for k, v in found.items() if k not in ("bad", "by_kind")})
            for each in found.get("bad", ())[:5]:
                print(each)
            result[part] = found
        result["log_trouble"] = server.log_lines("Traceback", " error ", " critical ")[:20]
    result["exit_code"], result["wrong_afterwards"] = server.exit_code, wrong
    save(options.name, result)
    print("\n".join(result["log_trouble"]))
    bad = sum(result[part]["num_bad"] for part in options.parts)
    sys.exit(1 if bad or wrong else 0)


if __name__ == "__main__":
    main()
