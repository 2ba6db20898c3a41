"""A model larger than the memory it may take: trees against plain decoding, over streamed weights.

Every way runs in a process of its own, in a cgroup with the limit where the system lets us make
one (version 1, as root), so that the page cache counts, too. The parent reads its most memory.

* redwood: under the limit, plain decoding and trees in turns, and the same bytes read by a plain
  reader, between them.
* held: the same backend with all weights in memory, plain: what every text must be equal to.
* accelerate: Transformers with its disk offload, as much in memory as fits under the limit.

Plain decoding takes the same time for every token, so that a few tokens of it say enough.

    python benchmarks/offload.py --set humaneval --temperature 0 --json out.json
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import Any

import common
from peers import prompts as sets
from rich.console import Console
from rich.table import Table

WAYS = ("redwood", "held", "accelerate")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", default="qwen2.5-coder-1.5b-instruct")
    parser.add_argument("--drafter", default="qwen2.5-coder-0.5b-instruct+ngram")
    parser.add_argument("--memory", default="2GiB", help="limit of the process")
    parser.add_argument("--weights", default="bf16")
    parser.add_argument("--set", choices=sets.NAMES, default="humaneval")
    parser.add_argument("--prompts", type=Path, help="for specbench")
    parser.add_argument("--limit", type=int, default=3, help="prompts")
    parser.add_argument("--temperature", type=float, default=0.0, help="above 0 with a seed")
    parser.add_argument("--no-seed", action="store_true", help="draw freely; texts then differ")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--held-tokens", type=int, help="compare the beginning of each text only")
    parser.add_argument("--plain-tokens", type=int, default=8)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    return parser.parse_args()


def sampling(args: argparse.Namespace, number: int) -> dict[str, Any]:
    """Parameters of the request with this number."""
    seeded = args.temperature > 0 and not args.no_seed
    return {"temperature": args.temperature, **({"seed": 1000 + number} if seeded else {})}


def decode(engine: Any, ids: Sequence[int], params: dict[str, Any]) -> dict[str, Any]:
    """Tokens, and seconds from the first of them to the last; that one was prefill's."""
    start, first, tokens, steps = perf_counter(), None, [], []
    piece = None
    for piece in engine.stream(list(ids), **params):
        tokens += piece.token_ids
        if first is None and tokens:
            first, early = perf_counter(), len(tokens)
        steps.append(len(piece.token_ids))
    assert first is not None and piece is not None
    stats = piece.stats
    return {
        "tokens": tokens,
        "first_s": first - start,
        "decoding_s": perf_counter() - first,
        "decoded": len(tokens) - early,
        "passes": stats.target_passes,
        "drafted": stats.num_draft_tokens,
        "seconds": dict(stats.seconds),
    }


