"""What can be told wrong of a model's options before it is loaded, so that a server of several
models does not start with one that no request could ever have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from redwood.cli import options as o
from redwood.cli.kept import kept_table
from redwood.cli.loading import check_drafting
from redwood.drafters.names import INDEX, model_names, split_names
from redwood.errors import ArgumentError, RedwoodError, check_count

_COUNTS = ("max_rows", "budget", "capacity", "prefill_beside")
_PLACED = ("backend", "dtype", "device", "weights", "kv", "threads", "checkpoint_tokens")


def check_model(name: str, options: Mapping[str, Any]) -> None:
    """Raises ArgumentError, in one line with the model and the option, for what cannot be.

    Whether the target is there is not looked at, nor what only its files can tell.

    Args:
        name: of the model, for the error.
        options: of the command line, its own in place of what all have.
    """
    for check in (_counts, _drafter, _draft_vocab, _tree, _placed, _kept):
        with about(name):
            check(options)


@contextmanager
def about(name: str) -> Iterator[None]:
    """Has the errors of a model's options name the model."""
    try:
        yield
    except typer.BadParameter as error:
        option = str(error.param_hint).removeprefix("--").replace("-", "_")
        raise ArgumentError(f"model {name!r}: {option}: {error.message}") from error
    except RedwoodError as error:
        raise ArgumentError(f"model {name!r}: {error}") from error


def _counts(options: Mapping[str, Any]) -> None:
    for option in _COUNTS:
        if (value := options.get(option)) is not None:
            check_count(option, value)


def _drafter(options: Mapping[str, Any]) -> None:
    check_drafting(options["drafter"], options.get("law"), options.get("draft_vocab"))
    from redwood.datastore import Datastore
    from redwood.drafters.model import law_of
    from redwood.server.models.room import predicted

    if options.get("law") is not None:
        law_of(options["law"])
    parts = split_names(options["drafter"])
    for part in parts:
        if part.startswith(INDEX):
            with _of("drafter"):
                Datastore.open(part.removeprefix(INDEX))
    for part in model_names(parts):
        with _of("drafter"):
            predicted([part])


@contextmanager
def _of(option: str) -> Iterator[None]:
    try:
        yield
    except RedwoodError as error:
        raise o.wrong(option, str(error)) from error


def _draft_vocab(options: Mapping[str, Any]) -> None:
    given = options.get("draft_vocab")
    if given is None:
        return
    from redwood.engine.draft_vocab import check_vocab

    check_vocab(int(given) if given.isdecimal() else given, options.get("table"))


def _tree(options: Mapping[str, Any]) -> None:
    if (given := options.get("tree")) is None:
        return
    from redwood.tree import TokenTree

    parents = o.tree_parents(given)
    with _of("tree"):
        TokenTree.point([0] * len(parents), parents)
    if not model_names(split_names(options["drafter"])):
        raise o.wrong("--tree", "it is the shape for a model that drafts, and there is none")


def _placed(options: Mapping[str, Any]) -> None:
    from redwood.backends.load import check_placed

    cpus = options.get("cpus")
    listed = None if cpus is None else o.integers("--cpus", cpus)
    check_placed(**o.given(cpus=listed, **{name: options.get(name) for name in _PLACED}))


def _kept(options: Mapping[str, Any]) -> None:
    from redwood.backends.offload.backend import parse_bytes

    kept_table(dict(options), [options["drafter"]])
    if options.get("kv_cache") not in (None, "0"):
        parse_bytes(options["kv_cache"], "kv_cache")
    folder = options.get("tokenizer")
    if folder is not None and not Path(folder).expanduser().is_dir():
        raise o.wrong("--tokenizer", f"{folder!r} must be a folder with a tokenizer")
