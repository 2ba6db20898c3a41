"""`redwood bench`: drafters against plain decoding, and the time of one forward."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.progress import Progress
from rich.table import Table

from redwood.cli import options as o
from redwood.cli.groups import KeptTable, Machine, Sampling, grouped, values
from redwood.cli.loading import open_backend, open_candidates
from redwood.cli.terminal import print_json, stderr, stdout, write
from redwood.errors import ArgumentError, CapacityError

if TYPE_CHECKING:
    from redwood.bench.report import Difference, Report
    from redwood.engine.text import Engine


class Task(NamedTuple):
    """A prompt of a benchmark, with its line number in the file."""

    line: int
    prompt: str
    category: str | None


def register(app: typer.Typer) -> None:
    """Adds the group."""
    group = typer.Typer(no_args_is_help=True, help="Measures drafters and forwards.")
    group.command(
        "prompts",
        epilog=o.examples(
            "redwood bench prompts --prompts prompts.jsonl --limit 20",
            "redwood bench prompts --prompts prompts.jsonl --budget 4,8,16 --max-tokens 128",
            "redwood bench prompts --prompts p.jsonl --temperature 0.8 --seed 1 --json",
            "redwood bench prompts --target qwen2.5-coder-1.5b-instruct --prompts p.jsonl "
            "--drafter none,ngram,qwen2.5-coder-0.5b-instruct+ngram --category coding",
        ),
    )(bench_prompts)
    group.command(
        "forward",
        epilog=o.examples(
            "redwood bench forward --tokens 1,2,4,8,16 --context 128",
            "redwood bench forward --target ./model --dtype bfloat16 --json",
        ),
    )(bench_forward)
    app.add_typer(group, name="bench")


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Which prompts are answered, how often, and with trees of which sizes."""

    budget: Annotated[
        str | None,
        typer.Option(
            metavar="N,..",
            help="Nodes scored per step, the root included; each drafter runs with each.",
        ),
    ] = None
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first prompts.")] = None
    category: Annotated[
        list[str] | None, typer.Option(help="Only prompts of this category. Repeatable.")
    ] = None
    repeats: Annotated[int, typer.Option(min=1, help="Runs per prompt and drafter.")] = 1
    raw: Annotated[bool, typer.Option("--raw", help="No chat template.")] = False


@grouped
def bench_prompts(
    *,
    prompts: Annotated[
        Path,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help="Lines of JSON with `prompt` or `turns` (the first is used), maybe `category`.",
        ),
    ],
    target: o.Target = o.DEFAULT_TARGET,
    drafter: Annotated[
        str,
        typer.Option(
            "--drafter",
            "-d",
            metavar="NAME,..",
            help="Drafters to compare: none, ngram, models; + joins several into one tree. "
            "Plain decoding (none) always runs.",
        ),
    ] = f"none,{o.DEFAULT_DRAFTER}",
    chosen: Runs,
    as_json: o.Json = False,
    law: o.LawName = None,
    kept: KeptTable,
    machine: Machine,
    sampling: Sampling,
) -> None:
    """Compares drafters with plain decoding: speed, acceptance, and token for token equality.

    All run in one process on one loaded target, in turns: step by step on CPUs, else answer by
    answer. Speeds are of decoding, prefill apart: medians over the prompts, with quartiles. Answers
    are compared at temperature 0 or with a seed.
    """
    budgets = [] if chosen.budget is None else o.integers("--budget", chosen.budget)
    params = o.sampling(sampling.given())
    tasks = read_tasks(prompts, chosen.category or [])[: chosen.limit]
    names = drafter.split(",")
    engine, candidates = open_candidates(target, names, budgets, law=law, **values(kept, machine))
    from redwood.bench.interleave import alternate
    from redwood.bench.report import reports

    encoded = [encode_task(engine, task, prompts, chosen.raw) for task in tasks]
    with Progress(console=stderr(), transient=True) as progress:
        bar = progress.add_task("Decoding", total=len(tasks) * chosen.repeats * len(candidates))
        runs = alternate(
            engine,
            candidates,
            encoded,
            params,
            repeats=chosen.repeats,
            on_run=lambda: progress.advance(bar),
        )
        made = reports(engine, candidates, encoded, params, runs)
    engine.close()
    if as_json:
        print_json([_as_json(report, tasks) for report in made])
    else:
        _show(engine, made, tasks)


