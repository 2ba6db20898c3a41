"""What the Python clients share: the facts they are given, and how they report.

Each script here runs one client library against a server, in an environment of its own; see
`../clients.py`, which makes the environments and the facts.
"""

from __future__ import annotations

import json
import os
import time
import traceback
import urllib.request
from collections.abc import Callable
from typing import Any

FACTS = json.loads(os.environ["REDWOOD_FACTS"])
URL, KEY, MODEL = FACTS["url"], FACTS["key"], FACTS["model"]
PLAIN, STOP, SEEDED = FACTS["plain"], FACTS["stop"], FACTS["seeded"]
LONG = [{"role": "user", "content": "Count up from one, for ever."}]
IDLE_S = 2.0


def same(seen: Any, wanted: Any) -> None:
    """Fails with both where they differ."""
    if seen != wanted:
        raise AssertionError(f"{seen!r} is not {wanted!r}")


def rows() -> int:
    """Answers that run or wait in the server."""
    ask = urllib.request.Request(f"{URL}/metrics", headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(ask, timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    names = ("redwood:num_requests_running ", "redwood:num_requests_waiting ")
    return sum(int(float(line.split()[1])) for line in lines if line.startswith(names))


def wait_rows(wanted: bool) -> float:
    """Seconds until a row is in use, or none is."""
    start = time.monotonic()
    while bool(rows()) is not wanted:
        if time.monotonic() - start > IDLE_S * (5 if wanted else 1):
            raise AssertionError(f"rows in use: {rows()}")
        time.sleep(0.02)
    return time.monotonic() - start


def fails(error: type[BaseException], call: Callable[[], Any], *words: str) -> None:
    """Checks that a call raises this error, and that its message has these words."""
    try:
        call()
    except error as raised:
        for word in words:
            assert word in str(raised), f"{word!r} is not in {raised}"
        return
    raise AssertionError(f"{error.__name__} was not raised")


def report(version: str, checks: dict[str, Callable[[], Any]]) -> None:
    """Runs the checks and prints a line of JSON for each; what one returns is its note."""
    print(json.dumps({"version": version}), flush=True)
    for name, check in checks.items():
        try:
            note = check()
            told = {"check": name, "ok": True, "note": "" if note is None else str(note)}
        except Exception:
            told = {"check": name, "ok": False, "note": traceback.format_exc(limit=-3)[-1500:]}
        print(json.dumps(told), flush=True)
