"""A JSON-lines server that times llama.cpp's forward pass, a peer to measure Redwood against.

It runs inside the environment that README.md beside it describes and knows nothing of Redwood, so
that another program can hold one of these processes open and alternate its measurements with it.
One JSON object per line comes in on stdin, one per line goes out on stdout:

    python benchmarks/peers/llama_cpp.py --model X.gguf --threads 2 --context 2048

    {"do": "info"}                                      versions, CPU features, sizes
    {"do": "tokenize", "text": "..."}                   {"ids": [...]}
    {"do": "prefill", "ids": [...]}                     {"ms": ...}; the ids become the context
    {"do": "step", "nodes": n, "repeat": r}             {"ms": [...]}; the context stays as it was
    {"do": "logits", "ids": [...], "chunk": 512}        {"nll": ..., "count": ..., "top1": [...]}
    {"do": "generate", "ids": [...], "max_tokens": m}   {"ids": [...], "seconds": ...}
    {"do": "quit"}

A command that cannot be carried out is answered by {"error": "..."} and the server goes on. Only
llama_decode and llama_synchronize are timed; filling the batch is not. After its last decode an
OpenMP thread spins for some milliseconds: a caller that alternates should wait before it times
something else.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

# This file has the package's name: without this line, the import below finds the file itself.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]

import llama_cpp as ll  # noqa: E402
import numpy as np  # noqa: E402

UBATCH = 512  # llama.cpp's default; a longer prompt is decoded in pieces of this size


class BadRequest(Exception):
    """A command that cannot be carried out; its text is the answer."""


class Peer:
    """One model and one context, used again and again; the tokens held are positions 0..length."""

    def __init__(self, path: Path, threads: int, context: int, repack: bool) -> None:
        ll.llama_backend_init()
        options = ll.llama_model_default_params()
        options.use_extra_bufts = repack  # the default: weights repacked where there are kernels
        model = ll.llama_model_load_from_file(str(path).encode(), options)
        if not model:
            raise BadRequest(f"llama.cpp cannot load {path} (--log shows why)")
        settings = ll.llama_context_default_params()  # KV in f16, flash attention: auto
        settings.n_ctx = context
        settings.n_batch = settings.n_ubatch = min(UBATCH, context)
        settings.n_threads = settings.n_threads_batch = threads
        self.handle = ll.llama_init_from_model(model, settings)
        if not self.handle:
            raise BadRequest(f"llama.cpp cannot make a context of {context} tokens (see --log)")
        self.vocab = ll.llama_model_get_vocab(model)
        self.memory = ll.llama_get_memory(self.handle)
        self.vocab_size = ll.llama_vocab_n_tokens(self.vocab)
        # llama.cpp rounds the size up; what was asked for is the limit, as it is for the caller.
        self.context = min(context, ll.llama_n_ctx(self.handle))
        self.ubatch = ll.llama_n_ubatch(self.handle)
        self.threads = threads
        self.batch = ll.llama_batch_init(self.ubatch, 0, 1)
        self.length = 0

    def clear(self) -> None:
        ll.llama_memory_clear(self.memory, False)
        self.length = 0

    def decode(self, ids: list[int], outputs: str) -> float:
        """Append up to a ubatch of tokens and return the seconds of it.

        `outputs` says which tokens get logits: "all", "last" or "none".
        """
        batch, last = self.batch, len(ids) - 1
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i] = token
            batch.pos[i] = self.length + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = outputs == "all" or (outputs == "last" and i == last)
        start = time.perf_counter()
        code = ll.llama_decode(self.handle, batch)
        ll.llama_synchronize(self.handle)
        seconds = time.perf_counter() - start
        if code != 0:
            self.clear()  # what a failed decode leaves behind is not known
            raise BadRequest(f"llama_decode failed with {code}; the context is empty now")
        self.length += len(ids)
        return seconds

    def fill(self, ids: list[int]) -> float:
        """Make `ids` the whole context, with logits for the last one; the seconds it took."""
        self.clear()
        seconds = 0.0
        for start in range(0, len(ids), self.ubatch):
            part = ids[start : start + self.ubatch]
            seconds += self.decode(part, "last" if start + len(part) == len(ids) else "none")
        return seconds

    def logits(self, rows: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The logits of the last decode; a view that the next decode overwrites."""
        return np.ctypeslib.as_array(ll.llama_get_logits(self.handle), (rows, self.vocab_size))

    def check_ids(self, value: object, room: int) -> list[int]:
        """`value` as a list of 1 to `room` token ids of this vocabulary."""
        if not isinstance(value, list) or not value:
            raise BadRequest("ids must be a non-empty list")
        if any(type(i) is not int or not 0 <= i < self.vocab_size for i in value):
            raise BadRequest(f"ids must be integers from 0 to {self.vocab_size - 1}")
        if len(value) > room:
            raise BadRequest(f"{len(value)} ids do not fit in the {room} tokens there is room for")
        return value

    # The commands.

    def info(self, request: dict[str, Any]) -> dict[str, Any]:
        return {
            "version": ll.__version__,
            "system": ll.llama_print_system_info().decode().strip(),
            "vocabulary": self.vocab_size,
            "context": self.context,
            "ubatch": self.ubatch,
            "threads": self.threads,
        }

    def tokenize(self, request: dict[str, Any]) -> dict[str, Any]:
        """Special tokens in the text are read as such; a BOS is added if the model asks for it."""
        text = request.get("text")
        if not isinstance(text, str):
            raise BadRequest("text must be a string")
        data = text.encode()
        room = len(data) + 8  # no token is shorter than a byte, besides those added at the ends
        tokens = (ll.llama_token * room)()
        count = ll.llama_tokenize(self.vocab, data, len(data), tokens, room, True, True)
        if count < 0:
            raise BadRequest("the text could not be tokenized")
        return {"ids": list(tokens[:count])}

    def prefill(self, request: dict[str, Any]) -> dict[str, Any]:
        return {"ms": 1e3 * self.fill(self.check_ids(request.get("ids"), self.context))}

    def step(self, request: dict[str, Any]) -> dict[str, Any]:
        """Decode `nodes` tokens after the context, with logits for all, `repeat` times.

        This is what verification costs: a chain has as many tokens and outputs as a tree. Without
        `ids`, tokens spread over the vocabulary are taken; which ones does not change the work.
        """
        nodes = positive(request, "nodes")
        repeat = positive(request, "repeat")
        room = min(self.ubatch, self.context - self.length)
        if nodes > room:
            raise BadRequest(f"{nodes} nodes do not fit in the {room} tokens there is room for")
        spread = [i * 7919 % self.vocab_size for i in range(nodes)]
        ids = self.check_ids(request.get("ids", spread), room)
        if len(ids) != nodes:
            raise BadRequest(f"{nodes} nodes need as many ids, not {len(ids)}")
        times, before = [], self.length
        for _ in range(repeat):
            times.append(1e3 * self.decode(ids, "all"))
            if not ll.llama_memory_seq_rm(self.memory, 0, before, -1):
                self.clear()
                raise BadRequest("this model's memory cannot drop single tokens")
            self.length = before
        return {"ms": times}

    def likelihood(self, request: dict[str, Any]) -> dict[str, Any]:
        """Negative log-likelihood (nats) of ids[1:], and the most likely token after each id."""
        ids = self.check_ids(request.get("ids"), self.context)
        chunk = positive(request, "chunk", self.ubatch)
        if chunk > self.ubatch:
            raise BadRequest(f"chunk must be at most {self.ubatch}")
        self.clear()
        nll, top1 = 0.0, []
        for start in range(0, len(ids), chunk):
            part = ids[start : start + chunk]
            self.decode(part, "all")
            rows = self.logits(len(part))
            best = rows.argmax(axis=1)
            top1 += best.tolist()
            for i, following in enumerate(ids[start + 1 : start + 1 + len(part)]):
                row, peak = rows[i].astype(np.float64), float(rows[i, best[i]])
                nll += peak + float(np.log(np.exp(row - peak).sum())) - float(row[following])
        return {"nll": nll, "count": len(ids) - 1, "top1": top1}

    def generate(self, request: dict[str, Any]) -> dict[str, Any]:
        """Greedy decoding, one token a time, until an end token (kept) or `max_tokens`.

        `seconds` is the loop after the prompt with its argmax; `prefill_ms` is the prompt. The
        first id comes from the prompt's logits, so `seconds` covers one decode less than the ids.
        """
        if request.get("mode", "plain") != "plain":
            raise BadRequest("mode must be plain")
        count = positive(request, "max_tokens")
        ids = self.check_ids(request.get("ids"), self.context - count)
        prefill = self.fill(ids)
        start = time.perf_counter()
        made = [int(self.logits(1)[0].argmax())]
        while len(made) < count and not ll.llama_vocab_is_eog(self.vocab, made[-1]):
            self.decode(made[-1:], "last")
            made.append(int(self.logits(1)[0].argmax()))
        seconds = time.perf_counter() - start
        return {"ids": made, "seconds": seconds, "prefill_ms": 1e3 * prefill}


