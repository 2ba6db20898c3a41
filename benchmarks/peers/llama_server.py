"""llama.cpp's server as a peer, one process a mode: see README.md.

`prompt_ms` of the server is the time to the first token, which comes out of the prefill; a draft
model's prefill is in it. Speeds count the tokens after the first.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import time
import urllib.request
from pathlib import Path
from typing import Any

from peers.process import PAUSE, Process, watched

MODES = {
    "ngram-simple": "--spec-ngram-simple-size-n 3 --spec-ngram-simple-size-m 8",
    "ngram-map-k": "--spec-ngram-map-k-size-n 3 --spec-ngram-map-k-size-m 8",
    "ngram-mod": "--spec-ngram-mod-n-match 4 --spec-ngram-mod-n-min 2 --spec-ngram-mod-n-max 8",
    "ngram-cache": "",
    "draft-simple": "--spec-draft-n-max 4",
}
# A new server for every prompt: in llama.cpp 0.5.0-dev, ngram-cache counts tokens on from the last
# request (`cache_size` in common/speculative.cpp), and so does not see a new prompt.
FORGETFUL = {"ngram-cache"}


class Server(Process):
    """llama-server in one mode."""

    def __init__(self, command: list[str], restart: bool) -> None:
        super().__init__(command)
        self.restart = restart

    def start(self, ids: list[int]) -> None:
        """Starts it, waits for it, runs a few tokens, and stops it until its turn."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        self.launch("--host", "127.0.0.1", "--port", str(port))
        while True:
            try:
                urllib.request.urlopen(f"{self.address}/health", timeout=5).close()
                break
            except OSError as error:  # not listening yet, or 503: still loading
                assert self.popen is not None
                if self.popen.poll() is not None:
                    raise self.failed(error) from error
            time.sleep(0.05)
        self.complete(ids, {"n_predict": 4, "temperature": 0})
        os.kill(self.pid, signal.SIGSTOP)

    def complete(self, ids: list[int], options: dict[str, Any]) -> dict[str, Any]:
        body = {"prompt": ids, "cache_prompt": False, "return_tokens": True, **options}
        data = json.dumps(body).encode()
        try:
            with urllib.request.urlopen(f"{self.address}/completion", data) as answer:
                return dict(json.load(answer))
        except OSError as error:
            raise self.failed(error) from error

    def turn(self, ids: list[int], options: dict[str, Any]) -> dict[str, Any]:
        if self.popen is None:
            self.start(ids[:4])
        time.sleep(PAUSE)
        with self.awake():
            answer, others = watched(self.pid, lambda: self.complete(ids, options))
        if self.restart:
            self.stop()
        times = answer["timings"]
        if times["prompt_n"] != len(ids):
            raise SystemExit(f"llama-server read {times['prompt_n']} of {len(ids)} prompt tokens")
        decoded = times["predicted_n"] - 1
        passes = decoded - times.get("draft_n_accepted", 0)
        made = {"token_ids": answer["tokens"], "others": others, "timings": times}
        made["tokens_per_s"] = 1e3 * decoded / times["predicted_ms"] if decoded else 0.0
        made |= {"first_ms": times["prompt_ms"], "decode_ms": times["predicted_ms"]}
        made |= {"passes": passes, "decoded": decoded, "per_pass": decoded / max(passes, 1)}
        return made | {"whole_ms": times["prompt_ms"] + times["predicted_ms"]}


def command(mode: str, base: list[str], draft: Path | None, threads: int) -> list[str]:
    """The server's command for a mode: types joined with +, then options for this one."""
    name, *more = shlex.split(mode)
    types = [] if name == "plain" else name.split("+")
    if not set(types) <= set(MODES) - ({"draft-simple"} if draft is None else set()):
        raise SystemExit(f"mode {name!r}: plain, {', '.join(MODES)} (with a draft), joined with +")
    made = [*base, *(["--spec-type", ",".join(types)] if types else [])]
    made += [option for kind in types for option in MODES[kind].split()]
    if "draft-simple" in types:
        made += ["-md", str(draft), "-td", str(threads), "-tbd", str(threads)]
    return made + more
