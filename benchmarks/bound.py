"""How fast could any tree be here? Bounds from measured times and recorded hits; how near we are.

At temperature 0. Plain decoding writes the texts. Along them it is noted which tokens each drafter
would have hit: the run of right tokens in the n-gram tree, the rank of the right token among the
draft model's best three. Then three figures per drafter, as ratios to plain decoding:

oracle: a drafter that knows beforehand what will be accepted and scores nothing else: the cheapest
way through each text, by dynamic programming over its positions. No tree of these drafters, however
chosen, can be faster with these times.

fixed: the best one size (and number of levels) for all steps, without any such knowledge.

measured: the planner, in turns with plain decoding, in the same run. Times of one forward are
measured before and after and averaged.

    python benchmarks/bound.py --target qwen2.5-coder-1.5b-instruct \\
        --draft qwen2.5-coder-0.5b-instruct --set humaneval --limit 8 --json out.json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import closing
from statistics import median
from typing import Any

import common
from peers.prompts import add_options, chat_ids, read_prompts
from rich.console import Console
from rich.table import Table

from redwood.algorithms.sequoia import expected_tokens, optimal_tree
from redwood.bench.acceptance import Text, paired, teacher_forced
from redwood.bench.interleave import PLAIN, Candidate, alternate
from redwood.bench.report import forward_times, quartiles
from redwood.bench.sizes import paths, tokens_along
from redwood.cli.loading import open_candidates
from redwood.drafters.base import ModelDrafter, NgramDrafter
from redwood.sampling import SamplingParams, top

NODES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)
_MOST_LEVELS = 8
_RANKS = 3
_NGRAM_NODES = 64

Times = dict[int, float]


def ms_of(times: Times, nodes: int) -> float:
    """Milliseconds of a pass over `nodes`, straight between measured sizes."""
    known = sorted(times)
    if nodes >= known[-1]:
        low, high = known[-2], known[-1]
    else:
        high = next(n for n in known if n >= nodes)
        low = max((n for n in known if n <= nodes), default=high)
    if low == high:
        return times[low]
    return times[low] + (times[high] - times[low]) * (nodes - low) / (high - low)


def cheapest(runs: Sequence[Sequence[int]], times: Times, draft_ms: Sequence[float]) -> float:
    """Milliseconds of the cheapest way through a text.

    Args:
        runs: by drafter and position, how many tokens from there on it could get accepted.
        draft_ms: by drafter, what it takes per accepted token.
    """
    size = len(runs[0])
    left = [0.0] * (size + 1)
    for at in range(size - 1, -1, -1):
        best = times[1] + left[at + 1]
        for run, cost in zip(runs, draft_ms, strict=True):
            for count in range(1, min(run[at], size - at - 1) + 1):
                spent = ms_of(times, count + 1) + count * cost
                best = min(best, spent + left[at + count + 1])
        left[at] = best
    return left[0]


def model_runs(target: Any, draft: Any, text: Text) -> list[int]:
    """By position: how many tokens in a row are among the draft model's best."""
    hits = []
    with closing(paired(target, draft, text)) as pairs:
        for wanted, drafted in pairs:
            best = top(drafted[None], _RANKS)[1][0].tolist()
            hits.append(int(wanted.argmax()) in best)
    runs, length = [0] * len(text.answer), 0
    for at in range(len(runs) - 1, -1, -1):
        length = length + 1 if at < len(hits) and hits[at] else 0
        runs[at] = length
    return runs


def best_fixed(rates: Sequence[float], times: Times, draft_ms: float) -> dict[str, Any]:
    """The best one tree for all steps of a draft model."""
    found = {"ms_per_token": times[1], "nodes": 1, "levels": 1}
    for nodes in range(2, max(times) + 1):
        for levels in range(2, _MOST_LEVELS + 1):
            parents = optimal_tree(list(rates), nodes, max_levels=levels)
            tokens = expected_tokens(parents, list(rates))
            ms = (ms_of(times, nodes) + (levels - 1) * draft_ms) / tokens
            if ms < found["ms_per_token"]:
                found = {"ms_per_token": ms, "nodes": nodes, "levels": levels}
    return found


def best_size(sizes: dict[int, float], times: Times) -> dict[str, Any]:
    """The best one size for all steps of a drafter that costs nothing."""
    made = {n: ms_of(times, n) / tokens for n, tokens in sizes.items() if n <= max(times)}
    nodes = min(made, key=made.__getitem__)
    return {"ms_per_token": made[nodes], "nodes": nodes}


