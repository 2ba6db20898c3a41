"""Everything that is measured on a GPU, in one command: exactness, speed, t(n), the planner.

    python benchmarks/gpu/run.py --quick                      # under 8 minutes on an H100
    python benchmarks/gpu/run.py --parts exact,curve --json out.json
    python benchmarks/gpu/run.py --device cpu --tiny          # a dry run, on a tiny random model

Parts: `exact` compares trees with plain decoding, `curve` times one forward of n nodes, `table`
compares ways to generate, `plan` checks the planner's prediction. The result file is written after
each of them. What is measured on is in `subjects.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import exact
import plan
import show
import torch
from subjects import PROMPTS, Subject, large, open_source, small
from transformers.utils import logging as transformers_logging

import table
from redwood.bench.report import forward_times
from redwood.sampling import SamplingParams

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import setting

PARTS = ("exact", "curve", "table", "plan")
BUDGETS = [8, 16, 32, 64, 128]
COUNTS = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256]
CONTEXTS = [128, 1024]
TEMPERATURES = [0.0, 0.6]


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parse(arguments)
    transformers_logging.set_verbosity_error()  # its notes would stand between the tables
    device = torch.device(args.device)
    start = time.monotonic()

    def left() -> float:
        return 60.0 * float(args.minutes) - (time.monotonic() - start)

    source = open_source(args, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    result: dict[str, Any] = {"setting": _setting(args, device)}
    for name, make in (("small", small), ("grown", large)):
        if name not in args.subjects:
            continue
        subject = make(source, args)
        for part in (part for part in PARTS if part in args.parts):
            if left() <= 0.0:
                print(f"no time left for {name}: {part}", file=sys.stderr, flush=True)
                continue
            begun = time.monotonic()
            rows = _run(part, subject, args, left, result)
            result.setdefault(part, []).extend({"subject": name, **row} for row in rows)
            show.part(part, name, rows)
            print(f"{name} {part}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
            if args.json:
                args.json.write_text(json.dumps(result, indent=1) + "\n")
        del subject


def _run(
    part: str, subject: Subject, args: Any, left: Callable[[], float], result: dict[str, Any]
) -> list[dict[str, Any]]:
    if part == "exact":
        rows = exact.probes(subject)
        return rows + exact.answers(
            subject, args.exact_budgets, args.exact_prompts, args.max_tokens
        )
    if part == "curve":
        return curve(subject, args)
    rows = []
    for temperature in TEMPERATURES:
        params = SamplingParams(max_tokens=args.max_tokens, temperature=temperature)
        if rows and left() <= 0.0:
            break
        if part == "table":
            subject.prepare([1, 2, 4, *args.budgets], args.max_tokens)
            rows += table.measure(subject, table.ways(subject, args.budgets), params, left)
        else:
            times = _times(subject, args, result)
            rows.append(plan.plan(subject, times, params, args.plan_size))
    return rows


def curve(subject: Subject, args: Any) -> list[dict[str, Any]]:
    """Times one forward of each number of nodes, on both backends, behind each context."""
    found = []
    for context in args.contexts:
        for engine in (subject.eager, subject.graphs):
            found.append(
                asdict(
                    forward_times(engine.target, args.counts, context=context, repeats=args.repeats)
                )
            )
    return found


def _times(subject: Subject, args: Any, result: dict[str, Any]) -> dict[int, float]:
    """Ms by number of nodes on graphs behind the first context, measured now where not yet."""
    for row in result.get("curve", []):
        if (row["subject"], row["backend"]) == (subject.name, "cuda_graph"):
            ms: dict[int, float] = row["ms"]
            return ms
    target = subject.graphs.target
    return forward_times(target, args.counts, context=args.contexts[0], repeats=args.repeats).ms


def _parse(arguments: Sequence[str] | None) -> Any:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu with --tiny")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model and few turns")
    parser.add_argument("--quick", action="store_true", help="fewer prompts, tokens and turns")
    parser.add_argument("--parts", type=_names(PARTS), default=list(PARTS))
    parser.add_argument("--subjects", type=_names(("small", "grown")), default=["small", "grown"])
    parser.add_argument(
        "--model",
        default="smollm2-135m-instruct",
        help="a name, a folder, or random: for times alone",
    )
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="JSONL with `prompt`")
    parser.add_argument("--num-prompts", type=int, help="default 8; 3 with --quick")
    parser.add_argument("--max-tokens", type=int, help="default 128; 48 with --quick")
    parser.add_argument("--repeats", type=int, help="of a forward; default 15; 5 with --quick")
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS)
    parser.add_argument("--noise", type=float, default=0.05, help="of the grown model's drafter")
    parser.add_argument("--draft-layers", type=int, default=4, help="of 30; the small model's")
    parser.add_argument("--capacity", type=int, default=2048, help="slots per row")
    parser.add_argument(
        "--minutes", type=float, help="begin nothing after these; 9; 7 with --quick"
    )
    parser.add_argument("--json", type=Path, help="where results go")
    args = parser.parse_args(arguments)
    if args.device != "cpu" and not torch.cuda.is_available():
        parser.error("no CUDA device here; --device cpu --tiny is a dry run of this command")
    if args.device == "cpu" and not args.tiny:
        parser.error("--device cpu is for dry runs: add --tiny")
    short = args.quick or args.tiny
    for name, usual, quick in (
        ("num_prompts", 8, 3),
        ("max_tokens", 128, 48),
        ("repeats", 15, 5),
        ("minutes", 9.0, 7.0),
    ):
        if getattr(args, name) is None:
            setattr(args, name, quick if short else usual)
    args.counts, args.contexts = COUNTS, CONTEXTS
    args.exact_budgets, args.exact_prompts = [4, 16, 64], 2 if short else args.num_prompts
    args.plan_size = 32
    if args.tiny:
        args.capacity, args.budgets, args.max_tokens, args.repeats = 256, [6], 6, 1
        args.counts, args.contexts, args.plan_size = [1, 2, 8], [16, 40], 8
        args.exact_budgets = [6]
    return args


def _names(known: Sequence[str]) -> Callable[[str], list[str]]:
    def parsed(text: str) -> list[str]:
        given = text.split(",")
        wrong = [name for name in given if name not in known]
        if wrong:
            raise argparse.ArgumentTypeError(f"{wrong[0]!r} is not one of {', '.join(known)}")
        return given

    return parsed


def _setting(args: Any, device: torch.device) -> dict[str, Any]:
    gpu = None
    if device.type == "cuda":
        gpu = {"name": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    options = {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()}
    return setting(gpu=gpu, options=options)


if __name__ == "__main__":
    main()
