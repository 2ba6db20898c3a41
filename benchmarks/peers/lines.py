"""The peer's side of JSON lines: one object a line comes in, one answer a line goes out.

The peers' environments know nothing of Redwood, so this uses the standard library alone.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

Command = Callable[[dict[str, Any]], dict[str, Any]]


def serve(load: Callable[[], dict[str, Command]]) -> None:
    """Loads the peer, says so by an empty answer, and answers requests until the input ends.

    What goes wrong is answered by {"error": "..."}; only what went wrong in loading ends it.
    """
    # Libraries may print: their stdout becomes stderr, and the answers have the real one alone.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        out.write(json.dumps(answer) + "\n")

    commands = load()
    say({})
    for line in sys.stdin:
        say(_answer(commands, line))


def _answer(commands: dict[str, Command], line: str) -> dict[str, Any]:
    try:
        request = json.loads(line)
        return commands[request["do"]](request)
    except Exception as error:  # of libraries of all kinds
        return {"error": f"{type(error).__name__}: {error}"}
