"""Finished answers kept as text to draft from, for each API key apart. Off by default."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from redwood.drafters.base import NgramDrafter, attach, parts_of
from redwood.errors import ArgumentError

if TYPE_CHECKING:
    from redwood.datastore import Namespaces
    from redwood.drafters.base import Drafter
    from redwood.server.generation import Choice

_PROMPT_TOKENS = 3  # kept before an answer, so that its first tokens can be looked up too (SSSD)


class Memory:
    """Finished answers of each owner, from which later answers to the same owner are drafted.

    Args:
        namespaces: where answers are stored; closed by `close`.
        drafter: the engine's.
        namespace_of: owner -> name of its namespace; owners with the same name share answers.

    Raises:
        ArgumentError: no part of the drafter looks up n-grams, so answers could not be used.
    """

    def __init__(
        self, namespaces: Namespaces, drafter: Drafter, namespace_of: Callable[[str], str]
    ) -> None:
        if not any(isinstance(p, NgramDrafter) for p in parts_of(drafter)):
            raise ArgumentError("kept answers are drafted by n-grams: add ngram to the drafters")
        self._namespaces, self._drafter, self._name = namespaces, drafter, namespace_of

    def recall(self, choice: Choice) -> None:
        """Lets a choice, which must have its `key`, draft from its owner's earlier answers."""
        assert choice.key is not None
        stores = self._namespaces.stores(self._name(choice.owner))
        if stores:
            attach(self._drafter, choice.key, stores)

    def keep(self, choice: Choice) -> None:
        """Adds a finished answer. Cheap: it is written to disk later."""
        answer = [*choice.prompt[-_PROMPT_TOKENS:], *choice.tokens]
        self._namespaces.append(self._name(choice.owner), [answer])

    def close(self) -> None:
        """Writes what is not on disk yet."""
        self._namespaces.close()
