"""Drafts that cost nothing: tokens per pass by nodes, and whole time over plain decoding.

Cold: the drafter knows nothing before the first prompt of a set, and learns from one to the next.
Warm: it has seen other prompts' answers, of the same and of all other sets. Tokens per pass are of
fixed sizes, whole time (prefill included) is the planner's, in turns with plain decoding step by
step on the same target; with a seed or at temperature 0 both answers must be equal, and are
compared. "Best size" is what one fixed size could give at most by its tokens per pass and the times
of a pass over 1 and over so many nodes, measured in the same run.

    python benchmarks/free_drafts.py --prompts FILE.jsonl --limit 40 --json out.json
    python benchmarks/free_drafts.py --target qwen2.5-coder-1.5b-instruct --sets mtbench \\
        --nodes 8 --states warm --warm-tokens 20000 --limit 12
    python benchmarks/free_drafts.py --sets editing --batch 4 --nodes --recycling

`--recycling` adds Token Recycling (arXiv 2408.08696) as published: its static tree of 81 nodes,
its matrix kept over the prompts of a set. `--state` keeps what the warm drafter learned.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import common
import feeding
import numpy as np
from peers.prompts import NAMES, read_prompts
from rich.console import Console
from rich.table import Table

import redwood
from redwood.algorithms.token_recycling import AdjacencyMatrix, best_tokens
from redwood.backends.base import AcceptedPath, Nodes
from redwood.backends.rows import fill
from redwood.bench.interleave import PLAIN, Candidate, Stepper, run_interleaved
from redwood.bench.report import forward_times, quartiles
from redwood.cli.loading import open_candidates
from redwood.planner.from_profile import make_planner
from redwood.sampling import SamplingParams
from redwood.tree import children_of

Prompts = Sequence[list[int]]


def groups_of(prompts: Prompts, size: int) -> list[Prompts]:
    return [prompts[i : i + size] for i in range(0, len(prompts), size)]


def spread(values: Sequence[float], digits: int = 3) -> dict[str, Any]:
    """Median and quartiles."""
    return {
        "median": round(median(values), digits),
        "quartiles": [round(value, digits) for value in quartiles(values)],
    }


def tokens_per_pass(
    engine: redwood.Engine, candidate: Candidate, prompts: Prompts, batch: int, params: Any
) -> dict[str, Any]:
    """Answers the prompts in their order: all tokens by all passes, and by prompt."""
    stepper, stats = Stepper(engine, candidate, batch), list[Any]()
    for group in groups_of(prompts, batch):
        run_interleaved([stepper], group, params)
        stats += stepper.stats
    tokens = sum(each.num_generated_tokens for each in stats)
    by_prompt = [each.mean_acceptance_length for each in stats]
    all_passes = sum(each.target_passes for each in stats)
    return {"tokens": tokens, "tokens_per_pass": round(tokens / all_passes, 3), **spread(by_prompt)}


def whole_time(
    engine: redwood.Engine,
    candidate: Candidate,
    prompts: Prompts,
    batch: int,
    params: SamplingParams,
    before: Callable[[], None],
) -> dict[str, Any]:
    """Plain decoding and a candidate in turns, step by step, on groups of `batch` prompts."""
    plain, own = (Stepper(engine, each, batch) for each in (PLAIN, candidate))
    short = SamplingParams(max_tokens=8, temperature=params.temperature, seed=params.seed)
    for stepper in (plain, own):  # warm-up
        run_interleaved([stepper], prompts[:batch], short)
    before()
    ratios, decoding, seconds, tokens, same = [], [], np.zeros(2), np.zeros(2), 0
    passes = 0
    for i, group in enumerate(groups_of(prompts, batch)):
        turns = [plain, own] if i % 2 == 0 else [own, plain]
        run_interleaved(turns, group, params)
        made = [sum(map(len, stepper.texts)) for stepper in (plain, own)]
        took = [stepper.seconds for stepper in (plain, own)]
        ratios.append((took[0] / made[0]) / (took[1] / made[1]))
        speeds = [sum(each.tokens_per_s for each in stepper.stats) for stepper in (plain, own)]
        decoding.append(speeds[1] / speeds[0])
        seconds, tokens = seconds + took, tokens + made
        passes += sum(each.target_passes for each in own.stats)
        same += sum(a == b for a, b in zip(plain.texts, own.texts, strict=True))
    per_token = (seconds / tokens).tolist()
    return {
        "groups": len(ratios),
        **spread(ratios),
        "all_tokens": round(per_token[0] / per_token[1], 3),
        "decoding_only": round(median(decoding), 3),
        "tokens_per_pass": round(float(tokens[1]) / passes, 3),
        "plain_tokens_per_s": round(1.0 / per_token[0], 1),
        "identical": same,
        "prompts": len(prompts),
    }


def recycled(
    engine: redwood.Engine, matrix: AdjacencyMatrix, prompt: list[int], max_tokens: int
) -> tuple[list[int], int]:
    """The answer by Token Recycling at temperature 0, and the passes it took."""
    target, text, passes = engine.target, list(prompt), 0
    row, end = target.open(), len(prompt) + max_tokens
    fill(target, row, prompt[:-1])
    while passes == 0 or (len(text) < end and text[-1] not in engine.eos_ids):
        tree = matrix.draft(text[-1])
        (logits,) = target.extend([Nodes(row, tree.token_list, tree.parent_list)])
        best = best_tokens(logits.float().numpy())
        matrix.update(tree.token_list, best)
        children, path = children_of(tree.parent_list), [0]
        while True:
            said = int(best[path[-1], 0])
            text.append(said)
            kept = [node for node in children[path[-1]] if tree.token_list[node] == said]
            if not kept or said in engine.eos_ids or len(text) == end:
                break
            path += kept
        target.commit([AcceptedPath(row, path)])
        passes += 1
    target.release(row)
    return text[len(prompt) :], passes


def recycling(engine: redwood.Engine, prompts: Prompts, max_tokens: int) -> dict[str, Any]:
    """Token Recycling, one row; its matrix is empty before the first prompt."""
    matrix = AdjacencyMatrix(engine.target.vocab_size)
    made = [recycled(engine, matrix, prompt, max_tokens) for prompt in prompts]
    tokens = sum(len(answer) for answer, _ in made)
    found = round(tokens / sum(passes for _, passes in made), 3)
    by_prompt = [len(answer) / passes for answer, passes in made]
    return {"tokens": tokens, "tokens_per_pass": found, **spread(by_prompt)}


def warm_state(
    engine: redwood.Engine, drafter: Any, options: Any, measured: set[str]
) -> tuple[feeding.State, int]:
    """What the drafter has learned from other prompts' answers, and how many tokens these had."""
    part = feeding.free_part(drafter)
    if options.state is not None and options.state.exists():
        state, about = feeding.read_state(options.state, part)
        if about["target"] != options.target or measured & set(about["fed"]):
            raise SystemExit(f"{options.state} is of another target, or has seen these prompts")
        return state, about["tokens"]
    texts = (t for t in feeding.set_prompts(options.prompts, options.feed) if t not in measured)
    params = SamplingParams(max_tokens=options.max_tokens, temperature=0.0)
    tokens, fed = 0, list[str]()
    while tokens < options.warm_tokens and (some := list(islice(texts, 32))):
        ids = [feeding.ids_of(engine, text, options.max_tokens) for text in some]
        tokens += feeding.feed(engine, drafter, [each for each in ids if each], params)
        fed += some
        print(f"fed {tokens} tokens of {len(fed)} prompts", flush=True)
    state = feeding.state_of(part)
    if options.state is not None:
        feeding.save_state(options.state, state, target=options.target, tokens=tokens, fed=fed)
    return state, tokens


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="smollm2-135m-instruct")
    parser.add_argument("--drafter", default="ngram", help="with a free part, such as ngram")
    parser.add_argument("--sets", choices=NAMES, nargs="+", help="default: all that there are")
    parser.add_argument("--prompts", type=Path, help="file of the set specbench")
    parser.add_argument("--limit", type=int, default=24, help="prompts of each set")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--nodes", type=int, nargs="*", default=[4, 8, 16, 32, 64])
    parser.add_argument("--states", choices=("cold", "warm"), nargs="+", default=["cold", "warm"])
    parser.add_argument("--warm-tokens", type=int, default=60_000)
    parser.add_argument("--feed", type=Path, nargs="*", default=[], help="more prompts to feed")
    parser.add_argument("--state", type=Path, help="file of what the warm drafter learned")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=0.0, help="above 0 with seed 1")
    parser.add_argument("--no-time", action="store_true", help="tokens per pass only")
    parser.add_argument("--recycling", action="store_true", help="Token Recycling beside it")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    how: dict[str, Any] = {"backend": "native", "threads": options.threads}
    engine, candidates = open_candidates(options.target, [options.drafter], [], **how)
    drafter = candidates[-1].drafter
    part = feeding.free_part(drafter)
    names = options.sets or [n for n in NAMES if n != "specbench" or options.prompts is not None]
    sets: dict[str, Prompts] = {}
    measured: set[str] = set()
    for name in names:
        tasks = read_prompts(name, options.prompts if name == "specbench" else None, options.limit)
        ids = [feeding.ids_of(engine, task.prompt, options.max_tokens) for task in tasks]
        sets[name] = [each for each in ids if each is not None]
        measured.update(task.prompt for task in tasks)
    states: dict[str, Any] = {"cold": (feeding.state_of(part), 0)}
    if "warm" in options.states:
        states["warm"] = warm_state(engine, drafter, options, measured)
    seed = None if options.temperature == 0.0 else 1
    params = SamplingParams(
        max_tokens=options.max_tokens, temperature=options.temperature, seed=seed
    )
    rows: list[dict[str, Any]] = []

    def note(**values: Any) -> None:
        rows.append(values)
        print(values, flush=True)
        if options.json is not None:
            about = common.setting(isa=getattr(engine.target, "isa", None))
            common.write(options.json, about, options=vars(options), results=rows)

    for name, prompts in sets.items():
        known = {"set": name, "batch": options.batch}
        context = int(median(map(len, prompts))) + options.max_tokens // 2
        times = forward_times(engine.target, [1, *options.nodes], context=context, repeats=9).ms
        for state in options.states:
            learned, seen = states[state]
            at, bounds = {**known, "state": state, "seen": seen}, list[float]()
            for nodes in options.nodes:
                feeding.restore(part, learned)
                candidate = Candidate(options.drafter, drafter, nodes)
                found = tokens_per_pass(engine, candidate, prompts, options.batch, params)
                bounds.append(found["tokens_per_pass"] * times[1] / times[nodes])
                note(**at, nodes=nodes, ms=[round(times[n], 2) for n in (1, nodes)], **found)
            if not options.no_time:
                feeding.restore(part, learned)
                planned = Candidate(
                    options.drafter, drafter, 64, make_planner(engine.target, drafter)
                )
                found = whole_time(
                    *(engine, planned, prompts, options.batch, params),
                    before=lambda learned=learned: feeding.restore(part, learned),  # type: ignore[misc]
                )
                best = round(max(bounds), 3) if bounds and options.batch == 1 else None
                note(**at, nodes="planner", best_size=best, **found)
        if options.recycling and options.temperature == 0.0:
            found = recycling(engine, prompts, options.max_tokens)
            note(**known, state="Token Recycling", seen=0, nodes=81, **found)
    show(rows, f"{options.target}, {options.drafter}, temperature {options.temperature}")


def show(rows: Sequence[dict[str, Any]], title: str) -> None:
    """Prints the results as a table; times are ratios to plain decoding."""
    table = Table(title=title)
    columns = ("set", "batch", "state", "seen", "nodes", "per pass", "by prompt")
    for column in (*columns, "x plain, whole", "all tokens", "decoding", "best size", "equal"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        low, high = row["quartiles"]
        middle = f"{row['median']:.2f} ({low:.2f} .. {high:.2f})"
        timed = row["nodes"] == "planner"
        first = [str(row[name]) for name in columns[:5]]
        figures = [f"{row['tokens_per_pass']:.2f}", "" if timed else middle, middle * timed]
        if timed:
            figures += [f"{row['all_tokens']:.3f}", f"{row['decoding_only']:.3f}"]
            figures += [str(row["best_size"] or ""), f"{row['identical']} of {row['prompts']}"]
        table.add_row(*first, *figures)
    Console(width=180).print(table)


if __name__ == "__main__":
    main()
