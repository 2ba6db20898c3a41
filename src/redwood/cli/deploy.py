"""`redwood deploy`: several engines behind one address, on Ray Serve."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from redwood.cli import options as o
from redwood.cli.groups import grouped, values
from redwood.cli.serve import FORMATS, Serving, check_packages, serve, settings_of
from redwood.cli.serve_models import Several, plans_of
from redwood.cli.terminal import say, write
from redwood.drafters.names import INDEX, split_names

if TYPE_CHECKING:
    from redwood.server.replicas.plan import DeployPlan

# Options of `redwood serve` that have no meaning, or another one, with several processes.
_NOT_SHARED = {
    "api_key",  # would be written into the configuration
    "keep_answers",
    "share_answers",
    "keep_every",
    "table",  # one process writes a table
    "table_size",
    "shared_table",
    "kv_cache_file",  # as a table
    "models",  # replicas have one model, see `deploy`
    "models_memory",
    "idle_unload",
    "max_connections",  # clients connect to Ray's proxy
    "send_timeout",  # Ray's proxy buffers what a client does not read
    "cpus",  # all replicas would be pinned to the same processors
    "parallel",  # processes that torchrun starts
}
_OF_PLAN = ("target", "drafter", "log_format", "allow_no_key", "api_key_file")
_PANEL = "Replicas"
_ONE_MODEL = "replicas have one model; `redwood serve` has several, or run a deployment for each"


def _option(name: str, text: str, **more: Any) -> Any:
    return typer.Option(name, help=text, rich_help_panel=_PANEL, **more)


def _like_serve(command: Callable[..., int]) -> Callable[..., int]:
    """Gives a command the options of `redwood serve` in addition to its own."""
    shared = inspect.signature(serve).parameters
    taken = [shared[name] for name in shared if name not in _NOT_SHARED]
    own = [
        each
        for each in inspect.signature(command).parameters.values()
        if each.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    hints = {
        **get_type_hints(serve, include_extras=True),
        **get_type_hints(command, include_extras=True),
    }
    every = [each.replace(annotation=hints[each.name]) for each in (*own, *taken)]
    command.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]
    command.__annotations__ = {**{each.name: each.annotation for each in every}, "return": int}
    return command


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(
        epilog=o.examples(
            "redwood deploy --run",
            "redwood deploy --replicas 4 --replica-cpus 8 --api-key-file /etc/redwood/keys "
            "--host 0.0.0.0 > redwood.yaml",
            "serve deploy redwood.yaml",
        )
    )(deploy)


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """How many engines there are; named as the fields of the plan."""

    replicas: Annotated[int, _option("--replicas", "Engines; with --max-replicas, the fewest.")] = 2
    max_replicas: Annotated[
        int | None,
        _option("--max-replicas", "The most that load may start. Left out: no autoscaling."),
    ] = None
    target_ongoing: Annotated[
        float | None,
        _option(
            "--target-ongoing",
            "Requests per engine that autoscaling aims at. Left out: --max-rows.",
        ),
    ] = None
    replica_cpus: Annotated[
        float, _option("--replica-cpus", "Processors, and so threads, of each engine.")
    ] = 1.0
    replica_gpus: Annotated[float, _option("--replica-gpus", "GPUs of each engine.")] = 0.0
    routers: Annotated[int, _option("--routers", "Copies of what stands before them.")] = 1
    retries: Annotated[
        int,
        _option(
            "--retries",
            "How often a request that an engine took with it before it was answered is given to "
            "another one.",
        ),
    ] = 2


@_like_serve
@grouped
def deploy(
    *,
    scaling: Scaling,
    models: Annotated[Path | None, typer.Option("--models", hidden=True)] = None,
    run: Annotated[
        bool,
        _option("--run/--print", "Run it on this machine, or print it for `serve deploy`."),
    ] = False,
    **options: Any,
) -> int:
    """Serves a model by several engines behind one address, on Ray Serve.

    Prints a configuration for `serve run` and `serve deploy`; with --run, starts Ray on this
    machine and serves until Ctrl-C or SIGTERM, which let answers end first. A request whose engine
    dies before it answered anything is given to another one; a stream ends with an error event.
    """
    if models is not None:
        raise o.wrong("--models", _ONE_MODEL)
    plan = _plan(options, **values(scaling))
    check_packages("deploy")
    keys = plan.keys()
    if not run:
        import yaml

        write(yaml.safe_dump(plan.config(), sort_keys=False))
        return 0
    from redwood.server.replicas import check_ray

    check_ray()
    from redwood.server.replicas.running import run as run_here

    def ready(url: str) -> None:
        header = " -H 'Authorization: Bearer KEY'" if len(keys) else ""
        say(f"serving {plan.settings.model_names[0]} at {url}/v1 (Ctrl-C stops)")
        say(f"try: curl {url}/v1/models{header}")

    return run_here(plan, ready)


def _plan(options: Mapping[str, Any], **more: Any) -> DeployPlan:
    from redwood.server.replicas.plan import DeployPlan

    left = dict(options)
    taken = {name: left.pop(name) for name in _OF_PLAN}
    if taken["log_format"] not in FORMATS:
        raise o.wrong("--log-format", f"{taken['log_format']!r} is neither text nor json")
    if len(taken["target"] or ()) > 1:
        raise o.wrong("--target", _ONE_MODEL)
    (model,) = plans_of(taken["target"], Several(), {})
    settings = settings_of(left, [model])
    own = {field.name for field in fields(Serving)}
    left = {name: value for name, value in left.items() if name not in own}
    engine = o.given(**left)
    if "tree" in engine:
        engine["tree"] = o.tree_parents(engine["tree"])
    taken["target"] = _absolute(model.target)
    taken["drafter"] = "+".join(_absolute(part) for part in split_names(taken["drafter"]))
    if taken["api_key_file"] is not None:
        taken["api_key_file"] = str(taken["api_key_file"].absolute())
    return DeployPlan(settings=settings, engine=engine, **taken, **more)


def _absolute(name: str) -> str:
    """The absolute path of a model or index that is a path, else the name as it is."""
    kind = INDEX if name.startswith(INDEX) else ""
    path = Path(name.removeprefix(kind))
    return kind + str(path.absolute()) if path.exists() and name else name
