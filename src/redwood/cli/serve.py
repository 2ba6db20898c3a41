"""`redwood serve`: an OpenAI-compatible server."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from redwood._defaults import Loading as _defaults
from redwood.cli import options as o
from redwood.cli.groups import Machine, Placement, Prompts, grouped, values
from redwood.cli.loading import follow_if_not_first
from redwood.cli.serve_models import ModelPlan, ServedDrafting, Several, plans_of
from redwood.cli.terminal import say
from redwood.errors import UnsupportedError
from redwood.server.settings import Settings
from redwood.server.tools.names import FORMATS as FORMATS_OF_CALLS

if TYPE_CHECKING:
    from redwood.engine.text import Engine
    from redwood.server.auth import Keys
    from redwood.server.served import Served

_PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "llguidance")
FORMATS = ("text", "json")
_DEFAULT = Settings(model_names=("model",))
_SERVER, _LIMITS = "Server", "Limits"


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(
        epilog=o.examples(
            "redwood serve",
            "redwood serve --target qwen2.5-coder-1.5b-instruct "
            "--drafter qwen2.5-coder-0.5b-instruct+ngram",
            "redwood serve --host 0.0.0.0 --api-key-file keys.txt --log-format json",
            "curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' "
            """-d '{"messages": [{"role": "user", "content": "Name three trees."}]}'""",
        )
    )(serve)


def _option(name: str, text: str, panel: str = _SERVER, **more: Any) -> Any:
    return typer.Option(name, help=text, rich_help_panel=panel, **more)


@dataclass(frozen=True, kw_only=True)
class Serving:
    """Settings of the server; named as the fields of `Settings`, times without `_s`."""

    host: Annotated[str, _option("--host", "Address to listen on.")] = _DEFAULT.host
    port: Annotated[int, _option("--port", "0: any free one.", min=0, max=65535)] = _DEFAULT.port
    served_name: Annotated[
        list[str] | None,
        _option(
            "--served-name",
            "What clients call the model. Left out: the target's name. Repeatable.",
            metavar="NAME",
        ),
    ] = None
    allowed_host: Annotated[
        list[str] | None,
        _option(
            "--allowed-host",
            "Another Host header to accept without keys. Repeatable.",
            metavar="NAME",
        ),
    ] = None
    metrics_without_key: Annotated[
        bool, _option("--metrics-without-key", "Leave /metrics open.")
    ] = False
    trace: Annotated[
        bool, _option("--trace/--no-trace", "Let requests ask for the trees of their steps.")
    ] = _DEFAULT.trace
    tool_parser: Annotated[
        str | None,
        _option(
            "--tool-parser",
            f"How the model writes tool calls: {', '.join(FORMATS_OF_CALLS)}. Left out: as its "
            "chat template says.",
            metavar="FORM",
        ),
    ] = None
    log_prompts: Annotated[
        bool, _option("--log-prompts", "Write prompts and answers into the log.")
    ] = False
    kv_tokens: Annotated[
        int | None,
        _option(
            "--kv-tokens",
            "Tokens, prompts and answers, that all rows may come to hold; 0: no bound. Left out: "
            "what free memory has room for.",
            _LIMITS,
        ),
    ] = None
    max_queue: Annotated[int, _option("--max-queue", "Answers that may wait besides.", _LIMITS)] = (
        _DEFAULT.max_queue
    )
    max_queue_tokens: Annotated[
        int, _option("--max-queue-tokens", "Prompt tokens that may wait.", _LIMITS)
    ] = _DEFAULT.max_queue_tokens
    max_queue_per_key: Annotated[
        int | None,
        _option(
            "--max-queue-per-key",
            "Of --max-queue, for one key. Left out: half, if there are several keys.",
            _LIMITS,
        ),
    ] = None
    max_connections: Annotated[
        int | None,
        _option(
            "--max-connections",
            "Open at once. Left out: what the limit of open files allows.",
            _LIMITS,
        ),
    ] = None
    max_body_bytes: Annotated[int, _option("--max-body-bytes", "Of a request.", _LIMITS)] = (
        _DEFAULT.max_body_bytes
    )
    max_choices: Annotated[
        int, _option("--max-choices", "Answers of one request: n times its prompts.", _LIMITS)
    ] = _DEFAULT.max_choices
    max_output_tokens: Annotated[
        int | None,
        _option("--max-output-tokens", "Of one answer. Left out: what the context holds.", _LIMITS),
    ] = None
    queue_timeout: Annotated[
        float, _option("--queue-timeout", "Seconds to wait for a row.", _LIMITS)
    ] = _DEFAULT.queue_timeout_s
    request_timeout: Annotated[
        float, _option("--request-timeout", "Seconds for a request altogether.", _LIMITS)
    ] = _DEFAULT.request_timeout_s
    body_timeout: Annotated[
        float, _option("--body-timeout", "Seconds for a request to arrive.", _LIMITS)
    ] = _DEFAULT.body_timeout_s
    send_timeout: Annotated[
        float, _option("--send-timeout", "Seconds for a client to take a piece.", _LIMITS)
    ] = _DEFAULT.send_timeout_s
    drain_timeout: Annotated[
        float, _option("--drain-timeout", "Seconds for answers to end after SIGTERM.", _LIMITS)
    ] = _DEFAULT.drain_timeout_s
    health_timeout: Annotated[
        float, _option("--health-timeout", "Seconds that one step may take.", _LIMITS)
    ] = _DEFAULT.health_timeout_s


@dataclass(frozen=True, kw_only=True)
class Access:
    """API keys."""

    api_key: Annotated[
        list[str] | None,
        _option(
            "--api-key",
            "A key that clients must send; a file is safer, since command lines can be seen. "
            "Repeatable.",
            metavar="KEY",
        ),
    ] = None
    api_key_file: Annotated[
        Path | None,
        _option("--api-key-file", "Keys, one a line. REDWOOD_API_KEY may hold some, too."),
    ] = None
    allow_no_key: Annotated[
        bool, _option("--allow-no-key", "Let anybody in, also from other machines.")
    ] = False


@dataclass(frozen=True, kw_only=True)
class KeptAnswers:
    """Finished answers that are kept to draft from."""

    keep_answers: Annotated[
        Path | None,
        _option(
            "--keep-answers",
            "Draft from finished answers, kept in this folder, those of each API key for itself.",
            metavar="FOLDER",
        ),
    ] = None
    share_answers: Annotated[
        bool,
        _option(
            "--share-answers",
            "With --keep-answers: of all keys for all. Timing then shows what others were told.",
        ),
    ] = False
    keep_every: Annotated[
        float | None,
        _option("--keep-every", "Seconds between writing kept answers.", show_default="1200"),
    ] = None
    shared_table: Annotated[
        bool,
        _option(
            "--shared-table",
            "One table of what the target said for all API keys. Timing then shows what others "
            "were told. Without it each key has its own; --table names a folder of them.",
        ),
    ] = False


@dataclass(frozen=True, kw_only=True)
class Rows:
    """How many requests are decoded at once."""

    max_rows: Annotated[
        int | None,
        _option(
            "--max-rows", "Answers decoded at once.", _LIMITS, show_default=str(_defaults.max_rows)
        ),
    ] = None


@grouped
def serve(
    *,
    serving: Serving,
    access: Access,
    kept: KeptAnswers,
    log_format: Annotated[
        str, _option("--log-format", "Of the log on stderr: text or json.", metavar="FORMAT")
    ] = "text",
    rows: Rows,
    drafting: ServedDrafting,
    several: Several,
    machine: Machine,
    placement: Placement,
    prompts: Prompts,
) -> int:
    """Serves models over HTTP, as OpenAI's API: /v1/chat/completions, /v1/completions, /v1/models.

    Also /health, /ready, /metrics, and a page at /. SIGTERM and Ctrl-C let answers end first, twice
    does not.
    """
    if log_format not in FORMATS:
        raise o.wrong("--log-format", f"{log_format!r} is neither text nor json")
    options = values(serving, drafting, machine, placement, prompts, rows, kept)
    plans = plans_of(drafting.target, several, options)
    settings = settings_of(options, plans)
    _check(kept)
    check_packages("serve")
    from redwood.server.auth import read_keys

    keys = read_keys(access.api_key or [], access.api_key_file)
    from redwood.cli.serve_several import OneModel, open_pool

    made = [
        OneModel(plan, replace(settings, model_names=names), keys, len(plans))
        for plan, names in zip(plans, _names(options, plans), strict=True)
    ]
    how: dict[str, Any] = dict(allow_no_key=access.allow_no_key, log_format=log_format)
    if len(plans) == 1 and not several.asked:
        follow_if_not_first(placement.parallel, plans[0].target, machine)
        return _run(settings, keys, made[0].load, made[0].serve, **how)
    pool = open_pool(made, several, settings, keys)
    return _run(settings, keys, made[0].load, pool.adopt, **how)


def settings_of(options: Mapping[str, Any], plans: Sequence[ModelPlan]) -> Settings:
    """Returns the server's settings from the options of `Serving`; other options are ignored."""
    known = {field.name for field in fields(Settings)}
    found = {
        field: value
        for name, value in options.items()
        for field in (name, f"{name}_s")
        if field in known
    }
    names = [name for each in _names(options, plans) for name in each]
    for name in names:
        if names.count(name) > 1:
            raise o.wrong("--target", f"two models are called {name!r}: name them, NAME=MODEL")
    return Settings(
        model_names=tuple(names), **{**found, "allowed_hosts": tuple(options["allowed_host"] or ())}
    )


