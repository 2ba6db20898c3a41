"""What an engine keeps in files: tables of its drafters, and the texts that it has read."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from redwood.backends.native.backend import NativeBackend
from redwood.drafters.base import Drafter, NgramDrafter, parts_of
from redwood.engine.prefix_file import PrefixFile
from redwood.engine.text import Engine
from redwood.engine.turns import when_free
from redwood.errors import ArgumentError
from redwood.table.keeping import INTERVAL_S, KeptTable, WhenFree, keep_saving
from redwood.table.target import target_id


def tables_of(drafters: Sequence[Drafter]) -> list[NgramDrafter]:
    """Returns the parts of drafters that have a table."""
    parts = [part for drafter in drafters for part in parts_of(drafter)]
    return [part for part in parts if isinstance(part, NgramDrafter) and part.table is not None]


def between_steps(drafter: NgramDrafter) -> WhenFree:
    """Returns what runs an action when no step uses this drafter."""

    def run(action: Callable[[], None]) -> None:
        when_free([drafter], action)

    return run


def keep_table(
    engine: Engine,
    path: str | Path,
    target: str,
    drafter: Drafter,
    interval_s: float = INTERVAL_S,
) -> KeptTable:
    """Loads a drafter's table from a file, and saves it now and then and when the engine closes.

    Args:
        path: of the file; it need not exist.
        target: the engine's, as `redwood.load` took it.

    Raises:
        ArgumentError: the drafter has no table.
        TableError: see `KeptTable`.
    """
    with_table = tables_of([drafter])
    if not with_table:
        raise ArgumentError("no drafter here has a table to keep: name table or auto")
    part = with_table[0]
    assert part.table is not None
    kept = KeptTable(
        path,
        target_id(target, engine.tokenizer, engine.target.vocab_size),
        part.table,
        part.reliability,
        when_free=between_steps(part),
    )
    engine.kept_tables += (kept,)
    end = keep_saving(lambda: [kept], interval_s)
    engine.closing += (weakref.finalize(engine, partial(_close, end, kept)),)
    return kept


def keep_prefixes(engine: Engine, path: str | Path, target: str) -> None:
    """Reads the texts that stay from a file, and writes them to it when the engine closes.

    Raises:
        ArgumentError: an engine that keeps none, or whose backend cannot save them.
        KvCacheError: see `PrefixFile`.
    """
    backend = engine.target
    if not isinstance(backend, NativeBackend) or not engine.prefixes.on:
        raise ArgumentError("kv_cache_file: the native backend alone, with a kv_cache, keeps texts")
    known = target_id(target, engine.tokenizer, backend.vocab_size)
    kept = PrefixFile(path, known, backend, engine.prefixes)
    engine.closing += (weakref.finalize(engine, kept.close),)


def _close(end: Callable[[], None], kept: KeptTable) -> None:
    kept.close()
    end()
