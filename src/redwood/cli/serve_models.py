"""Which models a server has: --target, maybe several times, or --models FILE."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from redwood.cli import options as o
from redwood.cli.groups import Drafting, Machine, Prompts
from redwood.errors import ArgumentError

_PANEL = "Several models"
FILES = {"table": "--table", "kv_cache_file": "--kv-cache-file", "keep_answers": "--keep-answers"}
"""Options that name what one model writes."""
_ONE_ONLY = ("parallel", "offload", "memory")  # they speak of the whole process
_OWN: Mapping[str, type] = {
    "max_rows": int,
    "kv_tokens": int,
    "tool_parser": str,
    "keep_answers": str,
}


def _option(name: str, text: str, **more: Any) -> Any:
    return typer.Option(name, help=text, rich_help_panel=_PANEL, **more)


Targets = Annotated[
    list[str] | None,
    typer.Option(
        "--target",
        "-t",
        metavar="[NAME=]MODEL",
        help="The model that answers: a packaged name, a folder, a .gguf file or a hub id; NAME is "
        "what clients call it. Several: requests choose by `model`, the first is the default.",
        show_default=o.DEFAULT_TARGET,
        rich_help_panel="Model",
    ),
]


@dataclass(frozen=True, kw_only=True)
class ServedDrafting(Drafting):
    """As `Drafting`, with several targets."""

    target: Targets = None  # type: ignore[assignment]


@dataclass(frozen=True, kw_only=True)
class Several:
    """Several models in one server."""

    models: Annotated[
        Path | None,
        _option(
            "--models",
            "A JSON list of models, in place of --target: each an object with `target`, maybe "
            "`name`, and options of its own, such as `drafter`.",
            metavar="FILE",
        ),
    ] = None
    models_memory: Annotated[
        str | None,
        _option(
            "--models-memory",
            "What the weights of all loaded models may take, such as 8GiB: the one not used for "
            "longest goes. Left out: half of what is free at the start.",
            metavar="SIZE",
        ),
    ] = None
    idle_unload: Annotated[
        float | None,
        _option("--idle-unload", "Unload a model that nobody used for so many seconds."),
    ] = None

    def __post_init__(self) -> None:
        if self.idle_unload is not None and not 0.0 < self.idle_unload < float("inf"):
            raise o.wrong("--idle-unload", f"{self.idle_unload} must be above 0")

    @property
    def asked(self) -> bool:
        """Whether one of these options was given: then also one model comes and goes."""
        return any(getattr(self, each.name) is not None for each in fields(self))


@dataclass(frozen=True)
class ModelPlan:
    """One model to be served.

    Args:
        names: under which; empty: the target's own.
        target: as for `redwood.load`.
        options: those of the command line, its own in place of what all have.
    """

    names: tuple[str, ...]
    target: str
    options: Mapping[str, Any] = field(default_factory=dict)


def plans_of(
    targets: Sequence[str] | None, several: Several, options: Mapping[str, Any]
) -> list[ModelPlan]:
    """Returns the models that the command line names, the default one first.

    Args:
        options: that hold for all of them, by name.

    Raises:
        typer.BadParameter, ArgumentError: what cannot be, in one line.
    """
    if several.models is not None:
        if targets:
            raise o.wrong("--models", "it names the targets: leave --target out")
        plans = _read(several.models, options)
    else:
        named = [_split(each) for each in targets or [o.DEFAULT_TARGET]]
        plans = [ModelPlan(names, target, options) for names, target in named]
    if len(plans) > 1 or several.asked:
        _check(plans, options)
    return plans


def _split(text: str) -> tuple[tuple[str, ...], str]:
    """Names and target of NAME=MODEL; a path that is there is no name."""
    name, sign, target = text.partition("=")
    if not sign or not name or not target or "/" in name or Path(text).exists():
        return (), text
    return (name,), target


def _check(plans: Sequence[ModelPlan], options: Mapping[str, Any]) -> None:
    for name in _ONE_ONLY:
        if options.get(name) is not None:
            raise o.wrong(f"--{name}", "it is for a server with one model that stays loaded")
    if len(plans) == 1:
        return
    if options.get("served_name"):
        raise o.wrong("--served-name", "there are several models: --target NAME=MODEL names one")
    for option, spelled in FILES.items():
        written: dict[Path, ModelPlan] = {}
        for plan in plans:
            if (path := plan.options.get(option)) is None:
                continue
            other = written.setdefault(Path(path).resolve(), plan)
            if other is not plan:
                raise o.wrong(
                    spelled,
                    f"{path} cannot be kept for two models: give each its own, as "
                    f"`{option}` in --models FILE",
                )


def _kinds() -> dict[str, type]:
    """What one model may have of its own: option -> int or str."""
    kinds = dict(_OWN)
    for group in (Drafting, Machine, Prompts):
        hints = get_type_hints(group)
        for each in fields(group):
            kinds[each.name] = int if int in (get_args(hints[each.name]) or ()) else str
    del kinds["target"]
    return kinds


def _read(path: Path, options: Mapping[str, Any]) -> list[ModelPlan]:
    value = o.read_json(path)
    if isinstance(value, dict) and set(value) == {"models"}:
        value = value["models"]
    if not isinstance(value, list) or not value:
        raise ArgumentError(f'{path} must hold a list of models, such as [{{"target": "NAME"}}]')
    return [_plan(f"model {i} of {path}", each, options) for i, each in enumerate(value, 1)]


def _plan(where: str, value: Any, options: Mapping[str, Any]) -> ModelPlan:
    if not isinstance(value, dict):
        raise ArgumentError(f"{where} must be an object with a target")
    own, kinds = dict(value), _kinds()
    target, name = own.pop("target", None), own.pop("name", None)
    aliases = own.pop("aliases", [])
    for field_name, text in (("target", target), ("name", "unnamed" if name is None else name)):
        if not isinstance(text, str) or not text:
            raise ArgumentError(f"{where}: {field_name} must be a text that is not empty")
    if not isinstance(aliases, list) or not all(isinstance(a, str) and a for a in aliases):
        raise ArgumentError(f"{where}: aliases must be a list of names")
    if aliases and name is None:
        raise ArgumentError(f"{where}: aliases are further names: give `name`, too")
    for option, given in own.items():
        if option not in kinds:
            near = difflib.get_close_matches(option, kinds, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ArgumentError(f"{where}: a model has no option {option!r}{hint}")
        kind = kinds[option]
        if type(given) is not kind:
            wanted = "a whole number" if kind is int else "a text"
            raise ArgumentError(f"{where}: {option} must be {wanted}, not {given!r}")
        if isinstance(given, int) and given < 0:  # now, not when a request has it loaded
            raise ArgumentError(f"{where}: {option} {given} must not be negative")
    for option in FILES:
        if option in own:
            own[option] = Path(own[option])
    names = () if name is None else (name, *aliases)
    return ModelPlan(names, target, {**options, **own})