@grouped
def bench_forward(
    *,
    target: o.Target = o.DEFAULT_TARGET,
    tokens: Annotated[
        str, typer.Option(metavar="N,..", help="Numbers of new tokens to time.")
    ] = "1,2,4,8,16",
    context: Annotated[int, typer.Option(min=0, help="Tokens before the new ones.")] = 128,
    repeats: Annotated[int, typer.Option(min=1, help="Forwards per number of tokens.")] = 15,
    as_json: o.Json = False,
    machine: Machine,
) -> None:
    """Times one forward of the target by its number of new tokens: medians, with quartiles."""
    counts = o.integers("--tokens", tokens)
    opened = open_backend(target, **values(machine))
    from redwood.bench.report import forward_times

    with stderr().status("Timing"):
        times = forward_times(opened, counts, context=context, repeats=repeats)
    if as_json:
        print_json({**asdict(times), "target": target})
        return
    table = Table("tokens", "ms", "quartiles", "x 1st")
    for column in table.columns:
        column.justify = "right"
    first = next(iter(times.ms.values()))
    for count, ms in times.ms.items():
        low, high = times.spread[count]
        table.add_row(str(count), f"{ms:.2f}", f"{low:.2f} .. {high:.2f}", f"{ms / first:.2f}")
    stdout().print(table)
    write(
        f"{target}, {times.backend} backend, {times.dtype} on {times.device}, "
        f"{times.context} tokens before, {times.repeats} repeats\n"
    )


def read_tasks(path: Path, categories: Sequence[str] = ()) -> list[Task]:
    """Returns the prompts of a JSON Lines file; only those of `categories`, if any are given.

    Raises:
        ArgumentError: a line without a prompt, no prompt at all, or none of a category.
    """
    tasks = []
    for number, line in enumerate(o.read_text(path).split("\n"), start=1):
        if line.strip():
            tasks.append(_task(line, number, path))
    if not tasks:
        raise ArgumentError(f"{path} holds no prompts")
    known = sorted({task.category for task in tasks if task.category is not None})
    for category in categories:
        if category not in known:
            named = ", ".join(known) or "none at all"
            raise ArgumentError(f"{path} has no category {category!r}: it has {named}")
    return [task for task in tasks if not categories or task.category in categories]


def _task(line: str, number: int, path: Path) -> Task:
    try:
        entry = json.loads(line)
        prompt = entry["prompt"] if "prompt" in entry else entry["turns"][0]
        category = entry.get("category")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        prompt = category = None
    if not isinstance(prompt, str) or not prompt:
        raise ArgumentError(
            f"{path} line {number} must be a JSON object with `prompt` or `turns` that is not empty"
        )
    return Task(number, prompt, category if isinstance(category, str) else None)


def encode_task(engine: Engine, task: Task, path: Path, raw: bool) -> list[int]:
    """Returns the token ids of a prompt, by the model's chat template unless it is `raw`.

    Raises:
        CapacityError: the prompt fills the whole context; the message names its line.
    """
    templated = not raw and engine.tokenizer.chat_template
    tokens = engine.encode([{"role": "user", "content": task.prompt}] if templated else task.prompt)
    if len(tokens) >= engine.target.capacity:  # checked before hours of runs, not after
        raise CapacityError(
            f"{path} line {task.line}: the prompt has {len(tokens)} tokens, the context holds "
            f"{engine.target.capacity} with the answer: shorten it or leave it out"
        )
    return tokens


def _as_json(report: Report, tasks: Sequence[Task]) -> dict[str, Any]:
    differences = [
        {**asdict(difference), "line": tasks[difference.prompt].line}
        for difference in report.differences
    ]
    return {**asdict(report), "differences": differences}


def _show(engine: Engine, made: Sequence[Report], tasks: Sequence[Task]) -> None:
    stdout().print(_table(made))
    lines = [_line(engine, report, tasks, d) for report in made for d in report.differences]
    if made[0].identical is None:
        lines.append("Answers are not compared: sampling without a seed gives another each time.")
    write("".join(f"{line}\n" for line in lines))


def _table(made: Sequence[Report]) -> Table:
    table = Table(
        "drafter", "budget", "tokens/s", "x plain", "tokens/pass", "identical", "near ties"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for report in made:
        speed, ratio = report.tokens_per_s_spread, report.ratio_spread
        same, ties = "not compared", ""
        if report.identical is not None:
            same, ties = f"{report.num_identical}/{report.num_prompts}", str(report.num_near_ties)
        table.add_row(
            report.drafter,
            "auto" if report.budget is None else str(report.budget),
            f"{report.tokens_per_s:.1f} ({speed[0]:.1f} .. {speed[1]:.1f})",
            f"{report.ratio_to_plain:.2f} ({ratio[0]:.2f} .. {ratio[1]:.2f})",
            f"{report.mean_acceptance_length:.2f}",
            same,
            ties,
        )
    return table


def _line(engine: Engine, report: Report, tasks: Sequence[Task], found: Difference) -> str:
    def named(token: int | None) -> str:
        return "the end" if token is None else repr(engine.tokenizer.decode([token]))

    margin = "one choice only" if found.margin is None else f"margin {found.margin:.3g}"
    return (
        f"{report.drafter} (budget {report.budget or 'auto'}), line {tasks[found.prompt].line}: "
        f"token {found.position} is {named(found.token)} where plain decoding has "
        f"{named(found.plain_token)}; {margin}" + (", a near tie" if found.near_tie else "")
    )
