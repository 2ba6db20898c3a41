"""Boost-tuning on a real target: acceptance before and after, and what it does to speed.

    python benchmarks/tuning.py --prompts editing_dev.jsonl spec_bench_dev.jsonl --layers 4

The target's first layers are tuned on its own answers to short prompts; everything is measured on
prompts held out of that. Speeds are of plain decoding, n-grams and the drafters in turns in one
process on one target; a busy machine shows in the quartiles.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import common
import torch
from record import command

import redwood
from redwood._storage import digest
from redwood.bench.interleave import PLAIN, Candidate, alternate
from redwood.bench.report import reports
from redwood.cli.bench import read_tasks
from redwood.drafters.base import ModelDrafter, NgramDrafter, join_drafters
from redwood.engine.load import open_drafter
from redwood.models import resolve
from redwood.sampling import SamplingParams
from redwood.tuning import Project, Settings, TuningPlan
from redwood.tuning.project import identity, split

_BUDGET = 5


def short_prompts(engine: redwood.Engine, options: argparse.Namespace) -> list[list[int]]:
    """Token ids of prompts that are short; the first few of every category are left to others."""
    found: list[list[int]] = []
    for file in options.prompts:
        seen: Counter[str | None] = Counter()
        for task in read_tasks(file):
            seen[task.category] += 1
            ids = engine.encode([{"role": "user", "content": task.prompt}])
            if seen[task.category] > options.skip and len(ids) <= options.high:
                found.append(ids)
    if len(found) < options.num:
        raise SystemExit(
            f"{len(found)} prompts of at most {options.high} tokens, not {options.num}"
        )
    return [found[i * len(found) // options.num] for i in range(options.num)]  # from all parts


def main() -> None:
    """Tunes, measures, writes benchmarks/results/NAME.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=Path, nargs="+", required=True, help="JSONL files")
    parser.add_argument("--target", default="smollm2-135m-instruct")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--models", type=int, default=2)
    parser.add_argument("--num", type=int, default=96, help="prompts, from all files alike")
    parser.add_argument("--skip", type=int, default=5, help="of every category, the first ones")
    parser.add_argument("--high", type=int, default=120, help="most tokens of a prompt")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--distill", type=int, default=0)
    parser.add_argument("--marked-weight", type=float, default=0.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--speeds", type=int, default=6, help="held-out prompts that are timed")
    parser.add_argument("--out", type=Path, help="folder to keep; left out: a temporary one")
    parser.add_argument("--name", default="tuning_smollm2")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.out is not None:
        run(options, options.out)
        return
    with tempfile.TemporaryDirectory() as made:
        run(options, Path(made) / "out")


def run(options: argparse.Namespace, folder: Path) -> None:
    """Does all of it in a folder."""
    how: dict[str, Any] = {"backend": "native", "threads": options.threads}
    engine = redwood.load(options.target, "ngram", **how)
    prompts = short_prompts(engine, options)
    plan = TuningPlan(
        target=identity(options.target),
        starts=(),
        layers=options.layers,
        models=options.models,
        prompts=digest(repr(prompts)),
        max_tokens=options.max_tokens,
        distill=options.distill,
        marked_weight=options.marked_weight,
        settings=Settings(
            epochs=options.epochs,
            learning_rate=options.learning_rate,
            distill=options.distill > 0,
        ),
    )
    seconds: dict[str, float] = {}
    began = time.perf_counter(), time.process_time()
    last: list[str] = []

    def tell(what: str, done: int, of: int) -> None:
        if last[-1:] != [what]:
            last.append(what)
            print(f"{time.process_time() - began[1]:7.1f} s of CPU: {what}", flush=True)
        stage = what.partition(":")[0]
        seconds[stage] = round(time.process_time() - began[1], 1)

    def opened(name: str) -> ModelDrafter:
        made = open_drafter(name, engine.tokenizer, **how)
        assert isinstance(made, ModelDrafter)
        return made

    project = Project(folder, plan)
    report = project.report() or project.run(
        engine, prompts, [resolve(options.target)], opened, on_progress=tell
    )
    for row in report["before"]:
        row["folder"] = Path(row["folder"]).name
    held = split(len(prompts), plan.held_out, plan.seed).held_out[: options.speeds]
    parts = {name: opened(str(folder / name)) for name in ("start", *map(str, numbers_of(report)))}
    grams = NgramDrafter()
    sets: dict[str, list[Any]] = {"ngram": [grams], "start": [parts["start"]]}
    tuned = [parts[str(number)] for number in numbers_of(report)]
    sets |= {"1": tuned[:1], "1+2": tuned[:2], "1+ngram": [tuned[0], grams]}
    candidates = [PLAIN, *(Candidate(n, join_drafters(d), _BUDGET) for n, d in sets.items())]
    params = SamplingParams(max_tokens=options.max_tokens)
    timed = [prompts[number] for number in held]
    runs = alternate(engine, candidates, timed, params)
    shown = [asdict(each) for each in reports(engine, candidates, timed, params, runs)]
    result = {
        "command": command(),
        "setting": common.setting(threads=options.threads),
        "cpu_seconds_at_the_end_of": seconds,
        **{name: value for name, value in report.items() if name != "plan"},
        "plan": {n: v for n, v in report["plan"].items() if n not in ("prompts", "target")},
        "speeds": shown,
    }
    common.save(options.name, result)
    for row in [*report["before"], *report["models"], report["union"]]:
        print(row.get("folder", "union"), json.dumps(row["sums"]), json.dumps(row["decoding"]))
    for line in shown:
        print(f"{line['drafter']:8} {line['tokens_per_s']:6.1f} tokens/s", end=" ")
        print(f"x{line['ratio_to_plain']:.2f} {line['ratio_spread']}", end=" ")
        print(f"{line['mean_acceptance_length']:.2f} tokens per pass, same: {line['identical']}")


def numbers_of(report: dict[str, Any]) -> list[int]:
    """Numbers of the tuned models, from 1."""
    return list(range(1, len(report["models"]) + 1))


if __name__ == "__main__":
    main()
