"""Redwood against what people would use instead: the same machine, run and prompts, in turns.

Everybody answers each prompt (the same token ids) in rotating order; processes stand still when it
is not their turn. Speeds are of decoding, with the first pass of a peer apart, since its first
token comes out of the prefill; Redwood's prefill leaves out the last prompt token, so all its
tokens count. Prompts that were timed while something else used the processors are left out; with
too many of these there is no result. Peers are made by peers/build.py.

    python benchmarks/compare.py --pair qwen --set humaneval --limit 8 --json out.json
    python benchmarks/compare.py --set specbench --prompts FILE --temperature 0.6
    python benchmarks/compare.py --modes "openvino lookup 5" "llama.cpp ngram-mod" --drafters ngram
    python benchmarks/compare.py --show benchmarks/results/compare_*.json
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from common import command, setting
from peers.candidates import PAIRS, Field, available_bytes, default_drafters, default_modes
from peers.prompts import NAMES, chat_ids, read_prompts
from peers.summary import HEADER, enough, line, summary, table, verdict
from rich.console import Console

from redwood import SamplingParams
from redwood.cli.loading import open_candidates

OTHERS = 0.1  # processors
DISTURBED = 3  # exit status


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pair", choices=PAIRS, default="smollm2")
    parser.add_argument("--set", choices=NAMES, default="editing")
    parser.add_argument("--prompts", type=Path, help="the set's file: needed for specbench")
    parser.add_argument("--limit", type=int, help="only so many prompts, from all of the file")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--modes", nargs="*", help="of the peers: 'openvino lookup' and so on")
    parser.add_argument("--drafters", nargs="+", help="of Redwood: none, ngram, MODEL+ngram")
    parser.add_argument("--budgets", type=int, nargs="+", default=[], help="instead of a planner")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--others", type=float, default=OTHERS, help="processors others may use")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--show", type=Path, nargs="+", help="results to put into one table")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.show:
        print("\n".join([HEADER, *(line(json.loads(p.read_text())) for p in options.show)]))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends the peers too
    with ExitStack() as stack:
        result = compare(options, stack)
    outcome = result["result"]
    print(f"{outcome['timed']} of {outcome['prompts']} prompts were quiet enough to be timed.")
    if not enough(outcome):
        print("Something else used the processors: there is no result.", file=sys.stderr)
        sys.exit(DISTURBED)
    Console(width=144).print(table(f"{result['target']}, {options.set}", outcome))
    print(verdict(outcome, result["weights"]))


def compare(options: argparse.Namespace, stack: ExitStack) -> dict[str, Any]:
    """Runs all candidates on all prompts; the JSON file is written after every prompt."""
    target, draft = PAIRS[options.pair]
    names = options.drafters or default_drafters(draft)
    how = {"backend": "native", "threads": options.threads}
    engine, candidates = open_candidates(target, names, options.budgets, **how)
    tasks = read_prompts(options.set, options.prompts, options.limit)
    prompts = chat_ids(engine, tasks)
    if max(map(len, prompts)) > engine.target.capacity - options.max_tokens:
        raise SystemExit(f"a prompt and {options.max_tokens} tokens do not fit in the context")
    params = SamplingParams(max_tokens=options.max_tokens, temperature=options.temperature)
    ends = sorted(engine.eos_ids)
    field = Field(target, draft, prompts, ends, params, options.threads, stack)
    for candidate in candidates:
        field.add_redwood(engine, candidate)
    for mode in default_modes(bool(draft)) if options.modes is None else options.modes:
        field.add(mode)
        print(f"{mode} is ready, {available_bytes() >> 20} MiB are left", file=sys.stderr)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in field.turns}
    named = None if options.prompts is None else options.prompts.name
    result = {**vars(options), "prompts": named, "command": command()}
    result |= {"target": target, "draft": draft}
    result |= {"isa": engine.target.isa, "setting": setting(load=os.getloadavg())}
    result |= {"weights": field.weights, "versions": field.versions(), "runs": runs}
    for i, ids in enumerate(prompts):
        order = list(field.turns)
        for name in order[i % len(order) :] + order[: i % len(order)]:
            turn = field.turns[name](ids)
            runs[name].append({"line": tasks[i].line, "prompt": len(ids), **turn})
        greedy = options.temperature == 0
        result["result"] = summary(runs, ends, greedy=greedy, limit=options.others)
        if options.json:
            options.json.write_text(json.dumps(result, indent=1, default=str) + "\n")
        print(f"{i + 1} of {len(prompts)} prompts", file=sys.stderr)
    return result


if __name__ == "__main__":
    main()
