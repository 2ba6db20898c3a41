"""Trees inside continuous batching: tokens per second over batches of 1 to 16, step by step.

Several requests for each row are there from the start (`--turns`), so rows leave and join between
steps, and prompts go in beside decoding. Compared on the same prompts: plain decoding, the planner,
SSSD's published rule for the size (arXiv 2411.05894) and fixed sizes. They answer at once on one
target, each with rows of its own, and the next step is always of the one that had least time: a
slow second of the machine hurts all alike. All of the time counts, prefill included. At temperature
0 every text must be plain decoding's own.

The limit: what trees could reach at most while all rows decode, if every node of theirs were
accepted, from the times of passes over so many rows with 1, 2, 4 and 8 nodes each.

    python benchmarks/batch_live.py --set editing --batches 1 2 4 8 16 --json out.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import median

import common
from peers.prompts import NAMES, chat_ids, read_prompts
from rich.console import Console
from rich.table import Table

import redwood
from redwood.algorithms.sssd import budget_by_batch
from redwood.bench.interleave import PLAIN, Candidate, Stepper, run_interleaved
from redwood.bench.report import quartiles
from redwood.drafters.base import NgramDrafter, open_datastore_drafter
from redwood.drafters.ngram import join_ngrams
from redwood.planner.from_profile import make_planner
from redwood.profiling.measure import Kind, measure_curve
from redwood.sampling import SamplingParams


def limit(engine: redwood.Engine, batch: int, context: int) -> float:
    """Tokens per time of the best pass, every node accepted, over those of a plain pass."""
    kinds = [Kind(1, 1, context), *(Kind(batch, nodes, context) for nodes in (1, 2, 4, 8))]
    curve = measure_curve(engine.target, kinds, repeats=7, seconds=30.0)
    ms = {point.nodes: point.ms for point in curve.points if point.rows == batch}
    return max(ms[1] * nodes / each for nodes, each in ms.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="smollm2-135m-instruct")
    parser.add_argument("--set", choices=NAMES, default="editing")
    parser.add_argument("--prompts", type=Path, help="the set's file: needed for specbench")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--turns", type=int, default=4, help="requests for each row")
    parser.add_argument("--budgets", type=int, nargs="*", default=[4, 12], help="fixed sizes")
    parser.add_argument("--flops-per-byte", type=float, default=33.0, help="of this machine")
    parser.add_argument("--index", type=Path, help="a datastore, for one more candidate")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    engine = redwood.load(options.target, None, threads=options.threads, kv_cache=0)
    params = SamplingParams(max_tokens=options.max_tokens, temperature=0.0)
    most = options.turns * max(options.batches)
    tasks = read_prompts(options.set, options.prompts, most)
    known = chat_ids(engine, tasks)
    prompts = [known[i % len(known)] for i in range(most)]
    rows, limits = [], dict[int, float]()
    context = int(median(map(len, prompts))) + options.max_tokens // 2
    for batch in options.batches:
        engine.max_rows = batch
        limits[batch] = limit(engine, batch, context)
        drafter = NgramDrafter()
        candidates = {
            "plain": PLAIN,
            "planner": Candidate("planner", drafter, 1, make_planner(engine.target, drafter)),
            "published": Candidate(
                "published", NgramDrafter(), budget_by_batch(batch, options.flops_per_byte)
            ),
        }
        if options.index is not None:
            stored = open_datastore_drafter(options.index, engine.tokenizer)
            warm = join_ngrams([NgramDrafter(), stored])
            planner = make_planner(engine.target, warm)
            candidates["with an index"] = Candidate("with an index", warm, 1, planner)
        candidates |= {f"{n} nodes": Candidate("", NgramDrafter(), n) for n in options.budgets}
        lanes = {name: Stepper(engine, each, batch) for name, each in candidates.items()}
        ratios: dict[str, list[float]] = {name: [] for name in lanes}
        seconds: dict[str, list[float]] = {name: [] for name in lanes}
        different = 0
        for turn in range(-1, options.rounds):  # the first one warms up
            run_interleaved(list(lanes.values()), prompts[: options.turns * batch], params)
            plain = lanes["plain"]
            for name, lane in lanes.items():
                if turn >= 0:
                    ratios[name].append(plain.seconds / lane.seconds)
                    seconds[name].append(lane.seconds)
                pairs = zip(lane.texts, plain.texts, strict=True)
                different += sum(own != right for own, right in pairs)
        for name, lane in lanes.items():
            tokens = sum(map(len, lane.texts))
            rows.append(
                {
                    "batch": batch,
                    "candidate": name,
                    "budget": None if candidates[name].planner else candidates[name].budget,
                    "ratio": median(ratios[name]),
                    "spread": quartiles(ratios[name]) if options.rounds > 1 else ratios[name] * 2,
                    "tokens_per_s": tokens / median(seconds[name]),
                    "tokens_per_pass": tokens / sum(s.target_passes for s in lane.stats),
                    "different_texts": different,
                }
            )
            print(rows[-1], file=sys.stderr, flush=True)
    table = Table(title=f"{options.target}, {options.set}, temperature 0: x plain, all time")
    columns = list(dict.fromkeys(row["candidate"] for row in rows))
    for column in ("batch", "plain tokens/s", "limit", *columns[1:]):
        table.add_column(column, justify="right")
    for batch in options.batches:
        mine = {row["candidate"]: row for row in rows if row["batch"] == batch}
        cells = [
            f"{mine[c]['ratio']:.2f} ({mine[c]['tokens_per_pass']:.2f} per pass)"
            for c in columns[1:]
        ]
        speed = f"{mine['plain']['tokens_per_s']:.0f}"
        table.add_row(str(batch), speed, f"{limits[batch]:.2f}", *cells)
    Console(width=120).print(table)
    print(f"texts that differ from plain decoding: {sum(r['different_texts'] for r in rows)}")
    if options.json:
        setting = common.setting(target=options.target, set=options.set, threads=options.threads)
        common.write(options.json, setting, rows=rows, limits=limits)


if __name__ == "__main__":
    main()
