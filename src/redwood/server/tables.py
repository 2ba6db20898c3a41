"""A table of what the target said for each API key: nothing of one key drafts for another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from redwood.drafters.base import attach
from redwood.engine.tables import between_steps, tables_of
from redwood.errors import ArgumentError
from redwood.table import KeyTables, target_id

if TYPE_CHECKING:
    from redwood.drafters.base import Drafter
    from redwood.engine.text import Engine
    from redwood.server.generation import Choice


class OwnTables:
    """A table for every owner of requests.

    Args:
        tables: where they are; closed with this.
        drafter: of the engine.
        namespace_of: name of an owner's namespace.
    """

    def __init__(
        self, tables: KeyTables, drafter: Drafter, namespace_of: Callable[[str], str]
    ) -> None:
        self.tables, self._drafter, self._name = tables, drafter, namespace_of

    def recall(self, choice: Choice) -> None:
        """Gives a choice that has its number its owner's table, in place of the engine's."""
        assert choice.key is not None
        attach(self._drafter, choice.key, table=self.tables.table(self._name(choice.owner)))

    def close(self) -> None:
        """Saves for the last time."""
        self.tables.close()


def own_tables(
    engine: Engine,
    namespace_of: Callable[[str], str],
    folder: Path | None = None,
    target: str = "",
) -> OwnTables:
    """Returns tables by owner for an engine, in the memory that its one table may take.

    Args:
        folder: where they are kept; None: in memory alone.
        target: the engine's, as `redwood.load` took it; needed with a folder.

    Raises:
        ArgumentError: no drafter of the engine has a table.
        TableError: the folder cannot be made.
    """
    with_table = tables_of([engine.drafter])
    if not with_table:
        raise ArgumentError("no drafter here has a table to keep: name table or auto")
    part = with_table[0]
    assert part.table is not None
    model = engine.target
    known = None if folder is None else target_id(target, engine.tokenizer, model.vocab_size)
    tables = KeyTables(
        part.table.max_bytes,
        folder=folder,
        target=known,
        rates=part.reliability,
        when_free=between_steps(part),
    )
    return OwnTables(tables, engine.drafter, namespace_of)
