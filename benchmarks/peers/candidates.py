"""Who takes part: names of candidates, what they need, and how each takes its turn.

A candidate is a group and a mode: "Redwood ngram", "hf-float32 assisted", "openvino lookup 5",
"llama.cpp ngram-mod --spec-ngram-mod-n-max 16". All modes of a group run the same weights, and the
group's plain mode is what their texts must be equal to. A number is the tokens of one draft.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from peers import llama_server, places
from peers.process import PAUSE, LinesPeer, watched

from redwood import SamplingParams
from redwood.bench.interleave import Candidate, run
from redwood.models import locate, resolve

Turn = Callable[[list[int]], dict[str, Any]]
HERE = Path(__file__).parent
PAIRS = {
    "smollm2": ("smollm2-135m-instruct", None),
    "qwen": ("qwen2.5-coder-1.5b-instruct", "qwen2.5-coder-0.5b-instruct"),
}
GROUPS = ("hf-float32", "hf-bfloat16", "openvino", "openvino-gguf", "llama.cpp")
WARM_UP = 8  # tokens
ROOM_BYTES = 1 << 30


@dataclass
class Field:
    """What all candidates have in common."""

    target: str
    draft: str | None
    prompts: list[list[int]]
    end_ids: list[int]
    params: SamplingParams
    threads: int
    stack: ExitStack
    turns: dict[str, Turn] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)
    _peers: dict[str, LinesPeer] = field(default_factory=dict)

    def add(self, name: str) -> None:
        """Starts a peer's candidate, or adds a mode to its process."""
        group, _, mode = name.partition(" ")
        if group == "llama.cpp":
            self._add_server(name, mode)
        elif group in GROUPS:
            self._add_lines(name, group, mode)
        else:
            raise SystemExit(f"no peer {group!r}: {', '.join(GROUPS)}")
        left = available_bytes()
        if left < ROOM_BYTES:
            raise SystemExit(f"{left >> 20} MiB are left after {name}: leave out some --modes")

    def add_redwood(self, engine: Any, candidate: Candidate) -> None:
        name = f"Redwood {candidate.name}"
        if candidate.name != "none":
            name += " auto" if candidate.planner is not None else f" {candidate.budget}"
        self.turns[name] = partial(redwood_turn, engine, candidate, self.params)
        self.weights["Redwood"] = _file_weights(self.target)
        run(engine, candidate, self.prompts[0], replace(self.params, max_tokens=WARM_UP))

    def versions(self) -> dict[str, str]:
        return {group: peer.info["version"] for group, peer in self._peers.items()}

    def _add_lines(self, name: str, group: str, mode: str) -> None:
        kind, _, draft = mode.partition(" ")
        if group not in self._peers:
            peer = LinesPeer(self._command(group))
            self.stack.callback(peer.stop)
            peer.start()
            self._peers[group], self.weights[group] = peer, peer.info["weights"]
        request = {"mode": kind, "draft": int(draft) if draft else None, "end_ids": self.end_ids}
        request["temperature"] = self.params.temperature
        peer = self._peers[group]
        peer.warm_up(self.prompts[0], max_tokens=WARM_UP, **request)
        self.turns[name] = partial(peer.turn, max_tokens=self.params.max_tokens, **request)

    def _command(self, group: str) -> list[str]:
        """The program of a peer that answers JSON lines."""
        models = {"--target": self.target, "--draft": self.draft}
        if group.startswith("hf-"):
            python, script = Path(sys.executable), "hf.py"
            folders = {key: resolve(name) for key, name in models.items() if name}
            more = ["--dtype", group.removeprefix("hf-")]
        else:
            python, script, more = places.OPENVINO_PYTHON, "genai.py", []
            if group == "openvino":
                folders = {key: places.EXPORTED / name for key, name in models.items() if name}
            else:  # this library reads a GGUF file as a target only
                folders = {"--target": locate(self.target)[1]}
        for path in (python, *folders.values()):
            if not path.exists():
                raise SystemExit(f"{path} is missing: python benchmarks/peers/build.py openvino")
        paths = [text for key, path in folders.items() for text in (key, str(path))]
        return [str(python), str(HERE / script), *paths, *more, "--threads", str(self.threads)]

    def _add_server(self, name: str, mode: str) -> None:
        if not places.LLAMA_SERVER.exists():
            raise SystemExit("llama-server is missing: python benchmarks/peers/build.py llama")
        longest, threads = max(map(len, self.prompts)), str(self.threads)
        context = -(-(longest + self.params.max_tokens + 64) // 256) * 256
        base = [str(places.LLAMA_SERVER), "-m", str(locate(self.target)[1]), "-t", threads]
        base += ["-tb", threads, "-c", str(context), "-np", "1", "--no-ui", "--cache-ram", "0"]
        draft = locate(self.draft)[1] if self.draft else None
        restart = any(kind in mode for kind in llama_server.FORGETFUL)
        command = llama_server.command(mode, base, draft, self.threads)
        server = llama_server.Server(command, restart)
        self.stack.callback(server.stop)
        if not restart:
            server.start(self.prompts[0][:4])
        self.weights["llama.cpp"] = _file_weights(self.target)
        self.turns[name] = partial(server.turn, options=_server_law(self.params))


def default_modes(draft: bool) -> list[str]:
    """Modes that the pair has models for and 24 GiB hold; bfloat16 where processors compute in it.

    Left out are ngram-map-k, a sister of ngram-simple, and lookup on a GGUF file.
    """
    flags = Path("/proc/cpuinfo").read_text()
    groups = ["hf-float32", *(["hf-bfloat16"] if "avx512_bf16" in flags else [])]
    modes = [f"{group} {mode}" for group in (*groups, "openvino") for mode in ("plain", "lookup")]
    if draft:
        modes += [*(f"{group} assisted" for group in groups), "openvino draft"]
    server = ["plain", "ngram-simple", "ngram-mod", "ngram-cache", *(["draft-simple"] * draft)]
    return [*modes, "openvino-gguf plain", *(f"llama.cpp {mode}" for mode in server)]


def default_drafters(draft: str | None) -> list[str]:
    return ["none", "ngram", *([draft, f"{draft}+ngram"] if draft else [])]


def redwood_turn(engine: Any, candidate: Candidate, params: Any, ids: list[int]) -> dict[str, Any]:
    time.sleep(PAUSE)
    arrivals: list[float] = []
    start = time.perf_counter()

    def answer() -> Any:
        return run(engine, candidate, ids, params, lambda _: arrivals.append(time.perf_counter()))

    made, others = watched(os.getpid(), answer)
    whole, stats = time.perf_counter() - start, made.stats
    result = {"token_ids": made.token_ids, "tokens_per_s": stats.tokens_per_s, "others": others}
    result |= {"first_ms": 1e3 * (arrivals[0] - start), "whole_ms": 1e3 * whole}
    result |= {"decode_ms": 1e3 * stats.decode_seconds, "passes": stats.target_passes}
    return result | {"per_pass": stats.mean_acceptance_length, "stats": stats.to_dict()}


def available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def _server_law(params: SamplingParams) -> dict[str, Any]:
    greedy = params.temperature == 0
    law = {"top_k": 1} if greedy else {"top_k": 0, "top_p": 1.0, "min_p": 0.0}  # 1: the quickest
    return {"n_predict": params.max_tokens, "temperature": params.temperature, **law}


def _file_weights(target: str) -> str:
    path = locate(target)[1]
    return path.name if path is not None else target


def plain_of(name: str) -> str:
    """The plain candidate of the same group."""
    group = name.partition(" ")[0]
    return f"{group} {'none' if group == 'Redwood' else 'plain'}"