def positive(request: dict[str, Any], key: str, default: int | None = None) -> int:
    value = request.get(key, default)
    if type(value) is not int or value < 1:
        raise BadRequest(f"{key} must be a positive integer")
    return value


def answer(peer: Peer, line: str) -> dict[str, Any] | None:
    """The answer to one line, or None for "quit"."""
    commands: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "info": peer.info,
        "tokenize": peer.tokenize,
        "prefill": peer.prefill,
        "step": peer.step,
        "logits": peer.likelihood,
        "generate": peer.generate,
    }
    try:
        request = json.loads(line)
        if not isinstance(request, dict):
            raise BadRequest("a request is a JSON object")
        name = request.get("do")
        if name == "quit":
            return None
        if not isinstance(name, str) or name not in commands:
            raise BadRequest(f"do must be one of {', '.join(commands)}, quit")
        return commands[name](request)
    except json.JSONDecodeError as error:
        return {"error": f"not JSON: {error}"}
    except BadRequest as error:
        return {"error": str(error)}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadRequest(message)


def main() -> int:
    # llama.cpp may print: its stdout becomes stderr, and the answers have the real one alone.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def say(reply: dict[str, Any]) -> None:
        out.write(json.dumps(reply) + "\n")

    parser = Parser(description="Time llama.cpp by JSON lines; see the top of this file.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--no-repack", action="store_true", help="weights as they are in the file")
    parser.add_argument("--log", action="store_true", help="llama.cpp's own messages on stderr")

    @ll.llama_log_callback
    def log(level: int, text: bytes, data: ctypes.c_void_p) -> None:
        if show:
            sys.stderr.write(text.decode(errors="replace"))

    show = False
    ll.llama_log_set(log, ctypes.c_void_p(0))
    try:
        args = parser.parse_args()
        if args.threads < 1 or args.context < 1:
            raise BadRequest("--threads and --context must be positive")
        if not args.model.is_file():
            raise BadRequest(f"no such file: {args.model}")
        show = args.log
        peer = Peer(args.model, args.threads, args.context, not args.no_repack)
    except BadRequest as error:
        say({"error": str(error)})
        return 1
    for line in sys.stdin:
        if line.strip():
            reply = answer(peer, line)
            if reply is None:
                break
            say(reply)
    return 0


if __name__ == "__main__":
    sys.exit(main())
