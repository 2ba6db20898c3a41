"""Recurrent layers of Transformers: which modules they are, and the states they keep in a cache.

The other half of `_transformers`, and like it the only place for such names. A state is a layer of
Transformers' own cache, filled by the module: what is in it is never looked at, its tensors are
copied, joined and cut along their first dimension, the batch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from functools import cache
from inspect import unwrap
from types import CodeType
from typing import TYPE_CHECKING, Any

from redwood.errors import UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

_KEEPS = re.compile(r"update_(conv|recurrent|ssm|rnn)_states?")

RECURRENT_LAYERS = frozenset(
    {"conv", "hybrid", "hybrid_sliding", "linear_attention", "mamba", "mlp", "moe", "attention"}
)
"""Types of layers that configurations of hybrids name beside full and sliding attention."""

HIDDEN = "hidden_states"
"""The argument of a recurrent module that is what it reads, [batch, tokens, width]."""


def recurrent_modules(model: Any) -> dict[str, Any]:
    """Returns the modules of a model whose own code keeps a state in the cache, by name."""
    found = {}
    for name, part in model.named_modules():
        kind: Any = type(part)
        if _keeps_state(kind):
            found[name] = part
    return found


@cache
def _keeps_state(kind: Any) -> bool:
    functions = [part for part in vars(kind).values() if callable(part)]
    codes = [getattr(unwrap(function), "__code__", None) for function in functions]
    return any(_KEEPS.fullmatch(name) for code in codes if code for name in _names(code))


def _names(code: CodeType) -> set[str]:
    inner = (part for part in code.co_consts if isinstance(part, CodeType))
    return set(code.co_names).union(*(_names(part) for part in inner))


class States:
    """The states of one recurrent module: empty ones, and calls of the module from them.

    Args:
        config: of the whole model.
        module: one of `recurrent_modules`.

    Raises:
        UnsupportedError: this Transformers keeps no state for it in the cache.
    """

    def __init__(self, config: Any, module: Any) -> None:
        from transformers import DynamicCache

        layer = getattr(module, "layer_idx", None)
        self._layer = layer if isinstance(layer, int) else -1
        self._cache = DynamicCache(config=config)
        layers = getattr(self._cache, "layers", [])
        known = 0 <= self._layer < len(layers)
        if not known or not hasattr(layers[self._layer], "conv_states"):
            raise UnsupportedError(
                f"{type(module).__name__} keeps a state, but this Transformers has no place for it"
            )
        self.empty: Any = layers[self._layer]
        """The state before the first token; not to be changed."""

    def cache_with(self, state: Any) -> Any:
        """Returns a cache that holds a state, which a call of the module with it will change."""
        made = copy(self._cache)
        made.layers = list(self._cache.layers)
        made.layers[self._layer] = state
        return made


def mapped_state(states: Sequence[Any], change: Callable[[list[Tensor]], Tensor]) -> Any:
    """Returns a new state, each of whose tensors is made of those of the given states.

    Args:
        states: of one module, all empty or all filled.
        change: from the tensors [batch, ...] of the states to one; must copy.
    """
    from torch import Tensor

    made = copy(states[0])
    for name, value in vars(states[0]).items():
        others = [vars(state)[name] for state in states]
        if isinstance(value, Tensor):
            setattr(made, name, change(others))
        elif isinstance(value, dict):
            parts = {
                key: change([other[key] for other in others]) if isinstance(part, Tensor) else part
                for key, part in value.items()
            }
            setattr(made, name, parts)
    return made


def state_tensors(state: Any) -> list[Tensor]:
    """Returns the tensors [batch, ...] of a state; none before the first token."""
    from torch import Tensor

    found: list[Tensor] = []
    for value in vars(state).values():
        parts = list(value.values()) if isinstance(value, dict) else [value]
        found += [part for part in parts if isinstance(part, Tensor)]
    return found


def state_bytes(state: Any) -> int:
    """Returns the memory that a state takes."""
    return sum(tensor.nbytes for tensor in state_tensors(state))


def tighten_limits(model: Any) -> None:
    """Has a limit of time steps bite that a model's modules have; for random weights alone."""
    for module in recurrent_modules(model).values():
        low, high = getattr(module, "time_step_limit", None) or (0.0, float("inf"))
        if (low, high) != (0.0, float("inf")):
            module.time_step_limit = (max(low, 0.5) if low > 0 else low, min(high, 1.0))


@contextmanager
def small_blocks(module: Any, length: int) -> Iterator[None]:
    """Has a module that works in blocks of tokens not fill them up beyond this many.

    The size of the blocks is no part of what is computed; where they are filled up to 256 tokens, a
    path of four costs as much as a prompt.
    """
    size = getattr(module, "chunk_size", None)
    fits = max(2, 1 << (length - 1).bit_length())
    if type(size) is not int or size <= fits:
        yield
        return
    module.chunk_size = fits
    try:
        yield
    finally:
        module.chunk_size = size