def mean_times(first: Times, second: Times) -> Times:
    return {n: (first[n] + second[n]) / 2.0 for n in first}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="smollm2-135m-instruct")
    parser.add_argument("--draft", help="a draft model beside n-grams")
    add_options(parser, chosen="humaneval", limit=8, tokens=96)
    options = parser.parse_args()
    joined = "+".join(filter(None, [options.draft, "ngram"]))
    how = {"backend": "native", "threads": options.threads}
    engine, candidates = open_candidates(options.target, [joined], [], **how)
    planned: Candidate = candidates[-1]
    parts = getattr(planned.drafter, "parts", [planned.drafter])
    model = next((part for part in parts if isinstance(part, ModelDrafter)), None)
    tasks = read_prompts(options.set, options.prompts, options.limit)
    prompts = chat_ids(engine, tasks)
    context = int(median(map(len, prompts))) + options.max_tokens // 2

    def measure() -> tuple[Times, float]:
        times = forward_times(engine.target, NODES, context=context, repeats=9).ms
        if model is None:
            return times, 0.0
        return times, forward_times(model.backend, [1], context=context, repeats=9).ms[1]

    before, draft_before = measure()
    params = SamplingParams(max_tokens=options.max_tokens, temperature=0.0)
    plain, own = alternate(engine, [PLAIN, planned], prompts, params)
    after, draft_after = measure()
    times, draft_ms = mean_times(before, after), (draft_before + draft_after) / 2.0
    texts = [Text(list(p), runs[0].token_ids) for p, runs in zip(prompts, plain, strict=True)]

    walks = [
        paths(NgramDrafter(), text, 0.0, engine.target.vocab_size, _NGRAM_NODES, -1 - i)
        for i, text in enumerate(texts)
    ]
    ngram = [[len(walk) for walk in text] for text in walks]
    total = sum(len(text.answer) for text in texts)

    def oracle(drafters: Sequence[tuple[list[list[int]], float]]) -> float:
        spent = sum(
            cheapest([runs[i] for runs, _ in drafters], times, [cost for _, cost in drafters])
            for i in range(len(texts))
        )
        return times[1] * total / spent

    fixed = best_size(tokens_along(walks, NODES), times)
    rows = [("n-gram", oracle([(ngram, 0.0)]), fixed)]
    result: dict[str, Any] = {}
    if model is not None:
        runs = [model_runs(engine.target, model.backend, text) for text in texts]
        rates = teacher_forced(engine.target, model.backend, texts, 0.0).rates
        result["acceptance"] = rates
        rows.append((options.draft, oracle([(runs, draft_ms)]), best_fixed(rates, times, draft_ms)))
        rows.append(("both", oracle([(ngram, 0.0), (runs, draft_ms)]), {}))
    ratios = [
        o[0].stats.tokens_per_s / p[0].stats.tokens_per_s for p, o in zip(plain, own, strict=True)
    ]
    equal = sum(p[0].token_ids == o[0].token_ids for p, o in zip(plain, own, strict=True))
    result |= {
        "times_ms": times,
        "times_before_ms": before,
        "times_after_ms": after,
        "draft_ms": draft_ms,
        "context": context,
        "measured": {"ratio": median(ratios), "quartiles": quartiles(ratios), "equal": equal},
        "plain_tokens_per_s": median(p[0].stats.tokens_per_s for p in plain),
        "tokens_per_pass": median(o[0].stats.mean_acceptance_length for o in own),
        "bounds": [
            {"drafter": name, "oracle": best}
            | ({"fixed": times[1] / one["ms_per_token"], **one} if one else {})
            for name, best, one in rows
        ],
    }
    table = Table(title=f"{options.target}, {options.set}: ratio to plain decoding, temperature 0")
    for column in ("drafter", "oracle", "best fixed tree", "nodes", "levels"):
        table.add_column(column, justify="right")
    for row in result["bounds"]:
        fixed_ratio = f"{row['fixed']:.2f}" if "fixed" in row else ""
        table.add_row(
            row["drafter"],
            f"{row['oracle']:.2f}",
            fixed_ratio,
            str(row.get("nodes", "")),
            str(row.get("levels", "")),
        )
    Console(width=100).print(table)
    shown = ", ".join(f"{n}: {ms:.0f}" for n, ms in times.items())
    print(f"ms by nodes: {shown}; draft pass {draft_ms:.1f} ms; context {context}")
    low, high = quartiles(ratios)
    print(
        f"planner, {joined}: {median(ratios):.2f} ({low:.2f} .. {high:.2f}) times plain, "
        f"{equal} of {len(prompts)} texts equal"
    )
    if options.json:
        setting = common.setting(target=options.target, draft=options.draft, set=options.set)
        common.write(options.json, setting, **result)


if __name__ == "__main__":
    main()
