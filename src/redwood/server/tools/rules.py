"""The rules of a grammar as they are made: Lark text for llguidance, within a bound."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from redwood.errors import ArgumentError

Spelled = Callable[[str], str]
"""From a tag to the expression for it: its token, or else its text."""
Fits = Callable[[str], bool]
"""Whether any text fits a grammar of one value."""

_MOST_CHARACTERS = 1 << 20


class NothingFitsError(ArgumentError):
    """No value that the form can write fits a part of a schema. An optional part is left out."""


class Rules:
    """The rules so far.

    Args:
        form: of the calls, for errors.
        spelled: how tags are written.
        fits: tells terminals that no text fits: a parser reports them when it stands there only.
    """

    def __init__(self, form: str, spelled: Spelled, fits: Fits) -> None:
        self.form, self.spelled, self.fits = form, spelled, fits
        self.lines: list[str] = []
        self._names: dict[tuple[str, str], str] = {}
        self._size = 0

    def add(self, body: str, *, kind: str = "") -> str:
        """Returns the name of a rule with this body.

        Args:
            kind: "": a rule; "terminal": a regular expression; "lazy": one that ends as soon as it
                can.

        Raises:
            ArgumentError: the grammar grows beyond its bound.
        """
        name = self._names.get((kind, body))
        if name is None:
            number = len(self._names)
            name = self._names[kind, body] = f"X{number}" if kind == "terminal" else f"x{number}"
            self.put(f"{name}{'[lazy]' if kind == 'lazy' else ''}: {body}")
        return name

    def put(self, line: str) -> None:
        """Takes a rule that has a name of its own; raises as `add`."""
        self._size += len(line)
        if self._size > _MOST_CHARACTERS:
            raise ArgumentError(f"tools: too large for a grammar of the form {self.form}")
        self.lines.append(line)

    def add_json(self, schema: Any, where: str) -> str:
        """Returns the name of a rule for JSON; raises as `add`.

        Raises:
            NothingFitsError: nothing fits the schema.
        """
        body = f"%json {json.dumps(schema)}"
        if not self.fits(f"start: {body}"):
            raise self.unfitting(where)
        return self.add(body)

    def unfitting(self, where: str) -> NothingFitsError:
        """Returns the error for a part of a schema that nothing fits."""
        return NothingFitsError(
            f"tools: {where[:100]}: no value in calls of the form {self.form} fits this schema"
        )

    def refused(self, where: str, part: str) -> ArgumentError:
        """Returns the error for a part of a schema that the form has no way to keep."""
        return ArgumentError(
            f"tools: {where[:100]}: {part[:100]} cannot be kept in calls of the form {self.form}"
        )


def quoted(text: str) -> str:
    """A text as it stands in a rule."""
    return json.dumps(text)
