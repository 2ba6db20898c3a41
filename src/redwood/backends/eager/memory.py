"""What a row keeps for recurrent modules: states, and what the modules were given since.

States are shared, between rows too, and never changed: a call of a module works on a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from redwood.models._transformers_states import state_bytes


class Ahead(NamedTuple):
    """The state after so many more tokens, if they are committed: the first nodes are a chain."""

    tokens: int
    state: Any


class Mark(NamedTuple):
    """The states after the first `length` tokens of a row, by module."""

    length: int
    states: dict[str, Any]


class LayerMemory:
    """What a row keeps for one recurrent module.

    Attributes:
        state: after the first `at` tokens of the row.
        inputs: of the module, [tokens and nodes behind `at`, width]; None: of none.
        ahead: counted from `at`.
    """

    def __init__(self, state: Any) -> None:
        self.at, self.state = 0, state
        self.inputs: Tensor | None = None
        self.ahead: Ahead | None = None

    @property
    def state_bytes(self) -> int:
        """Bytes of the state after a token; 0 before the first one was read."""
        ahead = 0 if self.ahead is None else state_bytes(self.ahead.state)
        return max(state_bytes(self.state), ahead)

    def write(self, hidden: Tensor, start: int) -> None:
        """Keeps inputs [n, width] of the slots from `start` on; what was behind is dropped."""
        held, count = self.inputs, start - self.at
        if self.ahead is not None and self.ahead.tokens > count:
            self.ahead = None
        self.inputs = torch.cat((held[:count], hidden)) if held is not None else hidden.clone()

    def keep(self, length: int, nodes: Sequence[int]) -> None:
        """Drops what is not committed: of the nodes behind `length`, these are, in order."""
        if self.inputs is None:
            return
        old = length - self.at
        same = next((i for i, node in enumerate(nodes) if node != i), len(nodes))
        if self.ahead is not None and self.ahead.tokens > old + same:
            self.ahead = None
        if self.ahead is not None and self.ahead.tokens == old + len(nodes):
            self._advance(self.ahead.tokens, self.ahead.state)
        elif same == len(nodes):
            self.inputs = self.inputs[: old + same]
        else:
            chosen = [*range(old), *(old + node for node in nodes)]
            self.inputs = self.inputs[torch.tensor(chosen, device=self.inputs.device)]

    def _advance(self, count: int, state: Any) -> None:
        held = self.inputs
        self.at, self.state, self.ahead = self.at + count, state, None
        self.inputs = held[count:] if held is not None and len(held) > count else None

    def behind(self, length: int) -> Tensor | None:
        """Inputs [n, width] of committed tokens that the state has not seen; None: it has all.

        The row has `length` committed tokens.
        """
        if self.ahead is not None and self.at < length:
            if self.ahead.tokens <= length - self.at:
                self._advance(self.ahead.tokens, self.ahead.state)
            self.ahead = None
        if self.at == length:
            return None
        assert self.inputs is not None
        return self.inputs[: length - self.at]

    def caught_up(self, state: Any, length: int) -> None:
        """Takes the state after the first `length` tokens."""
        self._advance(length - self.at, state)

    def copied(self, length: int) -> LayerMemory:
        """Returns the memory of the first `length` tokens, at least `at`."""
        made = LayerMemory(self.state)
        made.at = self.at
        if self.inputs is not None and length > self.at:
            made.inputs = self.inputs[: length - self.at].clone()
        return made


class RowMemory:
    """What a row keeps for all recurrent modules; empty for models that have none.

    Attributes:
        layers: by name of the module.
        tokens: of the row, provisional ones behind the committed ones.
        marks: states by module and the tokens that they have seen, kept now and then.
    """

    def __init__(self) -> None:
        self.layers: dict[str, LayerMemory] = {}
        self.tokens: list[int] = []
        self.marks: list[Mark] = []

    def keep(self, length: int, nodes: Sequence[int]) -> None:
        """Drops what is not committed: of the nodes behind `length`, these are, in order."""
        self.tokens[length:] = [self.tokens[length + node] for node in nodes]
        for memory in self.layers.values():
            memory.keep(length, nodes)

    def mark(self, length: int, distance: int) -> None:
        """Keeps the states after the first `length` tokens, if they are at hand and far enough.

        Args:
            distance: tokens from one mark to the next, at least; 0: none are kept.
        """
        last = self.marks[-1].length if self.marks else 0
        at_hand = all(memory.at == length for memory in self.layers.values())
        if self.layers and distance and at_hand and length >= last + distance:
            states = {name: memory.state for name, memory in self.layers.items()}
            self.marks.append(Mark(length, states))

    def holds(self, length: int) -> bool:
        """Whether no state has seen more than the first `length` tokens."""
        return all(memory.at <= length for memory in self.layers.values())

    def reusable(self, length: int) -> int:
        """Returns how many of the first `length` tokens need not be read again to go on there."""
        if self.holds(length):
            return length
        return max((mark.length for mark in self.marks if mark.length <= length), default=0)

    def copied(self, length: int) -> RowMemory:
        """Returns the memory of the first `length` tokens, which is `reusable`."""
        made = RowMemory()
        made.tokens = self.tokens[:length]
        made.marks = [mark for mark in self.marks if mark.length <= length]
        if self.holds(length):
            made.layers = {name: memory.copied(length) for name, memory in self.layers.items()}
        elif length:
            for name, state in made.marks[-1].states.items():
                made.layers[name] = LayerMemory(state)
                made.layers[name].at = length
        return made

    def states(self) -> list[Any]:
        """Returns all states that are kept, those of several modules and marks."""
        held = [memory.state for memory in self.layers.values()]
        held += [memory.ahead.state for memory in self.layers.values() if memory.ahead is not None]
        return held + [state for mark in self.marks for state in mark.states.values()]
