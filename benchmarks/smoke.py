"""Every way of computing that the documents offer, on real models: run this first on a new machine.

Each row is a process of its own: it loads a model in one configuration, answers two prompts plainly
and then with n-gram trees of a fixed size, and compares the texts. It says

* ok: the texts are equal, and trees were drafted;
* tie: they part where two tokens are as good as equally probable, by less than what this
  configuration's own rounding moves them (never said of the native backend, whose bits are fixed);
* different: they part elsewhere, or nothing was drafted;
* refused: the model or the options are not taken, with the reason;
* failed: the process ended otherwise, or took too long.

    python benchmarks/smoke.py                 # SmolLM2 135M and Qwen2.5-Coder 0.5B
    python benchmarks/smoke.py --full          # every pair on each of them, and the 1.5B
    python benchmarks/smoke.py --only eager --json out.json

Ends with 1 unless all rows are ok or tie.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

SMALL, MIDDLE, LARGE = (
    "smollm2-135m-instruct",
    "qwen2.5-coder-0.5b-instruct",
    "qwen2.5-coder-1.5b-instruct",
)
NATIVE = ("auto", "f32", "bf16", "int8", "int4")
OFFLOAD = ("bf16", "int8", "int4", "f32")
DTYPES = ("float32", "bfloat16", "float16")
PROMPTS = (  # the first is one that n-grams draft for, the second is not
    "red green blue white red green blue white red green blue white red green",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1)",
)
CAPACITY = 512
BUDGET = 6  # nodes of a pass: trees come where plain decoding would pay, too
MOST_TOKENS, FEWEST_TOKENS = 24, 8  # of a text
SECONDS = 5.0  # for plain texts, where that is less
PATIENCE_S = {SMALL: 240, MIDDLE: 400}
MOST_PATIENCE_S = 900
FLAGS = (
    "avx2 fma f16c avx_vnni avx512f avx512bw avx512_vnni avx512_bf16 avx512_fp16 amx_tile amx_int8 "
    "amx_bf16 amx_fp16 asimd asimddp i8mm bf16 sve sve2"
).split()
GOOD = ("ok", "tie")
PARALLEL_TIE = 1e-3  # nats; tensor parallel adds in another order, in float32

Case = dict[str, Any]


def cases(full: bool) -> Iterator[Case]:
    """What is loaded, as `redwood.load` takes it."""
    for target in (SMALL, MIDDLE, *([LARGE] if full else [])):
        yield from (
            {"target": target, "backend": "native", "weights": weights} for weights in NATIVE
        )
        yield from ({"target": target, "backend": "eager", "dtype": dtype} for dtype in DTYPES)
        for dtype in DTYPES:
            for weights in OFFLOAD:
                if full or target == SMALL or dtype == "float32" or weights == "bf16":
                    yield {"target": target, "offload": "disk", "dtype": dtype, "weights": weights}
        # SmolLM2 has three heads of keys, which two processes cannot share.
        if target != SMALL:
            yield {"target": target, "parallel": "tensor"}
        if target == SMALL or full:
            yield {"target": target, "parallel": "pipeline"}


def label(case: Case) -> str:
    """A configuration in words."""
    way = case.get("backend") or ("offload" if "offload" in case else case.get("parallel"))
    options = [f"{name} {case[name]}" for name in ("dtype", "weights") if name in case]
    return " ".join([case["target"].removesuffix("-instruct"), str(way), *options])


# One process a row


def answer(case: Case, file: Path) -> None:
    """What the process of a row does; writes what it found."""
    import redwood

    try:
        engine = redwood.load(**{"capacity": CAPACITY, **case}, drafter="ngram", budget=BUDGET)
        found = look(engine)
        if "parallel" in case:
            engine.target.close()
    except SystemExit:
        return  # a rank that followed
    except redwood.RedwoodError as error:
        found = {"status": "refused", "why": f"{error}"}
    if os.environ.get("RANK", "0") == "0":
        file.write_text(json.dumps(found))


def look(engine: Any) -> dict[str, Any]:
    """Decodes plainly and with trees, and compares."""
    prompts = [engine.encode(prompt) for prompt in PROMPTS]
    plain: dict[str, Any] = {"temperature": 0.0, "speculate": False, "ignore_eos": True}
    start = perf_counter()
    engine.generate(prompts, max_tokens=2, **plain)
    each = perf_counter() - start  # with the prompts, so that it is too much rather than too little
    count = max(FEWEST_TOKENS, min(MOST_TOKENS, int(SECONDS / each)))
    want = engine.generate(prompts, max_tokens=count, **plain)
    got = engine.generate(prompts, max_tokens=count, temperature=0.0, ignore_eos=True)
    found: dict[str, Any] = {
        "status": "ok",
        "why": "",
        "tokens": count,
        "per_pass": max(each.stats.mean_acceptance_length for each in got),
        "drafted": sum(each.stats.num_draft_tokens for each in got),
    }
    if not found["drafted"]:
        found |= {"status": "different", "why": "nothing was drafted"}
    for prompt, a, b in zip(prompts, want, got, strict=True):
        if a.token_ids != b.token_ids:
            found |= parted(engine, prompt, a.token_ids, b.token_ids)
    return found


def parted(engine: Any, prompt: list[int], plain: list[int], trees: list[int]) -> dict[str, Any]:
    """How near the two tokens are where two texts part."""
    at = next(i for i, (a, b) in enumerate(zip(plain, trees, strict=True)) if a != b)
    (one,) = engine.generate(
        [prompt + plain[:at]], max_tokens=1, temperature=0.0, speculate=False, logprobs=20
    )
    assert one.logprobs is not None
    chances = dict(one.logprobs[0].top)
    margin = abs(chances.get(plain[at], 0.0) - chances.get(trees[at], -99.0))
    limit = rounding(engine)
    return {
        "status": "tie" if margin <= limit else "different",
        "why": f"token {at} of {len(plain)}: {margin:.2g} nats apart, rounding {limit:.2g}",
    }


def rounding(engine: Any) -> float:
    """Nats by which rounding may move two tokens against each other here."""
    from redwood.backends.eager.backend import EagerBackend
    from redwood.backends.eager.probe import natural_tokens, own_rounding, tree_logits

    backend = engine.target
    if not isinstance(backend, EagerBackend):
        return 0.0 if backend.name == "native" else PARALLEL_TIE
    spread = float(tree_logits(backend, natural_tokens(backend.model)).std(-1).max())
    return 4 * own_rounding(backend.model) * spread


def prepared(case: Case) -> Case:
    """The case as it is loaded: floats, where weights are to be made of floats."""
    from redwood.models import resolve

    if case.get("backend") == "native" and case["weights"] in ("int8", "int4", "bf16"):
        return {**case, "target": str(resolve(case["target"], progress=True))}
    return case


def run(rank: int, ranks: int, port: int, case: Case, file: Path) -> None:
    """The main of a row's process, and of each rank of it."""
    said = os.open(file.with_suffix(f".{rank}.err"), os.O_WRONLY | os.O_CREAT)
    os.dup2(said, 2)
    if ranks > 1:
        about = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        os.environ.update({name: str(value) for name, value in about.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    answer(case, file)


def row(case: Case) -> dict[str, Any]:
    """Runs a case in processes of its own and returns what became of it."""
    ranks = 2 if "parallel" in case else 1
    start = monotonic()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        context: Any = multiprocessing.get_context("forkserver")
        ready, port = prepared(case), free_port()
        processes = [
            context.Process(target=run, args=(rank, ranks, port, ready, file))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        ended = watch(processes, start + PATIENCE_S.get(case["target"], MOST_PATIENCE_S))
        found: dict[str, Any] = {"status": "failed", "why": why(processes, ended, Path(folder))}
        if file.exists():
            found = json.loads(file.read_text())
    return {"case": case, "seconds": round(monotonic() - start, 1), **found}


def watch(processes: Sequence[Any], deadline: float) -> bool:
    """Waits for all to end; a rank that fails ends the others. Returns whether they did."""
    while running := [process for process in processes if process.exitcode is None]:
        if any(process.exitcode for process in processes):
            deadline = min(deadline, monotonic() + 20)
        left = deadline - monotonic()
        if left <= 0 or not wait([process.sentinel for process in running], left):
            break
    ended = all(process.exitcode is not None for process in processes)
    for process in processes:
        process.kill()
        process.join()
    return ended


def why(processes: Sequence[Any], ended: bool, folder: Path) -> str:
    """How a row failed, in a line."""
    if not ended:
        return "took too long"
    code = next((process.exitcode for process in processes if process.exitcode), 0)
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    lines = [line for file in sorted(folder.glob("*.err")) for line in file.read_text().split("\n")]
    return next((line for line in reversed(lines) if line.strip()), f"ended with {code}")[:300]


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# The table


def processor() -> dict[str, Any]:
    """Name, cores and instruction sets of this machine."""
    import torch

    from redwood.backends.native.backend import extension
    from redwood.errors import UnsupportedError

    told: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            told.setdefault(name.strip(), value.strip())
    except OSError:
        pass  # not Linux
    flags = set((told.get("flags") or told.get("Features") or "").split())
    try:
        sets = list(extension().instruction_sets())
    except UnsupportedError:
        sets = []
    made = " ".join(told[name] for name in ("cpu family", "model") if name in told)
    return {
        "name": told.get("model name") or platform.processor() or platform.machine(),
        "family and model": made,
        "cores": os.cpu_count(),
        "flags": [flag for flag in FLAGS if flag in flags],
        "native": sets,
        "torch": f"{torch.__version__}, {torch.backends.cpu.get_cpu_capability()}",
    }


def shown(found: dict[str, Any]) -> str:
    """A row of the table."""
    per_pass = f"{found['per_pass']:.2f}" if "per_pass" in found else ""
    tokens = str(found.get("tokens", ""))
    parts = [f"{label(found['case']):<58}", f"{found['status']:<9}", f"{per_pass:>5}"]
    return "  ".join([*parts, f"{tokens:>4}", f"{found['seconds']:6.1f}", found["why"]]).rstrip()


def main() -> None:
    """Prints the machine, then a line a row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--full", action="store_true", help="every pair on each model, and the 1.5B"
    )
    parser.add_argument("--only", help="rows with these words in them, all of them", default="")
    parser.add_argument("--json", type=Path, help="write the rows to this file, too")
    args = parser.parse_args()
    chosen = [case for case in cases(args.full) if set(args.only.split()) <= {*label(case).split()}]
    if not chosen:
        parser.error(f"no row has the words {args.only!r}: see --help")
    machine = processor()
    for name, value in machine.items():
        print(f"{name}: {' '.join(value) if isinstance(value, list) else value}")
    head = f"{'configuration':<58}  {'':<9}  {'/pass':>5}  {'tokens':>4}"
    print(f"{head} seconds", flush=True)
    multiprocessing.get_context("forkserver").set_forkserver_preload(["redwood.backends.load"])
    forkserver.ensure_running()
    rows = []
    for case in chosen:
        rows.append(row(case))
        print(shown(rows[-1]), flush=True)
        if args.json:
            args.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    bad = [each for each in rows if each["status"] not in GOOD]
    took = sum(each["seconds"] for each in rows)
    print(f"{len(rows) - len(bad)} of {len(rows)} rows ok, {took:.0f} s")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
