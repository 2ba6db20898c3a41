"""Answers of a given form: tokens per pass with and without drafts from the grammar, and times.

Every contender answers every prompt under the same mask, at temperature 0 or with a seed, so all
texts must be equal, and are compared. "ngram" and "auto" see the mask alone, as any
`logits_processor`; those with "+grammar" also draft what the grammar forces and drop drafts that it
forbids. Contenders take turns, prompt by prompt, on one target; each keeps its own table. Times are
decoding alone, as ratios to plain decoding of the same prompt.

    python benchmarks/grammar_drafts.py --target qwen2.5-coder-1.5b-instruct --json out.json
    python benchmarks/grammar_drafts.py --target qwen2.5-coder-0.5b-instruct --budget 16
    python benchmarks/grammar_drafts.py --temperature 0.8 --drafter qwen2.5-coder-0.5b-instruct
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import common
from grammar_prompts import SCHEMAS, TOOL_TASKS, Task
from rich.console import Console
from rich.table import Table

import redwood
from redwood.bench.interleave import PLAIN, Candidate, Run, run
from redwood.cli.loading import open_candidates
from redwood.sampling import SamplingParams
from redwood.server.grammar import Grammars
from redwood.server.schema import ResponseFormat


class Contender(NamedTuple):
    """A way to decode; `grammar`: whether the engine sees the grammar, or a mask alone."""

    name: str
    candidate: Candidate
    grammar: bool


def mask_only(processor: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """The same mask, as a function that says nothing else."""
    return lambda token_ids, scores: processor(token_ids, scores)


def answer(
    engine: redwood.Engine, grammars: Grammars, task: Task, contender: Contender, options: Any
) -> Run:
    wanted = {"type": "json_schema", "json_schema": {"name": task.name, "schema": task.schema}}
    prompt = engine.encode([{"role": "user", "content": task.prompt}])
    grammar = grammars.compile(ResponseFormat.model_validate(wanted))
    processor: Any = grammars.processor(grammar, len(prompt))
    params = SamplingParams(
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        seed=1 if options.temperature > 0.0 else None,
        logits_processor=processor if contender.grammar else mask_only(processor),
        speculate=contender.name != "plain",
    )
    return run(engine, contender.candidate, prompt, params)


def contenders(options: Any) -> tuple[redwood.Engine, list[Contender]]:
    names = ["ngram", "auto", *([options.drafter] if options.drafter else [])]
    budgets = [options.budget] if options.budget else []
    how: dict[str, Any] = {"threads": options.threads}
    made = [Contender("plain", PLAIN, False)]
    if options.grammar_alone:
        made.append(
            Contender("grammar", Candidate("none", PLAIN.drafter, options.budget or 16), True)
        )
    engine, found = open_candidates(options.target, names, budgets, **how)
    _, again = open_candidates(options.target, names, budgets, **how)
    for name, bare, forced in zip(names, found[1:], again[1:], strict=True):
        made.append(Contender(name, bare, False))
        made.append(Contender(f"{name}+grammar", forced, True))
    return engine, made


def measured(
    engine: redwood.Engine, tasks: list[Task], contestants: list[Contender], options: Any
) -> list[dict[str, Any]]:
    grammars = Grammars(engine.tokenizer, engine.target.vocab_size, engine.eos_ids)
    runs: dict[str, list[Run]] = {each.name: [] for each in contestants}
    for i, task in enumerate(tasks):
        at = i % len(contestants)
        for each in contestants[at:] + contestants[:at]:
            runs[each.name].append(answer(engine, grammars, task, each, options))
        if options.show:
            tokens = runs[contestants[-1].name][-1].token_ids
            print(task.name, engine.tokenizer.decode(tokens), flush=True)
    plain, made = runs["plain"], []
    for each in contestants:
        mine = runs[each.name]
        tokens = sum(r.stats.num_generated_tokens for r in mine)
        ratios = [
            (a.stats.decode_seconds / len(a.token_ids))
            / (b.stats.decode_seconds / len(b.token_ids))
            for a, b in zip(plain, mine, strict=True)
        ]
        made.append(
            {
                "contender": each.name,
                "tokens": tokens,
                "tokens_per_pass": round(tokens / sum(r.stats.target_passes for r in mine), 3),
                "by_prompt": round(median(r.stats.mean_acceptance_length for r in mine), 3),
                "accepted": round(
                    sum(r.stats.num_accepted_tokens for r in mine)
                    / max(1, sum(r.stats.num_draft_tokens for r in mine)),
                    3,
                ),
                "x_plain": round(median(ratios), 3),
                "draft_share": round(
                    sum(r.stats.seconds["draft"] for r in mine)
                    / sum(r.stats.decode_seconds for r in mine),
                    4,
                ),
                "same": sum(a.token_ids == b.token_ids for a, b in zip(plain, mine, strict=True)),
                "prompts": len(mine),
            }
        )
    return made


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="smollm2-135m-instruct")
    parser.add_argument("--drafter", help="a draft model, beside n-grams and auto")
    parser.add_argument("--budget", type=int, help="nodes of every step; default: a planner")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="above 0 with seed 1")
    parser.add_argument("--limit", type=int, default=99, help="prompts of each kind")
    parser.add_argument("--grammar-alone", action="store_true", help="also without other drafters")
    parser.add_argument("--show", action="store_true", help="print the answers")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    engine, contestants = contenders(options)
    results = {}
    for kind, tasks in (("schema", SCHEMAS), ("tools", TOOL_TASKS)):
        results[kind] = measured(engine, tasks[: options.limit], contestants, options)
        show(results[kind], f"{options.target}, {kind}, temperature {options.temperature}")
    if options.json is not None:
        about = common.setting(isa=getattr(engine.target, "isa", None))
        common.write(options.json, about, options=json.loads(_plain(options)), results=results)


def _plain(options: argparse.Namespace) -> str:
    return json.dumps(vars(options), default=str)


def show(rows: list[dict[str, Any]], title: str) -> None:
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
