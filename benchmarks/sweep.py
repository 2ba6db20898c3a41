"""The planner against every fixed choice: drafters, sizes and, for a draft model, depths.

All candidates take turns on each prompt at temperature 0. Two times: of decoding alone, and of the
whole answer, with what target and drafter need to read the prompt, which is what the planner minds.
The sweep's best is picked afterwards on the same prompts, so it is flattered by noise; a planner
that only equals it is as good.

    python benchmarks/sweep.py --target qwen2.5-coder-1.5b-instruct \\
        --draft qwen2.5-coder-0.5b-instruct --set editing --limit 4 --json out.json
"""

from __future__ import annotations

import argparse
from statistics import median
from typing import Any

import common
from peers.prompts import add_options, chat_ids, read_prompts
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from redwood.algorithms.sequoia import optimal_tree
from redwood.bench.interleave import PLAIN, Candidate, alternate
from redwood.cli.loading import open_candidates
from redwood.drafters.base import ModelDrafter, NgramDrafter
from redwood.sampling import SamplingParams

_RATES = [0.85, 0.07, 0.03, 0.01]  # by rank, about what the Qwen pair has; it shapes the trees


def fixed(parts: list[Any], sizes: list[int], levels: list[int]) -> list[Candidate]:
    """Every drafter alone with every size; a model with every depth that is another tree."""
    made = [Candidate(f"ngram {n}", NgramDrafter(), n) for n in sizes]
    for part in parts:
        if not isinstance(part, ModelDrafter):
            continue
        shapes = {
            tuple(optimal_tree(_RATES, n, max_levels=depth)): depth
            for n in sizes
            for depth in levels
            if depth <= n
        }
        made += [
            Candidate(
                f"model {len(shape)}, {depth} levels",
                ModelDrafter(part.backend, shape),
                len(shape),
            )
            for shape, depth in shapes.items()
        ]
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="smollm2-135m-instruct")
    parser.add_argument("--draft", help="a draft model beside n-grams")
    add_options(parser, chosen="editing", limit=6, tokens=96)
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 3, 4, 6, 8, 12])
    parser.add_argument("--levels", type=int, nargs="+", default=[2, 3, 4, 5, 6])
    options = parser.parse_args()
    joined = "+".join(filter(None, [options.draft, "ngram"]))
    how = {"backend": "native", "threads": options.threads}
    engine, opened = open_candidates(options.target, [joined], [], **how)
    planned = opened[-1]
    parts = list(getattr(planned.drafter, "parts", [planned.drafter]))
    candidates = [PLAIN, planned, *fixed(parts, options.sizes, options.levels)]
    tasks = read_prompts(options.set, options.prompts, options.limit)
    prompts = chat_ids(engine, tasks)
    params = SamplingParams(max_tokens=options.max_tokens, temperature=0.0)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("answers", total=len(candidates) * len(prompts))
        made = alternate(engine, candidates, prompts, params, on_run=lambda: progress.advance(task))
    rows = []
    for candidate, runs in zip(candidates, made, strict=True):
        ratios = [
            own[0].stats.tokens_per_s / plain[0].stats.tokens_per_s
            for plain, own in zip(made[0], runs, strict=True)
        ]
        tokens = sum(r[0].stats.num_generated_tokens for r in runs)
        whole = tokens / sum(sum(r[0].stats.seconds.values()) for r in runs)
        rows.append(
            {
                "candidate": candidate.name if candidate is not planned else "planner",
                "median_ratio": median(ratios),
                "tokens_per_s": tokens / sum(r[0].stats.decode_seconds for r in runs),
                "tokens_per_s_whole": whole,
                "tokens_per_pass": tokens / sum(r[0].stats.target_passes for r in runs),
                "equal": sum(
                    r[0].token_ids == p[0].token_ids for r, p in zip(runs, made[0], strict=True)
                ),
            }
        )
    assert planned.planner is not None
    predicted = 1e3 * planned.planner.predicted_tokens / planned.planner.predicted_ms
    rows[1]["predicted_tokens_per_s"] = predicted
    rows[2:] = sorted(rows[2:], key=lambda row: -row["tokens_per_s"])
    times = ("tokens_per_s", "tokens_per_s_whole")
    best = {name: max(row[name] for row in rows if row["candidate"] != "planner") for name in times}
    table = Table(title=f"{options.target}, {options.set}, temperature 0")
    columns = (
        "",
        "tokens/s",
        "of the best",
        "whole",
        "of the best",
        "x plain",
        "per pass",
        "equal",
    )
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        shares = [row[name] / best[name] for name in times]
        row["of_best"], row["of_best_whole"] = shares
        table.add_row(
            row["candidate"],
            f"{row['tokens_per_s']:.1f}",
            f"{shares[0]:.2f}",
            f"{row['tokens_per_s_whole']:.1f}",
            f"{shares[1]:.2f}",
            f"{row['median_ratio']:.2f}",
            f"{row['tokens_per_pass']:.2f}",
            f"{row['equal']} of {len(prompts)}",
        )
    Console(width=100).print(table)
    off = predicted / rows[1]["tokens_per_s"]
    print(f"the planner predicted {predicted:.1f} tokens/s: {off:.2f} of what was measured")
    if options.json:
        setting = common.setting(target=options.target, draft=options.draft, set=options.set)
        common.write(options.json, setting, rows=rows)


if __name__ == "__main__":
    main()
