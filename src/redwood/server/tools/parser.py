"""What every reader of tool calls offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection

from redwood.server.tools.parts import Part


class ToolParser(ABC):
    """Reads one answer, piece by piece; what comes out does not depend on how it was cut.

    Tags of a form are never text: not whole, not in part, not where they stand alone. What may be
    the beginning of a tag is held back until the next piece decides, or the end.

    Args:
        names: tools there are; a call of another one is malformed.
        eager: whether a grammar makes every call right, so that arguments are handed on as they
            come. Otherwise a call is held until it is whole and its arguments are a JSON object,
            and then handed on at once.
    """

    def __init__(self, names: Collection[str], *, eager: bool = False) -> None:
        self._names, self._eager = frozenset(names), eager

    @abstractmethod
    def feed(self, text: str) -> list[Part]:
        """Returns what is certain after a further piece of the answer's text."""

    @abstractmethod
    def finish(self, *, complete: bool) -> list[Part]:
        """Returns the rest; called once, at the end.

        Args:
            complete: whether the model ended its answer itself. False: it was cut, so that a call
                that is not whole has no `CallEnd`, if it was begun, and is `Malformed` otherwise.
        """
