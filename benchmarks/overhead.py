"""The whole step by stage at growing contexts: what is not the target's pass, at 16 nodes.

The prompt is real text that says things twice, so that n-grams fill the tree at every step. A fixed
budget, no planner; decoding only, prefill apart. Stages are those of `Stats.seconds`.

    python benchmarks/overhead.py --target qwen2.5-coder-1.5b-instruct --json out.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import common
from rich.console import Console
from rich.table import Table

import redwood
from redwood.bench.interleave import Candidate, run
from redwood.drafters.base import NgramDrafter
from redwood.sampling import SamplingParams

TEXT = Path(__file__).parent.parent / "LICENSE"
SETTINGS: dict[str, dict[str, Any]] = {
    "temperature 0": {},
    "temperature 0.8, seed": {"temperature": 0.8, "seed": 1},
    "temperature 0.8, top-p 0.9": {"temperature": 0.8, "top_p": 0.9},
    "temperature 0.8, top-p 0.9, penalty 1.1": {
        "temperature": 0.8,
        "top_p": 0.9,
        "repetition_penalty": 1.1,
    },
}
STAGES = ("draft", "target", "verify", "other")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="smollm2-135m-instruct")
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 2048, 8192])
    parser.add_argument("--settings", choices=SETTINGS, nargs="+", default=list(SETTINGS))
    parser.add_argument("--budget", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    most = max(options.contexts) + options.max_tokens + options.budget
    engine = redwood.load(options.target, None, threads=options.threads, capacity=most, kv_cache=0)
    candidate = Candidate("ngram", NgramDrafter(), options.budget)
    text = engine.encode(TEXT.read_text())
    rows = []
    for context in options.contexts:
        prompt = (text * (1 + context // len(text)))[:context]
        for name in options.settings:
            params = SETTINGS[name]
            wanted = SamplingParams(max_tokens=options.max_tokens, ignore_eos=True, **params)
            stats = run(engine, candidate, prompt, wanted).stats
            spent = {stage: stats.seconds[stage] for stage in STAGES}
            total = sum(spent.values())
            rows.append(
                {
                    "context": context,
                    "setting": name,
                    "ms": {s: 1e3 * each / stats.target_passes for s, each in spent.items()},
                    "rest_share": 1.0 - spent["target"] / total,
                    "nodes": 1 + stats.num_draft_tokens / stats.target_passes,
                    "tokens_per_pass": stats.mean_acceptance_length,
                    "prefill_s": stats.seconds["prefill"],
                }
            )
            print(rows[-1], file=sys.stderr, flush=True)
    table = Table(title=f"{options.target}, budget {options.budget}: ms per step")
    for column in ("context", "setting", *STAGES, "all but target", "nodes", "per pass"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            str(row["context"]),
            row["setting"],
            *(f"{row['ms'][stage]:.1f}" for stage in STAGES),
            f"{100 * row['rest_share']:.1f} %",
            f"{row['nodes']:.1f}",
            f"{row['tokens_per_pass']:.2f}",
        )
    Console(width=120).print(table)
    if options.json:
        setting = common.setting(target=options.target, threads=options.threads)
        common.write(options.json, setting, rows=rows)


if __name__ == "__main__":
    main()
