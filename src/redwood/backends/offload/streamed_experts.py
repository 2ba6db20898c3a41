"""Experts whose weights come from a `Stream`: of a layer, those that a node of the pass has, alone.

Transformers stacks the experts of a layer in two parameters and calls them with the choice of the
layer's router, so that it is known which will be read before any of them is. Each expert lies in
pieces of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from redwood.backends.offload.forms import Form
from redwood.backends.offload.streamed import Matrix, Part, Pieces

_UP, _DOWN = ("gate_up_proj", "up_proj"), "down_proj"


class Announced(Pieces, Protocol):
    """Pieces of which a forward needs some, and says which."""

    def announce(self, group: int, pieces: Sequence[int]) -> None:
        """Says which pieces of a group come next, in order; no others of it are read."""
        ...


class Stacked(NamedTuple):
    """The experts of one parameter.

    `matrix`: all rows, one expert's behind the other's, no piece of two experts. `form`: how they
    are stored.
    """

    matrix: Matrix
    form: Form


def stacks_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters of a module that hold all experts of a layer, [experts, ...].

    None where it is no such module as most of Transformers' classes have them: others, and those
    that norm what an expert said, are put together in memory.
    """
    known = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm")
    if not all(hasattr(module, name) for name in known) or module.has_post_expert_norm:
        return {}
    kept = dict(module.named_parameters(recurse=False))
    found = {name: kept[name] for name in (*_UP, _DOWN) if name in kept and kept[name].dim() == 3}
    return found if len(found) == 2 and _DOWN in found else {}


class StreamedExperts(nn.Module):
    """Stands for a layer's experts; the sum over a node's experts is in the order of their numbers.

    Args:
        experts: whose biases and activation are used, not its large parameters.
        stacks: those, by name.
        group: of their pieces, as `pieces` counts them.
    """

    def __init__(
        self, experts: Any, stacks: Mapping[str, Stacked], group: int, pieces: Announced
    ) -> None:
        super().__init__()
        self.inner, self._group, self._pieces = experts, group, pieces
        self._count: int = experts.num_experts
        up = next(name for name in _UP if name in stacks)
        self._stacks = {name: stacks[name] for name in (up, _DOWN)}
        self._parts: dict[str, list[list[Part]]] = {
            name: _by_expert(stack.matrix, self._count) for name, stack in self._stacks.items()
        }

    def forward(self, hidden_states: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Returns the weighed sum of what its experts say of each row, [n, hidden].

        Args:
            hidden_states: [n, hidden].
            chosen: [n, k], experts of each row; what is no expert's number is left out.
            weights: [n, k].
        """
        wanted = [int(expert) for expert in torch.unique(chosen) if 0 <= expert < self._count]
        self._pieces.announce(
            self._group,
            [p.piece for e in wanted for parts in self._parts.values() for p in parts[e]],
        )
        total = torch.zeros_like(hidden_states)
        for expert in wanted:
            rows, places = torch.where(chosen == expert)
            said = self._said(expert, hidden_states[rows])
            said = said * weights[rows, places, None]
            total.index_add_(0, rows, said.to(total.dtype))
        return total

    def _said(self, expert: int, x: Tensor) -> Tensor:
        up = next(iter(self._stacks))
        made = self._product(up, expert, x)
        made = self.inner._apply_gate(made) if self.inner.has_gate else self.inner.act_fn(made)
        return self._product(_DOWN, expert, made)

    def _product(self, name: str, expert: int, x: Tensor) -> Tensor:
        stack, parts = self._stacks[name], self._parts[name][expert]
        first, rows = parts[0].first, sum(part.rows for part in parts)
        out = x.new_empty(len(x), rows)
        for part in parts:
            with self._pieces.piece(part.piece) as data:
                made = stack.form.multiply(data, part.rows, x)
            out[:, part.first - first : part.first - first + part.rows] = made
        if self.inner.has_bias:
            out += getattr(self.inner, f"{name}_bias")[expert]
        return out


def _by_expert(matrix: Matrix, count: int) -> list[list[Part]]:
    rows = matrix.rows // count
    found: list[list[Part]] = [[] for _ in range(count)]
    for part in matrix.parts:
        found[part.first // rows].append(part)
    return found