def read_once(stream: Any, threads: int = 2) -> tuple[float, int]:
    """Seconds, and bytes, of reading what a forward reads, and doing nothing with it."""
    spans = stream.streamed_spans()
    handle = os.open(stream.path, os.O_RDONLY | os.O_DIRECT)

    def read(part: Sequence[Any]) -> None:
        buffer = mmap.mmap(-1, max(-(-span.size // 4096) * 4096 for span in spans))
        for span in part:
            os.preadv(handle, [memoryview(buffer)[: -(-span.size // 4096) * 4096]], span.offset)

    start = perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, [spans[i::threads] for i in range(threads)]))
    os.close(handle)
    return perf_counter() - start, sum(span.size for span in spans)


def redwood_way(args: argparse.Namespace) -> dict[str, Any]:
    """Plain and trees in turns, a plain reader between them."""
    import redwood

    start = perf_counter()
    engine = redwood.load(
        args.target,
        args.drafter,
        offload="disk",
        memory=args.memory,
        weights=args.weights,
        capacity=2048,
    )
    made: dict[str, Any] = {"load_s": perf_counter() - start, "runs": [], "reads": []}
    stream = engine.target.stream
    # Times are looked at when they are first needed: not in the first prompt's figures.
    decode(engine, engine.encode("def f(x):"), {"max_tokens": 4, "temperature": 0.0})
    made["look_s"] = perf_counter() - start - made["load_s"]
    made["kept_bytes"] = stream.kept_bytes
    for number, ids in enumerate(sets.chat_ids(engine, tasks(args))):
        params = sampling(args, number)
        few = {**params, "max_tokens": args.plain_tokens, "speculate": False}
        seconds, size = read_once(stream)
        made["reads"].append({"s": seconds, "bytes": size})
        plain = decode(engine, ids, few)
        tree = decode(engine, ids, {**params, "max_tokens": args.max_tokens})
        made["runs"].append({"prompt_tokens": len(ids), "plain": plain, "tree": tree})
        print(number, plain["decoding_s"], tree["decoding_s"], file=sys.stderr, flush=True)
    return made


def held_way(args: argparse.Namespace) -> dict[str, Any]:
    """The same backend and weights in memory, plain."""
    import redwood

    engine = redwood.load(
        args.target, None, offload="disk", memory="1TiB", weights=args.weights, capacity=2048
    )
    params = {"max_tokens": args.held_tokens or args.max_tokens}
    return {
        "runs": [
            decode(engine, ids, {**sampling(args, number), **params})
            for number, ids in enumerate(sets.chat_ids(engine, tasks(args)))
        ]
    }


def accelerate_way(args: argparse.Namespace) -> dict[str, Any]:
    """Transformers with accelerate's disk offload, in bf16 as the files are; one prompt."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from redwood.models import resolve

    folder = resolve(args.target)
    for path in folder.glob("*.safetensors"):  # what others left in the page cache is not its own
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.bfloat16,
            device_map={"": "disk"},
            offload_folder=scratch,
        )
        prompt = tasks(args)[0].prompt
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt"
        )
        ids = ids if isinstance(ids, torch.Tensor) else ids["input_ids"]
        times = []

        class Watch:
            def put(self, _: Any) -> None:
                times.append(perf_counter())

            def end(self) -> None:
                pass

        count = max(3, args.plain_tokens // 2)
        made.generate(ids, max_new_tokens=count, do_sample=False, streamer=Watch())
    gaps = [b - a for a, b in zip(times[1:], times[2:], strict=False)]
    return {"gaps_s": gaps}


def tasks(args: argparse.Namespace) -> list[Any]:
    """The prompts, evenly from the whole set."""
    return sets.read_prompts(args.set, args.prompts, args.limit)


def child(args: argparse.Namespace, way: str) -> tuple[dict[str, Any], int]:
    """What a way returned, and the most memory of its process in bytes."""
    command = [sys.executable, __file__, *sys.argv[1:], "--child", way]
    with tempfile.TemporaryFile("w+") as out, cgroup(args.memory, way) as join:
        started, most = subprocess.Popen(command, stdout=out, preexec_fn=join), 0
        while started.poll() is None:
            most = max(most, most_memory(started.pid))
            sleep(0.05)
        if started.returncode:
            raise SystemExit(f"{way} ended with status {started.returncode}")
        out.seek(0)
        return json.loads(out.read().splitlines()[-1]), most


@contextmanager
def cgroup(memory: str, way: str) -> Iterator[Callable[[], None] | None]:
    """What puts a process under the limit, page cache and all; None: this system cannot."""
    from redwood.backends.offload.backend import parse_bytes

    group = Path("/sys/fs/cgroup/memory") / f"redwood-{os.getpid()}"
    if way == "held" or not os.access(group.parent, os.W_OK):
        yield None
        return
    group.mkdir()
    (group / "memory.limit_in_bytes").write_text(str(parse_bytes(memory)))

    def join() -> None:
        (group / "cgroup.procs").write_text(str(os.getpid()))

    try:
        yield join
    finally:
        group.rmdir()


def most_memory(process: int) -> int:
    """The most bytes that a process has held so far, as the system counts; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def main() -> None:
    """Runs the ways one after the other, and prints a table."""
    args = arguments()
    if args.child:
        way = {"redwood": redwood_way, "held": held_way, "accelerate": accelerate_way}[args.child]
        print(json.dumps(way(args)))
        return
    limited = os.access("/sys/fs/cgroup/memory", os.W_OK)
    about = common.setting(memory=args.memory, cgroup=limited)
    results: dict[str, Any] = {}
    for way in args.ways:
        result, most = child(args, way)
        results[way] = {"max_rss_bytes": most, **result}
        summary = summarise(results)
        if args.json:
            common.write(args.json, about, summary=summary, results=results)
    table = Table("what", "value")
    for name, value in summary.items():
        table.add_row(name, f"{value:.3f}" if isinstance(value, float) else str(value))
    Console().print(table)


def summarise(results: dict[str, Any]) -> dict[str, Any]:
    """Medians over the prompts."""
    made: dict[str, Any] = {
        f"{way} peak MiB": r["max_rss_bytes"] >> 20 for way, r in results.items()
    }
    if "redwood" not in results:
        return made | {f"{way} s/token": median(r["gaps_s"]) for way, r in results.items()}
    own = results["redwood"]
    plain = [run["plain"]["decoding_s"] / run["plain"]["decoded"] for run in own["runs"]]
    tree = [run["tree"]["decoding_s"] / run["tree"]["decoded"] for run in own["runs"]]
    reads = [read["s"] for read in own["reads"]]
    made |= {
        "plain s/token": median(plain),
        "tree s/token": median(tree),
        "speedup, median": median(p / t for p, t in zip(plain, tree, strict=True)),
        "speedups": [round(p / t, 2) for p, t in zip(plain, tree, strict=True)],
        "tokens per pass": median(
            run["tree"]["decoded"] / (run["tree"]["passes"] - 1) for run in own["runs"]
        ),
        "reading s": median(reads),
        "plain step over reading": median(p / r for p, r in zip(plain, reads, strict=True)),
        "GB/s": median(read["bytes"] / read["s"] / 1e9 for read in own["reads"]),
        "load s": own["load_s"],
    }
    if "held" in results:
        both = list(zip(own["runs"], results["held"]["runs"], strict=True))
        made["texts that differ"] = sum(
            run["tree"]["tokens"][: len(held["tokens"])] != held["tokens"] for run, held in both
        )
        made["tokens compared"] = sum(len(held["tokens"]) for _, held in both)
    if "accelerate" in results:
        gap = median(results["accelerate"]["gaps_s"])
        made |= {"accelerate s/token": gap, "over accelerate": gap / median(tree)}
    return made


if __name__ == "__main__":
    main()
