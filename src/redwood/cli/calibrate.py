"""`redwood calibrate`: measures this machine, the target and the drafters; stores a profile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress, TaskID

from redwood.cli import options as o
from redwood.cli.bench import Task, read_tasks
from redwood.cli.groups import Machine, Offloading, grouped, values
from redwood.cli.loading import open_candidates
from redwood.cli.profile_tables import show
from redwood.cli.terminal import print_json, say, stderr
from redwood.drafters.names import AUTO, NGRAM, NONE, TABLE
from redwood.errors import ArgumentError, CapacityError, ProfileError

if TYPE_CHECKING:
    from redwood.drafters.base import Drafter
    from redwood.engine.text import Engine
    from redwood.profiling.profile import Profile, ProfileKey

BUILT_IN = Path(__file__).parent.parent / "data" / "calibration.jsonl"
"""Prompts of several kinds, for when none are given."""

_TEMPERATURES = "0,0.6"
_MAX_TOKENS = 64
_LEAST_ANSWER = 16  # tokens of the context that a prompt must leave free


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(
        epilog=o.examples(
            "redwood calibrate",
            "redwood calibrate --plot profile.png",
            "redwood calibrate --target qwen2.5-coder-1.5b-instruct "
            "--drafter ngram,qwen2.5-coder-0.5b-instruct --prompts prompts.jsonl --force",
            "redwood calibrate --temperatures 0 --json",
        )
    )(calibrate)


@dataclass(frozen=True, kw_only=True)
class Answering:
    """What is answered to measure acceptance."""

    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Lines of JSON with `prompt` or `turns`. Left out: 16 built-in ones.",
        ),
    ] = None
    temperatures: Annotated[
        str | None,
        typer.Option(
            metavar="T,..",
            help=f"Temperatures to measure at. Left out: {_TEMPERATURES}.",
        ),
    ] = None
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = _MAX_TOKENS


@grouped
def calibrate(
    *,
    target: o.Target = o.DEFAULT_TARGET,
    drafter: Annotated[
        str,
        typer.Option(
            "--drafter",
            "-d",
            metavar="NAME,..",
            help="Drafters to measure, each alone: ngram, models; none measures the target only.",
        ),
    ] = o.DEFAULT_DRAFTER,
    answering: Answering,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the profile to this .png, .svg or .pdf file."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Measure even if there is a valid profile.")
    ] = False,
    as_json: o.Json = False,
    machine: Machine,
    offloading: Offloading,
) -> None:
    """Measures times and acceptance, keeps them as a profile, and shows what they promise.

    A valid profile is shown, not made again. It depends on models, backend, options and machine.
    """
    wanted, prompts = _temperatures(answering.temperatures), answering.prompts
    tasks = read_tasks(BUILT_IN if prompts is None else prompts)
    if plot is not None:
        from redwood.bench.plot import check_plot

        check_plot(plot)
    names = _alone(drafter)
    engine, candidates = open_candidates(target, names, [1], **values(machine, offloading))
    from redwood.profiling.profile import profile_path

    drafters = {each.name: each.drafter for each in candidates[1:]}
    key = _key(engine, target, drafters, machine)
    path = profile_path(key)
    old = _existing(path, key)
    profile = old if old and not force and _serves(old, key, wanted, path) else None
    if profile is None:
        encoded = _encode(engine, tasks, prompts)
        profile = _measure(engine, drafters, encoded, key, wanted, answering.max_tokens)
        if old is not None:
            profile = profile.with_drafters_of(old)
        profile.save(path)
    if plot is not None:
        from redwood.bench.plot import plot as plot_profile

        plot_profile(profile, plot)
    _report(profile, path, as_json)


def _alone(drafter: str) -> list[str]:
    """The drafters to measure, each alone; of `auto`, n-grams only, since its table is empty."""
    given = dict.fromkeys(drafter.replace("+", ",").split(","))
    if TABLE in given:
        raise o.wrong("--drafter", "a table begins empty: there is nothing to measure of it")
    return [NGRAM if name == AUTO else name for name in given if name != NONE]


def _key(
    engine: Engine, target: str, drafters: Mapping[str, Drafter], machine: Machine
) -> ProfileKey:
    from redwood.profiling.key import profile_key

    pinned = None if machine.cpus is None else o.integers("--cpus", machine.cpus)
    how = {"weights": machine.weights, "kv": machine.kv}
    return profile_key(engine.target, target, drafters, cpus=pinned, **how)


def _temperatures(text: str | None) -> list[float]:
    made = o.rates("--temperatures", _TEMPERATURES if text is None else text)
    if not all(0.0 <= temperature <= 10.0 for temperature in made):
        raise o.wrong("--temperatures", f"{text!r} must hold numbers from 0 to 10")
    return list(dict.fromkeys(made))


def _existing(path: Path, key: ProfileKey) -> Profile | None:
    """The stored profile, for any drafters; None if there is none or it cannot be read."""
    from redwood.profiling.profile import Profile

    if not path.exists():
        return None
    try:
        return Profile.load(path, replace(key, drafters={}))
    except ProfileError as error:
        say(f"{error}; measuring again")
        return None


def _serves(profile: Profile, key: ProfileKey, temperatures: Sequence[float], path: Path) -> bool:
    """Whether a profile has what is asked for; writes to stderr what it lacks."""
    from redwood.profiling.profile import temperature_name

    lack = profile.key.difference(key)
    for name in key.drafters if lack is None else ():
        drafter = profile.drafters[name]
        known = {*drafter.acceptance, *drafter.tokens_by_size}
        for temperature in map(temperature_name, temperatures):
            if temperature not in known:
                lack = f"{name} was not measured at temperature {temperature}"
    if lack is not None:
        say(f"{path}: {lack}; measuring again")
    return lack is None


def _chats(engine: Engine) -> bool:
    """Whether the model has a chat template that works; without one prompts are plain text."""
    if not engine.tokenizer.chat_template:
        return False
    try:
        engine.encode([{"role": "user", "content": "Hello"}])
    except ArgumentError as error:
        say(f"{error}; measuring with plain text")
        return False
    return True


def _encode(engine: Engine, tasks: Sequence[Task], given: Path | None) -> list[list[int]]:
    """Token ids of the prompts that leave `_LEAST_ANSWER` tokens of the context free.

    All prompts of the user's must do so; built-in prompts that do not are skipped.
    """
    chat = _chats(engine)
    made, most = [], engine.target.capacity - _LEAST_ANSWER
    for task in tasks:
        message = [{"role": "user", "content": task.prompt}]
        tokens = engine.encode(message if chat else task.prompt)
        if len(tokens) <= most:
            made.append(tokens)
        elif given is not None:
            raise CapacityError(
                f"{given} line {task.line}: the prompt has {len(tokens)} tokens, which leaves no "
                f"room in a context of {engine.target.capacity}: shorten it or leave it out"
            )
    if not made:
        raise CapacityError(f"a context of {engine.target.capacity} holds none of the prompts")
    return made


def _measure(
    engine: Engine,
    drafters: Mapping[str, Drafter],
    prompts: Sequence[Sequence[int]],
    key: ProfileKey,
    temperatures: Sequence[float],
    max_tokens: int,
) -> Profile:
    from redwood.bench.calibrate import calibrate as measure

    with _bars() as show_progress:
        return measure(
            engine,
            drafters,
            prompts,
            key=key,
            temperatures=temperatures,
            max_tokens=max_tokens,
            on_progress=show_progress,
        )


@contextmanager
def _bars() -> Iterator[Callable[[str, int, int], None]]:
    """Yields a callback that shows progress: a bar for each measurement."""
    bars: dict[str, TaskID] = {}
    console = stderr()
    # Disabled unless on a terminal: it would print an empty line.
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:

        def show_progress(what: str, done: int, of: int) -> None:
            if what not in bars:
                bars[what] = progress.add_task(what, total=of)
            progress.update(bars[what], completed=done, total=of)

        yield show_progress


def _report(profile: Profile, path: Path, as_json: bool) -> None:
    from redwood.bench.choice import choices

    made = choices(profile)
    if as_json:
        value: dict[str, Any] = {
            "path": str(path),
            "profile": asdict(profile),
            "choices": [choice._asdict() for choice in made],
        }
        print_json(value)
    else:
        show(profile, made, path)
