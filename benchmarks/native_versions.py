"""Two checkouts of Redwood, or two instruction sets of one, in turns on the same model.

Each runs in a process of its own with the compiled module that lies in its `src/redwood` (copy it
there, or build in place). Beside the medians stands the median of the ratios, pair by pair, with
their middle half, since machines are noisy.

    python benchmarks/native_versions.py --baseline ../d50d382 --model qwen2.5-coder-1.5b-instruct
    python benchmarks/native_versions.py --baseline . --baseline-isa avx512vnni --isa amx
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PAUSE = 0.01  # seconds: threads of the other process go to sleep meanwhile


class Side:
    """A process that loads a model with one checkout and times passes when asked."""

    def __init__(self, checkout: Path, isa: str, options: argparse.Namespace) -> None:
        command = [sys.executable, Path(__file__), "--serve", checkout, "--isa", isa]
        command += ["--model", options.model, "--threads", options.threads]
        self.process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.isa: str = self.ask(do="isa")["isa"]

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a process ended; its error stands above")
        answer: dict[str, Any] = json.loads(line)
        return answer


def serve(checkout: Path, options: argparse.Namespace) -> None:
    """The process of one side: answers requests, one JSON line each."""
    # An editable install would bring its own checkout first.
    sys.meta_path[:] = [f for f in sys.meta_path if "ScikitBuild" not in type(f).__name__]
    sys.path.insert(0, str(checkout.resolve() / "src"))
    import redwood
    from redwood.backends import base

    try:
        native_load: Any = import_module("redwood.backends.native.load")
    except ImportError:  # a checkout of the first layout
        native_load = import_module("redwood.backends._native_load")
    kept, Nodes = getattr(base, "AcceptedPath", None) or base.Kept, base.Nodes

    if options.isa != "auto":
        make: Any = native_load.NativeBackend
        native_load.NativeBackend = lambda *a, **more: make(*a, **more | {"isa": options.isa})
    engine = redwood.load(
        options.model, "none", backend="native", threads=options.threads, kv_cache=0
    )
    backend: Any = engine.target
    rows: dict[int, int] = {}
    text = (HERE / "prompts" / "editing_dev.jsonl").read_text() * 4
    ids = engine.encode(text)
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        if request["do"] == "isa":
            answer = {"isa": backend.isa}
        elif request["do"] == "fill":
            context = request["context"]
            rows[context] = backend.open()
            backend.extend([Nodes(rows[context], ids[:context], num_logits=1)])
            backend.commit([kept(rows[context], range(context))])
        elif request["do"] == "step":
            row, count = rows[request["context"]], request["nodes"]
            start = time.perf_counter()
            backend.extend([Nodes(row, ids[:count])])
            answer = {"ms": (time.perf_counter() - start) * 1e3}
            backend.truncate(row, backend.length(row))
        else:  # prefill
            row = backend.open()
            start = time.perf_counter()
            backend.extend([Nodes(row, ids[: request["count"]], num_logits=1)])
            answer = {"ms": (time.perf_counter() - start) * 1e3}
            backend.release(row)
        print(json.dumps(answer), flush=True)


def in_turns(sides: list[Side], turns: int, **request: Any) -> list[list[float]]:
    """Milliseconds of each side, turn by turn; the first turn warms up and is left out."""
    found: list[list[float]] = [[] for _ in sides]
    for turn in range(turns + 1):
        for i in range(len(sides)):
            which = (i + turn) % len(sides)  # who begins changes
            time.sleep(PAUSE)
            ms = sides[which].ask(**request)["ms"]
            if turn:
                found[which].append(ms)
    return found


def line_of(what: str, count: int, found: list[list[float]]) -> dict[str, Any]:
    base, here = found
    ratios = [b / a for a, b in zip(base, here, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(
        f"{what:>14} {count:5d} {statistics.median(base):9.1f} {statistics.median(here):9.1f}"
        f" {min(base):9.1f} {min(here):9.1f}   {middle:.2f} ({low:.2f} to {high:.2f})",
        flush=True,
    )
    return {"what": what, "count": count, "baseline_ms": base, "here_ms": here, "ratio": middle}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--baseline", type=Path, help="a checkout")
    parser.add_argument("--here", type=Path, default=HERE.parent, help="the other one")
    parser.add_argument("--baseline-isa", default="auto")
    parser.add_argument("--isa", default="auto", help="instruction set of the other one")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--contexts", type=int, nargs="*", default=[128])
    parser.add_argument("--nodes", type=int, nargs="*", default=[1, 4, 8, 16, 32, 64])
    parser.add_argument("--prefill", type=int, nargs="*", default=[])
    parser.add_argument("--turns", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve, options)
    if not options.baseline:
        parser.error("--baseline is missing")
    for checkout in (options.baseline, options.here):
        # Else the installed Redwood would be timed under its name.
        if not any((checkout / "src" / "redwood").glob("_native*.so")):
            parser.error(f"{checkout}: no compiled module in src/redwood")
    sides = [
        Side(options.baseline, options.baseline_isa, options),
        Side(options.here, options.isa, options),
    ]
    print(f"{options.model}: {sides[0].isa} of the baseline, {sides[1].isa} here; ms")
    names = ("what", "count", "median", "here", "best", "here")
    print("{:>14} {:>5} {:>9} {:>9} {:>9} {:>9}   ratio (middle half)".format(*names))
    rows = []
    for context in options.contexts:
        for side in sides:
            side.ask(do="fill", context=context)
        for nodes in options.nodes:
            found = in_turns(sides, options.turns, do="step", context=context, nodes=nodes)
            rows.append(line_of(f"behind {context}", nodes, found) | {"context": context})
    for count in options.prefill:
        found = in_turns(sides, max(3, options.turns // 4), do="prefill", count=count)
        rows.append(line_of("prompt of", count, found))
    for side in sides:
        side.process.kill()
    if options.json:
        processor = "unknown"
        if os.path.exists("/proc/cpuinfo"):
            lines = Path("/proc/cpuinfo").read_text().splitlines()
            names_ = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
            processor = names_[0] if names_ else processor
        result = {"model": options.model, "threads": options.threads, "processor": processor}
        result |= {"baseline_isa": sides[0].isa, "isa": sides[1].isa, "rows": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
