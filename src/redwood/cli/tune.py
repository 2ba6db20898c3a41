"""`redwood tune`: trains small draft models on a target's own answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.progress import Progress, TaskID
from rich.table import Table

from redwood._defaults import Tuning
from redwood.cli import options as o
from redwood.cli.bench import Task, encode_task, read_tasks
from redwood.cli.groups import Machine, Offloading, grouped, values
from redwood.cli.loading import open_engine
from redwood.cli.terminal import print_json, say, stderr, stdout, write

if TYPE_CHECKING:
    from redwood.drafters.base import ModelDrafter
    from redwood.tuning.project import TuningPlan

_OF_ANSWERS = ("backend", "dtype", "device", "weights", "kv", "offload")
"""Options of the target that may change its answers, through rounding."""
_OF_TARGET = ("capacity", "offload", "memory")
_TRAINING, _BOOSTING = "Training", "Boosting"


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(
        epilog=o.examples(
            "redwood tune --target smollm2-135m-instruct --layers 4 --prompts p.jsonl --out tuned",
            "redwood tune --target qwen2.5-coder-1.5b-instruct --from qwen2.5-coder-0.5b-instruct "
            "--models 2 --prompts p.jsonl --out tuned --distill 10",
            "redwood generate Hello --target qwen2.5-coder-1.5b-instruct "
            "--drafter tuned/1+tuned/2+ngram",
        )
    )(tune)


def _option(name: str, help_text: str, panel: str, **more: Any) -> Any:
    default = o.shown(name.removeprefix("--").replace("-", "_"), Tuning)
    return typer.Option(name, help=help_text, show_default=default, rich_help_panel=panel, **more)


@dataclass(frozen=True, kw_only=True)
class Answering:
    """The target's answers, and which are held out; named as the fields of `TuningPlan`."""

    max_tokens: Annotated[
        int | None, _option("--max-tokens", "Tokens of each answer.", _TRAINING)
    ] = None
    temperature: Annotated[float | None, _option("--temperature", "Of the answers.", _TRAINING)] = (
        None
    )
    distill: Annotated[
        int | None,
        _option(
            "--distill",
            "Learn the law over the target's K best tokens at each place, not the answer's alone.",
            _TRAINING,
            metavar="K",
        ),
    ] = None
    held_out: Annotated[
        float | None,
        _option(
            "--held-out",
            "Share of the prompts that is measured on; as many choose the epoch.",
            _TRAINING,
        ),
    ] = None
    marked_weight: Annotated[
        float | None,
        _option(
            "--marked-weight",
            "Of tokens that an earlier model knows, for the models after it.",
            _BOOSTING,
        ),
    ] = None
    seed: Annotated[int | None, _option("--seed", "Of answers, split and order.", _TRAINING)] = None


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a model is trained; named as the fields of `Settings`."""

    epochs: Annotated[int | None, _option("--epochs", "Passes over the answers.", _TRAINING)] = None
    learning_rate: Annotated[
        float | None, _option("--learning-rate", "The highest one.", _TRAINING)
    ] = None
    batch_tokens: Annotated[
        int | None, _option("--batch-tokens", "Tokens per step of training.", _TRAINING)
    ] = None
    patience: Annotated[
        int | None,
        _option("--patience", "Epochs without gain before the training ends.", _TRAINING),
    ] = None


@dataclass(frozen=True, kw_only=True)
class Starting:
    """The models that are tuned."""

    start: Annotated[
        list[str] | None,
        typer.Option(
            "--from",
            metavar="MODEL",
            help="A small model to begin with. Given several times: one for each to be tuned.",
        ),
    ] = None
    layers: Annotated[
        int | None, typer.Option(min=1, help="Begin with the target's own first layers.")
    ] = None
    models: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="How many to tune. Left out: one for each --from.",
            rich_help_panel=_BOOSTING,
        ),
    ] = None


@grouped
def tune(
    *,
    prompts: Annotated[
        Path,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help="Lines of JSON with `prompt` or `turns` (the first is used).",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER",
            help="Gets 1, 2, ..., each a drafter, and tune.json. The same command again goes on.",
        ),
    ],
    target: o.Target = o.DEFAULT_TARGET,
    starting: Starting,
    drafter: o.DrafterName = o.DEFAULT_DRAFTER,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template.")] = False,
    answering: Answering,
    training: Training,
    as_json: o.Json = False,
    machine: Machine,
    offloading: Offloading,
) -> None:
    """Tunes small models on the target's own answers, so that they draft better for it.

    The target answers the prompts; each model learns what those before it get wrong; acceptance is
    measured before and after, on prompts that nothing was learned from. No answer changes by it.
    """
    starts, layers = starting.start or [], starting.layers
    if bool(starts) == (layers is not None):
        raise o.wrong("--from", "give either --from MODEL or --layers N, to begin with")
    if "+" in str(out):
        raise o.wrong("--out", f"{str(out)!r} holds a +, which joins drafters: choose another name")
    tasks = _tasks(prompts)
    options = values(machine, offloading)
    answers = o.given(**values(answering))
    learning = o.given(**values(training), seed=answering.seed)
    with stderr().status("Looking at the models"):
        from redwood.tuning.project import Project

        plan = _plan(
            target, starts, layers, starting.models, tasks, raw, options, answers, learning
        )
        project = Project(out, plan)
        report = project.report()
    if report is None:
        report = _run(project, target, drafter, starts, tasks, prompts, raw, options)
    if as_json:
        print_json({"path": str(out), **report})
    else:
        _show(report, out, target)


def _tasks(path: Path) -> list[Task]:
    """The prompts without duplicates, so that none is both trained on and held out."""
    tasks = read_tasks(path)
    once = list({task.prompt: task for task in reversed(tasks)}.values())[::-1]
    if len(once) < len(tasks):
        say(f"{path}: {len(tasks) - len(once)} prompts stand there twice and are left out")
    return once


def _plan(
    target: str,
    starts: Sequence[str],
    layers: int | None,
    models: int | None,
    tasks: Sequence[Task],
    raw: bool,
    options: dict[str, Any],
    answers: dict[str, Any],
    training: dict[str, Any],
) -> TuningPlan:
    from redwood._storage import digest
    from redwood.tuning.project import TuningPlan, identity, split
    from redwood.tuning.training import Settings

    settings = Settings(distill=bool(answers.get("distill")), **training)
    made = TuningPlan(
        target=identity(target),
        starts=tuple(identity(name) for name in starts),
        layers=layers,
        models=models or max(1, len(starts)),
        prompts=digest(json.dumps([raw, *(task.prompt for task in tasks)])),
        options={name: str(value) for name, value in _known(options, _OF_ANSWERS).items()},
        settings=settings,
        **answers,
    )
    split(len(tasks), made.held_out, made.seed)  # refuses too few before anything is loaded
    return made


def _known(options: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: options[name] for name in names if options[name] is not None}


def _run(
    project: Any,
    target: str,
    drafter: str,
    starts: Sequence[str],
    tasks: Sequence[Task],
    path: Path,
    raw: bool,
    options: dict[str, Any],
) -> dict[str, Any]:
    engine = open_engine(target, drafter, **options)
    import torch

    from redwood.engine.load import open_drafter
    from redwood.models import resolve
    from redwood.models.tokenizer import check_same_tokens, load_tokenizer

    folders = [resolve(name, progress=True) for name in starts or [target]]
    for folder in folders if starts else []:  # before hours of work, not after
        check_same_tokens(engine.tokenizer, load_tokenizer(folder))
    own = {name: value for name, value in o.given(**options).items() if name not in _OF_TARGET}
    if "cpus" in own:
        own["cpus"] = o.integers("--cpus", own["cpus"])
    if "offload" in options and options["offload"] is not None:
        own.pop("weights", None)

    def open_draft(folder: str) -> ModelDrafter:
        return cast("ModelDrafter", open_drafter(folder, engine.tokenizer, **own))

    encoded = [encode_task(engine, task, path, raw) for task in tasks]
    place = options["device"] or "auto"
    if place == "auto":
        place = "cuda" if torch.cuda.is_available() else "cpu"
    with _bars() as show_progress:
        made: dict[str, Any] = project.run(
            engine, encoded, folders, open_draft, device=place, on_progress=show_progress
        )
    return made


@contextmanager
def _bars() -> Iterator[Callable[[str, int, int], None]]:
    """Yields a callback that shows progress: a bar for each stage."""
    bars: dict[str, TaskID] = {}
    console = stderr()
    # Disabled unless on a terminal: it would print an empty line.
    with Progress(console=console, disable=not console.is_terminal) as progress:

        def show_progress(what: str, done: int, of: int) -> None:
            if what not in bars:
                bars[what] = progress.add_task(what, total=of)
            progress.update(bars[what], completed=done, total=of)

        yield show_progress


def _show(report: dict[str, Any], out: Path, target: str) -> None:
    table = Table("on held-out prompts", "1st", "of 2", "of 4", "of 8", "tokens per pass", "same")
    for column in table.columns[1:]:
        column.justify = "right"
    rows = [(f"before: {Path(row['folder']).name}", row) for row in report["before"]]
    rows += [(f"{row['folder']}, tuned", row) for row in report["models"]]
    if len(report["models"]) > 1:
        rows.append(("all of them in one tree", report["union"]))
    for name, row in rows:
        sums, decoding = row["sums"], row["decoding"]
        table.add_row(
            name,
            *(f"{sums[count - 1]:.3f}" for count in (1, 2, 4, 8)),
            f"{decoding['mean_acceptance_length']:.2f}",
            f"{decoding['identical']}/{decoding['of']}",
        )
    stdout().print(table)
    budget = report["union"]["decoding"]["budget"]
    write(
        f"Share of tokens among the first 1, 2, 4, 8 candidates; tokens per pass of trees of "
        f"{budget} nodes; answers that are the same.\n"
    )
    for row in report["models"]:
        write(f"{row['folder']}: {row['left']} of {row['of']} tokens were left to learn; ")
        write(f"best after epoch {row['history']['best']} of {len(row['history']['losses'])}\n")
    missing = report["plan"]["models"] - len(report["models"])
    if missing:
        write(f"No token was left to learn for {missing} more.\n")
    joined = "+".join(str(out / row["folder"]) for row in report["models"])
    write(f"Use: --target {target} --drafter {joined}+ngram\n")
