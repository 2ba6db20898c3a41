"""A user's own Transformers model, borrowed for one call: our attention in, and out again after."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock, RLock
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel

from redwood.backends.eager import ATTENTION, EagerBackend
from redwood.backends.load import wrap_model


class _Known:
    """What is known of a user's model; holds no reference to it."""

    def __init__(self) -> None:
        self.lock = RLock()  # its attention is switched for one call at a time
        self.capacity = 0
        self.checked: set[tuple[object, ...]] = set()


# NOTE: the one global of this module: a model that lives on is checked once, not at every call.
_KNOWN: WeakKeyDictionary[Any, _Known] = WeakKeyDictionary()
_KNOWN_LOCK = Lock()


@contextmanager
def borrowed(model: Any) -> Iterator[EagerBackend]:
    """Gives a backend around the model, whose attention is put back at the end."""
    with _KNOWN_LOCK:
        known = _KNOWN.setdefault(model, _Known())
    with known.lock:
        before = [(config, config._attn_implementation) for config in _configs(model)]
        # Within a call of the same thread the attention is ours already.
        check = (model.config._attn_implementation, model.dtype, model.device)
        try:
            if check not in known.checked and not (check[0] == ATTENTION and known.checked):
                known.capacity = wrap_model(model).capacity
                known.checked.add(check)
            model.set_attn_implementation(ATTENTION)
            yield EagerBackend(model, known.capacity)
        finally:
            for config, attention in before:
                config._attn_implementation = attention


def _configs(model: Any) -> list[Any]:
    """The configs of a model, those of its parts last."""
    found = [part.config for part in model.modules() if isinstance(part, PreTrainedModel)]
    for config in found:  # grows
        parts = (getattr(config, name, None) for name in config.sub_configs)
        found.extend(part for part in parts if part is not None)
    return found
