"""The native backend against llama.cpp, step by step, on the same GGUF file, in one run.

Times one forward that scores n tokens after a context, in turns: llama.cpp (a process of its own,
`peers/llama_cpp.py`), then Redwood. Beside the medians stand the floors of this machine, read in
the same run: bytes over the best read bandwidth, and multiply-adds over the peak of the
instruction that the kernels use.

    python benchmarks/native.py --model qwen2.5-coder-1.5b-instruct --json out.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from common import setting
from rich.console import Console
from rich.table import Table

import redwood
from redwood.backends.base import AcceptedPath, Nodes
from redwood.models import gguf_path

HERE = Path(__file__).parent
PEER = Path("~/.cache/redwood-peers/llama-venv/bin/python").expanduser()
PAUSE = 0.03  # seconds: the peer's threads go on spinning for a while after a step


class LlamaCpp:
    """A llama.cpp process that answers JSON lines."""

    def __init__(self, python: Path, model: Path, threads: int, context: int) -> None:
        if not python.is_file():
            raise SystemExit(f"{python} is not there: benchmarks/peers/build.py bindings makes it")
        command = [python, HERE / "peers" / "llama_cpp.py", "--model", model]
        command += ["--threads", str(threads), "--context", str(context)]
        self.process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline() or '{"error": "ended"}')
        if "error" in answer:
            raise SystemExit(f"llama.cpp: {answer['error']}")
        return answer


def floors(threads: int) -> dict[str, float]:
    """Best read bandwidth and peak multiply-adds of this machine, now."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "floors"
        source = HERE / "native_floors.cpp"
        subprocess.run(["g++", "-O2", "-mavx2", "-pthread", source, "-o", program], check=True)
        return json.loads(subprocess.run([program, str(threads)], capture_output=True).stdout)


def work(backend: Any) -> tuple[int, int]:
    """Bytes of weights that a forward reads, and multiply-adds per token."""
    spec, sizes = backend.spec, backend.weight_bytes
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    layer = spec.hidden * (2 * q + 2 * kv + 3 * spec.ffn)
    read = sum(size for name, size in sizes.items() if name != "embed" or spec.tied)
    return read, spec.layers * layer + spec.vocab_size * spec.hidden


def step_ms(backend: Any, row: int, tokens: list[int]) -> float:
    start = time.perf_counter()
    backend.extend([Nodes(row, tokens)])
    taken = time.perf_counter() - start
    backend.truncate(row, backend.length(row))
    return taken * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4, 8, 12, 16, 24, 32])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer", type=Path, default=PEER, help="python with llama-cpp-python")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    engine = redwood.load(
        options.model, None, backend="native", threads=options.threads, kv_cache=0
    )
    backend: Any = engine.target
    file = gguf_path(options.model)
    text = (HERE / "prompts" / "editing_dev.jsonl").read_text()
    ids = engine.encode(text)[: max(*options.contexts, options.prefill) + max(options.nodes)]
    peer = LlamaCpp(options.peer, file, options.threads, len(ids) + 64)
    read, macs = work(backend)
    limits = floors(options.threads)
    memory_ms = read / limits["read_gb_s"] / 1e6
    row_ms = macs / limits["macs_ns"] / 1e6
    rows = []

    for context in options.contexts:
        row = backend.open()
        backend.extend([Nodes(row, ids[:context], num_logits=1)])
        backend.commit([AcceptedPath(row, range(context))])
        peer.ask(do="prefill", ids=ids[:context])
        for nodes in options.nodes:
            tokens = ids[context : context + nodes]
            ours, theirs = [], []
            for turn in range(options.repeats + 1):
                time.sleep(PAUSE)
                there = peer.ask(do="step", nodes=nodes, repeat=1, ids=tokens)["ms"][0]
                time.sleep(PAUSE)
                here = step_ms(backend, row, tokens)
                if turn:  # the first builds graphs and tables
                    ours.append(here)
                    theirs.append(there)
            floor = max(memory_ms, nodes * row_ms)
            rows.append(
                {
                    "context": context,
                    "nodes": nodes,
                    "redwood_ms": statistics.median(ours),
                    "redwood_all": ours,
                    "llama_cpp_ms": statistics.median(theirs),
                    "llama_cpp_all": theirs,
                    "ratio": statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
                    "floor_ms": floor,
                }
            )
        backend.release(row)

    ours, theirs = [], []
    for _ in range(3 if options.prefill else 0):
        time.sleep(PAUSE)
        theirs.append(peer.ask(do="prefill", ids=ids[: options.prefill])["ms"])
        time.sleep(PAUSE)
        row = backend.open()
        start = time.perf_counter()
        backend.extend([Nodes(row, ids[: options.prefill], num_logits=1)])
        ours.append((time.perf_counter() - start) * 1e3)
        backend.release(row)
    peer.process.kill()

    table = Table(title=f"{options.model}, {options.threads} threads, {backend.isa}; {limits}")
    for name in ("context", "nodes", "Redwood ms", "llama.cpp ms", "ratio", "over the floor"):
        table.add_column(name, justify="right")
    for r in rows:
        table.add_row(
            str(r["context"]),
            str(r["nodes"]),
            f"{r['redwood_ms']:.1f} ({min(r['redwood_all']):.1f})",
            f"{r['llama_cpp_ms']:.1f} ({min(r['llama_cpp_all']):.1f})",
            f"{r['ratio']:.2f}",
            f"{r['redwood_ms'] / r['floor_ms']:.2f}",
        )
    console = Console(width=100)
    console.print(table)
    prefill = {}
    if ours:
        prefill = {"tokens": options.prefill, "redwood_ms": ours, "llama_cpp_ms": theirs}
        best = min(theirs) / min(ours)
        console.print(
            f"prefill {options.prefill}: {min(ours):.0f} ms, llama.cpp {min(theirs):.0f} ms,"
            f" speed {best:.2f}x"
        )
    if options.json:
        result = {"model": options.model, "threads": options.threads, "isa": backend.isa}
        result |= {"limits": limits, "weights_read": read, "macs_per_token": macs}
        result |= {"steps": rows, "prefill": prefill, "setting": setting()}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
