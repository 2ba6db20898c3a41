"""The hardware-aware choice of a tree against fixed sizes: predicted and measured.

    python benchmarks/sizes.py --record noisy_0.6 --prompts FILE.jsonl --half 1
    python benchmarks/sizes.py --record qwen_0.6 --times t.json --draft-ms 20 --prompts FILE.jsonl

Predicted: the record's acceptance vector gives the tokens per step, the times of one target pass
by size and of one draft pass the rest: (t(n) + levels x draft) / tokens, arXiv 2402.12374, section
4.1. Every size has its best number of levels, so what is compared is the size. The formula counts
a draft pass per level; Redwood's drafter needs one less. Times are measured here (chains, medians)
or read from a file {size: ms}. Measured: plain decoding and all trees take turns on each prompt.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import common
from laws import Record, ratio
from plots import Curve, Panel, save_panels
from record import add_prompts, chosen_prompts, command, open_pair
from trees import acceptance, in_context

import redwood
from redwood.algorithms.sequoia import Plan, choose_tree
from redwood.backends.base import Backend
from redwood.bench.interleave import PLAIN, Candidate, Run, alternate
from redwood.bench.report import forward_times
from redwood.drafters.base import ModelDrafter
from redwood.sampling import SamplingParams


def read_times(path: Path) -> dict[int, float]:
    """Returns milliseconds by number of nodes: a file {size: ms}, or {"ms": {size: ms}}."""
    data = json.loads(path.read_text())
    return {int(size): float(ms) for size, ms in data.get("ms", data).items()}


def plan_of_size(
    vector: Sequence[float], times: Mapping[int, float], draft_ms: float, size: int, levels: int
) -> Plan:
    """Returns the best plan that has this size."""
    # A plain pass that lasts for ever leaves only the size asked for.
    only = {1: 1e12, size: times[size]}
    plan = choose_tree(vector, only, draft_ms, max_levels=levels)
    return plan._replace(speedup=times[1] / plan.time_per_token)


def measured(runs: Sequence[Sequence[Run]]) -> dict[str, float]:
    """Tokens per step and per second over runs[prompt][repeat], with standard errors."""
    stats = [[run.stats for run in answers] for answers in runs]
    tokens = [sum(s.num_generated_tokens for s in each) for each in stats]
    steps = [sum(s.target_passes for s in each) for each in stats]
    seconds = [sum(s.decode_seconds for s in each) for each in stats]
    per_step, per_second = ratio(tokens, steps), ratio(tokens, seconds)
    found = {"tokens_per_step": per_step[0], "tokens_per_step_error": per_step[1]}
    found |= {"tokens_per_s": per_second[0], "tokens_per_s_error": per_second[1]}
    return {name: round(value, 4) for name, value in found.items()}


def pass_times(
    options: argparse.Namespace, engine: redwood.Engine, draft: Backend
) -> tuple[dict[int, float], float]:
    """Milliseconds of a target pass by size, and of a draft pass: given, or measured now."""
    if options.times:
        times = read_times(options.times)
    else:
        sizes = [1, *options.sizes]
        times = forward_times(
            engine.target, sizes, context=options.context, repeats=options.repeats
        ).ms
    if options.draft_ms is not None:
        return times, options.draft_ms
    return times, forward_times(draft, [1], context=options.context, repeats=options.repeats).ms[1]


def compare(
    options: argparse.Namespace, record: Record, engine: redwood.Engine, result: dict[str, Any]
) -> None:
    """Plans a tree of every size, decodes with all in turns, and fills in the result."""
    model: Any = engine.drafter
    times, draft_ms = pass_times(options, engine, model.backend)
    temperature, width = record.facts["temperature"], record.facts["width"]
    rates, shares = acceptance(record, temperature, options.children, options.draws)
    vector = [float(rate) for rate in rates.mean(0)]
    chosen = choose_tree(vector, times, draft_ms, max_levels=options.max_levels).size
    plans = [
        plan_of_size(vector, times, draft_ms, size, options.max_levels)
        for size in sorted(times)
        if size > 1
    ]
    candidates = [
        Candidate(str(plan.size), ModelDrafter(model.backend, plan.parents, width=width), plan.size)
        for plan in plans
    ]
    params = SamplingParams(
        max_tokens=options.max_tokens,
        temperature=temperature,
        seed=options.seed,
        verifier="recursive",
    )
    runs = alternate(engine, [PLAIN, *candidates], chosen_prompts(engine, options), params)
    plain = measured(runs[0])
    result |= {"times_ms": times, "draft_ms": draft_ms, "chosen": chosen, "plain": plain}
    result["results"] = []
    for plan, own in zip(plans, runs[1:], strict=True):
        context = in_context(record, plan.parents, rates, shares)
        entry = entry_of(plan, context, measured(own), plain)
        result["results"].append(entry)
        print(entry, flush=True)


def entry_of(
    plan: Plan, context: tuple[float, float], seen: dict[str, float], plain: dict[str, float]
) -> dict[str, Any]:
    """One row of the table."""
    return {
        "size": plan.size,
        "levels": plan.levels,
        "predicted_tokens_per_step": round(plan.expected_tokens, 4),
        "in_context_tokens_per_step": round(context[0], 4),
        "in_context_error": round(context[1], 4),
        "predicted_tokens_per_s": round(1000.0 / plan.time_per_token, 3),
        "predicted_speedup": round(plan.speedup, 4),
        **seen,
        "speedup": round(seen["tokens_per_s"] / plain["tokens_per_s"], 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", required=True)
    add_prompts(parser, 8)
    parser.add_argument("--times", type=Path, help="JSON of {size: ms} of one target pass")
    parser.add_argument("--draft-ms", type=float, help="of one draft pass; default: measured")
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64])
    parser.add_argument("--context", type=int, default=128, help="tokens before a timed pass")
    parser.add_argument("--repeats", type=int, default=9, help="of timed passes")
    parser.add_argument("--max-levels", type=int, default=20)
    parser.add_argument("--children", type=int, default=64, help="ranks of the acceptance vector")
    parser.add_argument("--draws", type=int, default=64, help="per position")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    record = Record.load(options.record)
    name = f"sizes_{options.record}"
    result: dict[str, Any] = {"setting": common.setting(command=command()), "record": record.facts}
    with open_pair(record.facts["pair"], options.threads) as engine:
        compare(options, record, engine, result)
    common.save(name, result)
    picture(name, result)


def picture(name: str, result: dict[str, Any]) -> None:
    """Draws tokens per step and speedups against the size."""
    entries = result["results"]
    sizes = [entry["size"] for entry in entries]
    panels = []
    for label, guess, seen, error in (
        ("tokens per step", "predicted_tokens_per_step", "tokens_per_step", True),
        ("times plain decoding", "predicted_speedup", "speedup", False),
    ):
        errors = [entry[f"{seen}_error"] for entry in entries] if error else None
        curves = [
            Curve("predicted", sizes, [entry[guess] for entry in entries]),
            Curve("measured", sizes, [entry[seen] for entry in entries], errors, True),
        ]
        panels.append(Panel(f"chosen: {result['chosen']} nodes", "nodes", label, curves, True))
    save_panels(name, panels)


if __name__ == "__main__":
    main()