def _names(options: Mapping[str, Any], plans: Sequence[ModelPlan]) -> list[tuple[str, ...]]:
    """The names of each model for clients."""
    if len(plans) == 1 and options["served_name"]:
        if plans[0].names:
            raise o.wrong("--served-name", f"the model has a name already: {plans[0].names[0]}")
        return [tuple(options["served_name"])]
    return [plan.names or (public_name(plan.target),) for plan in plans]


def _check(kept: KeptAnswers) -> None:
    if kept.keep_answers is None and (kept.share_answers or kept.keep_every is not None):
        raise o.wrong("--share-answers", "needs --keep-answers, as --keep-every does")
    if kept.keep_every is not None and not 0.0 < kept.keep_every < float("inf"):
        raise o.wrong("--keep-every", f"{kept.keep_every} must be above 0")


def public_name(target: str) -> str:
    """Returns a model's name for clients: of a path, the last part without .gguf; else as it is."""
    path = Path(target)
    name = path.resolve().name if path.exists() else target
    return name.removesuffix(".gguf") or target


def check_packages(command: str) -> None:
    """Raises UnsupportedError, with the command to install them, if packages are missing."""
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise UnsupportedError(
            f"redwood {command} needs packages that are not installed ({', '.join(missing)}): "
            "pip install 'redwood[serve]'"
        )


def _run(
    settings: Settings,
    keys: Keys,
    load: Callable[[], Engine],
    serve_by: Callable[[Engine], Served],
    *,
    allow_no_key: bool,
    log_format: str,
) -> int:
    from redwood.server import logs
    from redwood.server.connections import most_connections, open_files
    from redwood.server.listening import address_of, check_exposure, listen

    check_exposure(settings, keys, without_key=allow_no_key)
    most_connections(*open_files(), settings.max_connections)
    with listen(settings) as listener:
        engine = load()
        from redwood.server.run import Runner, leave

        url = address_of(listener)
        logs.set_up(log_format)
        service = serve_by(engine)
        runner = Runner(service, listener, lambda: _greet(url, service, keys))
        code = runner.run()
        service.close()
        return leave(code)


def _greet(url: str, service: Served, keys: Keys) -> None:
    say(f"serving {service.settings.model_names[0]} at {url}/v1 (Ctrl-C stops)")
    for line in service.greeting():
        say(line)
    header = " -H 'Authorization: Bearer KEY'" if len(keys) else ""
    say(
        f"try: curl {url}/v1/chat/completions -H 'Content-Type: application/json'{header} "
        """-d '{"messages": [{"role": "user", "content": "Name three trees."}]}'"""
    )
