"""The planner against plain decoding where trees should not pay, and where they should.

Sets: prompts of random tokens; sampling at temperature 1.5; a drafter that knows nothing (the
target's first layers under noise); open questions; edits. All in turns in one process, on one
target. Ratios are of whole time, prefill included (a draft model reads the prompt, too).

    python benchmarks/never_slower.py --prompts FILE.jsonl --json out.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import common
import numpy as np
from rich.console import Console
from rich.table import Table

import redwood
from redwood.bench.interleave import PLAIN, Candidate, Run, alternate
from redwood.bench.report import quartiles
from redwood.planner.from_profile import make_planner

HERE = Path(__file__).parent


def seconds(run: Run) -> float:
    return sum(run.stats.seconds.values())


def compare(
    engine: redwood.Engine, candidate: Candidate, prompts: Sequence[list[int]], **params: Any
) -> dict[str, Any]:
    made = alternate(engine, [PLAIN, candidate], prompts, redwood.SamplingParams(**params))
    pairs = [
        (p, o) for plain, own in zip(*made, strict=True) for p, o in zip(plain, own, strict=True)
    ]
    # Unseeded texts differ in length: what counts is time per token.
    ratios = [(seconds(p) / len(p.token_ids)) / (seconds(o) / len(o.token_ids)) for p, o in pairs]
    decoding = [o.stats.tokens_per_s / p.stats.tokens_per_s for p, o in pairs]
    plain_s, own_s = (
        sum(seconds(run) for run in runs) / sum(len(run.token_ids) for run in runs)
        for runs in zip(*pairs, strict=True)
    )
    return {
        "drafter": candidate.name,
        "prompts": len(prompts),
        "ratio": median(ratios),
        "spread": quartiles(ratios),
        "all_tokens": plain_s / own_s,
        "decoding_only": median(decoding),
        "plain_tokens_per_s": median(p.stats.tokens_per_s for p, _ in pairs),
        "tokens_per_pass": median(o.stats.mean_acceptance_length for _, o in pairs),
        **params,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="smollm2-135m-instruct")
    parser.add_argument("--draft", help="a draft model for the last two sets, joined with n-grams")
    parser.add_argument("--prompts", type=Path, required=True, help="open questions, JSON lines")
    parser.add_argument("--num", type=int, default=12, help="prompts of each set")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--useless", action="store_true", help="add the drafter that knows nothing")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    drafter = f"{args.draft}+ngram" if args.draft else "ngram"
    engine = redwood.load(args.target, drafter, threads=args.threads, kv_cache=0)
    known = Candidate(drafter, engine.drafter, engine.budget, engine.planner)
    rng = np.random.default_rng(0)
    random = [rng.integers(0, engine.target.vocab_size, 100).tolist() for _ in range(args.num)]
    questions = common.chat_prompts(engine, args.prompts, 20, 300, args.num)
    edits = [
        engine.encode([{"role": "user", "content": json.loads(line)["prompt"]}])
        for line in (HERE / "prompts" / "editing_test.jsonl").read_text().splitlines()
    ][: args.num]
    greedy = {"max_tokens": args.max_tokens, "temperature": 0.0}
    # Without a seed texts differ, and a short one is mostly its prompt: all of the same length.
    hot = {"max_tokens": args.max_tokens, "temperature": 1.5, "ignore_eos": True}
    sets = [
        ("random tokens", known, random, greedy),
        ("temperature 1.5", known, questions, hot),
        ("open questions", known, questions, greedy),
        ("edits", known, edits, greedy),
    ]
    rows = []
    for name, candidate, prompts, params in sets:
        rows.append({"set": name, **compare(engine, candidate, prompts, **params)})
        print(rows[-1], flush=True)
    if args.useless:
        with common.shallow_copy(args.target, 2, noise=2.0) as folder:
            other = redwood.load(args.target, folder, threads=args.threads, kv_cache=0)
            planner = make_planner(engine.target, other.drafter)
            candidate = Candidate("useless", other.drafter, other.budget, planner)
            rows.append(
                {"set": "a useless drafter", **compare(engine, candidate, questions, **greedy)}
            )
            print(rows[-1], flush=True)
    table = Table(title=f"{args.target}, {args.threads} threads: planner over plain decoding")
    for column in ("set", "drafter", "x plain, whole time", "all tokens", "decoding", "per pass"):
        table.add_column(column, justify="right")
    for row in rows:
        low, high = row["spread"]
        table.add_row(
            row["set"],
            row["drafter"],
            f"{row['ratio']:.3f} ({low:.3f} .. {high:.3f})",
            f"{row['all_tokens']:.3f}",
            f"{row['decoding_only']:.3f}",
            f"{row['tokens_per_pass']:.2f}",
        )
    Console(width=120).print(table)
    if args.json:
        setting = common.setting(target=args.target, threads=args.threads)
        args.json.write_text(json.dumps({"setting": setting, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
