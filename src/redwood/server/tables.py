"""A successor table for each API key, so that text of one key never drafts for another."""

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
    """A table for each owner of requests.

    Args:
        tables: where tables are stored; closed by `close`.
        drafter: the engine's.
        namespace_of: owner -> name of its table.
    """

    def __init__(
        self, tables: KeyTables, drafter: Drafter, namespace_of: Callable[[str], str]
    ) -> None:
        self.tables, self._drafter, self._name = tables, drafter, namespace_of

    def recall(self, choice: Choice) -> None:
        """Lets a choice, which must have its `key`, draft from its owner's table instead of the
        engine's."""
        assert choice.key is not None
        attach(self._drafter, choice.key, table=self.tables.table(self._name(choice.owner)))

    def close(self) -> None:
        """Saves the tables and closes them."""
        self.tables.close()


def own_tables(
    engine: Engine,
    namespace_of: Callable[[str], str],
    folder: Path | None = None,
    target: str = "",
) -> OwnTables:
    """Returns tables by owner for an engine; together they may take the memory of its one table.

    Args:
        engine: one of its drafters has a table.
        namespace_of: owner -> name of its table.
        folder: where tables are saved; None: they are kept in memory only.
        target: the target's name, as given to `redwood.load`; needed with a folder.

    Raises:
        ArgumentError: no drafter of the engine has a table.
        TableError: the folder cannot be created.
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
