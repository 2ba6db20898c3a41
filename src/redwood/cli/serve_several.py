"""From the models of a command line to what serves them: one alone, or several in a pool."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from redwood.cli import options as o
from redwood.cli.groups import Drafting, Machine, Placement, Prompts
from redwood.cli.kept import NO_TABLE, has_table, size_of
from redwood.cli.loading import open_engine
from redwood.cli.serve_checks import about, check_model
from redwood.cli.serve_models import ModelPlan, Several
from redwood.cli.terminal import say
from redwood.drafters.names import model_names, split_names
from redwood.errors import RedwoodError
from redwood.server.settings import Settings

if TYPE_CHECKING:
    from redwood.engine.text import Engine
    from redwood.server.auth import Keys
    from redwood.server.memory import Memory
    from redwood.server.metrics import Metrics
    from redwood.server.models.entry import ModelSpec
    from redwood.server.models.pool import Pool
    from redwood.server.models.room import Room
    from redwood.server.service import Service

_OF_ENGINE = [
    each.name for group in (Drafting, Machine, Placement, Prompts) for each in fields(group)
] + ["max_rows"]


class OneModel:
    """A model with its files, as one command line names it.

    Args:
        plan: what it is.
        settings: of the server; its names, and what it has of its own, are put in.
        keys: API keys.
        count: models of the server.

    Raises:
        typer.BadParameter: a shared table where nothing has one.
    """

    def __init__(self, plan: ModelPlan, settings: Settings, keys: Keys, count: int = 1) -> None:
        options = plan.options
        self.plan, self._options, self._keys, self._count = plan, options, keys, count
        if options["shared_table"] and not has_table(options["drafter"]):
            raise o.wrong("--shared-table", NO_TABLE)
        own = {name: options[name] for name in ("tool_parser", "kv_tokens")}
        with about(settings.model_names[0]) if count > 1 else nullcontext():
            self.settings = replace(settings, **own)
        apart = len(keys) > 0 and not options["shared_table"]  # then --table is a folder
        self._folder = options["table"] if apart and has_table(options["drafter"]) else None

    def check(self) -> None:
        """Raises ArgumentError for options with which it can never be loaded."""
        check_model(self.settings.model_names[0], self._options)

    def load(self, *, quiet: bool = False) -> Engine:
        """Returns its engine.

        Args:
            quiet: show no progress.
        """
        chosen: dict[str, Any] = {name: self._options[name] for name in _OF_ENGINE}
        chosen["target"] = self.plan.target
        if self._folder is not None:
            chosen["table"] = None
        if self._count > 1 and chosen["kv_cache"] is None:
            from redwood.engine.load import KV_CACHE_SHARE

            chosen["kv_cache_share"] = KV_CACHE_SHARE / self._count
        return open_engine(**chosen, quiet=quiet)

    def serve(self, engine: Engine, metrics: Metrics | None = None, share: float = 1.0) -> Service:
        """Returns its service; arguments as of `Service`."""
        from redwood.server.service import Service
        from redwood.server.tables import own_tables

        memory, tables = self._recalled(engine), None
        if self._folder is not None:
            tables = own_tables(engine, self._keys.namespace, self._folder, self.plan.target)
        return Service(
            engine,
            self.settings,
            self._keys,
            memory,
            share=share,
            tables=tables,
            shared_table=self._options["shared_table"],
            metrics=metrics,
        )

    def _recalled(self, engine: Engine) -> Memory | None:
        options = self._options
        if options["keep_answers"] is None:
            return None
        from redwood.datastore import Namespaces
        from redwood.server.memory import Memory

        name = (lambda owner: "everybody") if options["share_answers"] else self._keys.namespace
        stores = Namespaces(options["keep_answers"], engine.tokenizer, name=self.plan.target)
        memory = Memory(stores, engine.drafter, name)
        stores.start(**o.given(interval_s=options["keep_every"]))
        return memory

    def check_files(self) -> None:
        """Looks at its files for what can be known of its options before it is loaded.

        Raises:
            RedwoodError: see `check_recurrent`.
        """
        if self._options["checkpoint_tokens"] is not None:
            from redwood.backends.native.load import check_recurrent

            check_recurrent(self.plan.target)

    def need(self) -> int | None:
        """Returns the bytes that its weights will take; see `predicted`."""
        from redwood.server.models.room import predicted

        options = self._options
        names = [self.plan.target, *model_names(split_names(options["drafter"]))]
        return predicted(names, options["weights"], options["dtype"])

    def spec(self) -> ModelSpec:
        """Returns how it is loaded when a request asks for it."""
        from redwood.server.models.entry import ModelSpec

        return ModelSpec(self.settings, lambda: self.load(quiet=True), self.serve, self.need)


def open_pool(made: Sequence[OneModel], several: Several, settings: Settings, keys: Keys) -> Pool:
    """Returns the pool of these models, none of them loaded yet.

    Raises:
        RedwoodError, typer.BadParameter: no size; a model that can never fit, or that its options
            leave no way to load.
    """
    for each in made:
        each.check()
    from redwood.server.models.pool import Pool

    room = _room_of(made, several)
    for index, each in enumerate(made):
        try:
            each.check_files()
            need = each.need()
        except RedwoodError as error:
            if index:  # the first is loaded now, and the start refused
                say(f"warning: requests for {each.settings.model_names[0]} will fail: {error}")
            continue
        if need is not None and room.most is not None and need > room.most:
            raise o.wrong(
                "--models-memory",
                f"{each.settings.model_names[0]} needs {need / 2**20:,.0f} MiB, and all models may "
                f"take {room.most / 2**20:,.0f} MiB",
            )
    rows = o.given(rows=made[0].plan.options["max_rows"])
    specs = [each.spec() for each in made]
    return Pool(specs, settings, keys, room, several.idle_unload, **rows)


def _room_of(made: Sequence[OneModel], several: Several) -> Room:
    given = several.models_memory
    most = None if given is None else size_of("--models-memory", given)
    import torch

    from redwood.server.models.room import Room, default_room

    options = [each.plan.options for each in made]
    on_cpu = all(each["device"] == "cpu" or each["backend"] == "native" for each in options)
    cuda = torch.cuda.is_available() and not on_cpu
    return default_room(len(made), cuda) if most is None else Room(most, len(made), cuda)
