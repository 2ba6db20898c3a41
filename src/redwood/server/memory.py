"""Finished answers kept as text to draft from, each API key's for itself. Off unless asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from redwood.drafters.base import NgramDrafter, attach, parts_of
from redwood.errors import ArgumentError

if TYPE_CHECKING:
    from redwood.datastore import Namespaces
    from redwood.drafters.base import Drafter
    from redwood.server.generation import Choice

_PROMPT_TOKENS = 3  # before an answer, so that what leads into it is found, too (SSSD)


class Memory:
    """What owners of requests were told, for drafts to the same owners.

    Args:
        namespaces: where it is kept; flushed when this is closed.
        drafter: of the engine.
        namespace_of: name of an owner's namespace; owners with the same name share their answers.

    Raises:
        ArgumentError: nothing in the drafter looks up n-grams, so nothing would be drafted.
    """

    def __init__(
        self, namespaces: Namespaces, drafter: Drafter, namespace_of: Callable[[str], str]
    ) -> None:
        if not any(isinstance(p, NgramDrafter) for p in parts_of(drafter)):
            raise ArgumentError("kept answers are drafted by n-grams: add ngram to the drafters")
        self._namespaces, self._drafter, self._name = namespaces, drafter, namespace_of

    def recall(self, choice: Choice) -> None:
        """Lets a choice that has its number draft from what its owner was told before."""
        assert choice.key is not None
        stores = self._namespaces.stores(self._name(choice.owner))
        if stores:
            attach(self._drafter, choice.key, stores)

    def keep(self, choice: Choice) -> None:
        """Notes a finished answer; cheap, it is written later."""
        answer = [*choice.prompt[-_PROMPT_TOKENS:], *choice.tokens]
        self._namespaces.append(self._name(choice.owner), [answer])

    def close(self) -> None:
        """Writes what waits."""
        self._namespaces.close()
