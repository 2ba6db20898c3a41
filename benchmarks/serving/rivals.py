"""The servers of peers.py: how each is started, and what is said to it besides the chat."""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from running import Server, serving

from redwood.models import locate

sys.path.append(str(Path(__file__).parents[1] / "peers"))  # here, `peers` is the command's own name
from places import CACHE, EXPORTED, LLAMA_SERVER, OPENVINO_PYTHON

REDWOOD_PLAIN, COLD = "Redwood, plain", "Redwood, ngram, cold"
WARM = "Redwood, ngram and datastore, warm"
SHIM = "OpenVINO GenAI continuous batching, our HTTP shim"
NO_MODEL_SERVER = (
    "no Python package of it was found; its library is measured behind an HTTP shim of ours "
    "(genai_server.py)"
)
LLAMA_MODES = {  # sizes as in benchmarks/peers/llama_server.py: the defaults are made for GPUs
    "plain": "",
    "ngram-simple": "--spec-ngram-simple-size-n 3 --spec-ngram-simple-size-m 8",
    "ngram-mod": "--spec-ngram-mod-n-match 4 --spec-ngram-mod-n-min 2 --spec-ngram-mod-n-max 8",
}
SLOT = 256  # tokens: contexts of llama.cpp are multiples of it


@dataclass(frozen=True)
class Load:
    """What all servers get.

    Args:
        context: tokens that the longest prompt and its answer may take.
        datastore: answers to other prompts.
    """

    target: str
    threads: int
    max_tokens: int
    context: int
    datastore: Path


@dataclass(frozen=True)
class Rival:
    """A server and the ways it is asked.

    Args:
        ways: name -> fields of the request besides the chat.
    """

    program: str
    ways: dict[str, dict[str, Any]]
    load: Load
    arguments: Sequence[str] = field(default=())

    @property
    def missing(self) -> str | None:
        """Why it cannot take part."""
        if self.program == "llama" and not LLAMA_SERVER.exists():
            return "llama-server is missing: python benchmarks/peers/build.py llama"
        if self.program == "llama" and locate(self.load.target)[1] is None:
            return f"{self.load.target} is no GGUF file"
        paths = (OPENVINO_PYTHON, EXPORTED / self.load.target)
        if self.program == "genai" and not all(path.exists() for path in paths):
            return "its export is missing: python benchmarks/peers/build.py openvino"
        return None

    def start(self, concurrency: int) -> AbstractContextManager[Server]:
        """Runs it for a while, with room for so many at a time."""
        load, threads = self.load, str(self.load.threads)
        if self.program == "redwood":
            drafter = "+".join(["ngram", *self.arguments])
            return serving(redwood_options(load, drafter))
        if self.program == "llama":
            context = -(-load.context // SLOT) * SLOT * concurrency
            words = [LLAMA_SERVER, "-m", locate(load.target)[1], "-t", threads, "-tb", threads]
            words += ["-c", context, "-np", concurrency, "--cont-batching", "--jinja"]
            words += ["--no-ui", "--cache-ram", "0", *self.arguments]
        else:
            words = [OPENVINO_PYTHON, Path(__file__).parent / "genai_server.py"]
            words += ["--model", EXPORTED / load.target, "--threads", threads, *self.arguments]
        return started([str(word) for word in words])


def rivals(load: Load) -> list[Rival]:
    """All of them; those that one server can be are one server."""
    ways = {REDWOOD_PLAIN: {"redwood": {"speculate": False}}, COLD: {}}
    found = [
        Rival("redwood", ways, load),
        Rival("redwood", {WARM: {}}, load, [f"index:{load.datastore}"]),
    ]
    own = {"cache_prompt": False, "top_k": 1}  # no prompt seen twice; the quickest arg-max
    for mode, more in LLAMA_MODES.items():
        words = ["--spec-type", mode, *more.split()] if more else []
        found.append(Rival("llama", {f"llama.cpp, {mode}": own}, load, words))
    for mode, words in (("plain", []), ("prompt lookup", ["--lookup"])):
        found.append(Rival("genai", {f"{SHIM}, {mode}": {}}, load, words))
    return found


def kept_answers(name: str) -> Path:
    """Where a datastore is kept from run to run."""
    return CACHE / f"answers-{name}.index"


def redwood_options(load: Load, drafter: str) -> argparse.Namespace:
    """What `serving` wants to know."""
    about = {"target": load.target, "drafter": drafter, "threads": load.threads}
    return argparse.Namespace(url=None, key="a-key-for-benchmarks", **about)


def make_datastore(load: Load, answers: Sequence[str]) -> None:
    """`redwood index create` of texts."""
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in answers if text)
        file.flush()
        words = [sys.executable, "-m", "redwood", "index", "create", str(load.datastore)]
        subprocess.run([*words, file.name, "--target", load.target], check=True)


class Peer(Server):
    """Not Redwood: it has no /ready."""

    def get(self, path: str) -> tuple[int, bytes]:
        return super().get("/health" if path == "/ready" else path)


@contextmanager
def started(words: Sequence[str]) -> Iterator[Server]:
    """A peer's server on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["setpriv", "--pdeathsig", "KILL", *words, "--port", str(port)]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    with tempfile.NamedTemporaryFile(suffix=".peer.log") as log:
        popen = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        server = Peer(f"http://127.0.0.1:{port}", "none", popen, log.name)
        try:
            server.wait_ready()
            yield server
        except BaseException:
            print("\n".join(server.log_lines("")[-30:]), file=sys.stderr)
            raise
        finally:
            server.stop()
