"""A user's own Transformers model, with our attention for the time of one call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock, RLock
from typing import Any
from weakref import WeakKeyDictionary

from redwood.backends.eager.backend import ATTENTION, EagerBackend, Together
from redwood.backends.eager.load import wrap_model
from redwood.backends.eager.recurrent import Form
from redwood.models._transformers import attention_of, attentions_of, restore_attentions


class _Known:
    """Results of checking a user's model; holds no reference to it."""

    def __init__(self) -> None:
        self.lock = RLock()  # one call at a time may replace its attention
        self.capacity = 0
        self.together: Together = "flat"
        self.form: Form = "any"
        self.checked: set[tuple[object, ...]] = set()


# NOTE: the one global of this module: a model is checked once, not at every call.
_KNOWN: WeakKeyDictionary[Any, _Known] = WeakKeyDictionary()
_KNOWN_LOCK = Lock()


@contextmanager
def borrowed(model: Any) -> Iterator[EagerBackend]:
    """Yields a backend around the model; its own attention is restored at the end."""
    with _KNOWN_LOCK:
        known = _KNOWN.setdefault(model, _Known())
    with known.lock:
        before = attentions_of(model)
        # In a nested call of the same thread the attention is replaced already.
        check = (attention_of(model.config), model.dtype, model.device)
        try:
            if check not in known.checked and not (check[0] == ATTENTION and known.checked):
                wrapped = wrap_model(model)
                known.capacity, known.together = wrapped.capacity, wrapped.together
                known.form = wrapped.recurrent.form
                known.checked.add(check)
            model.set_attn_implementation(ATTENTION)
            made = EagerBackend(model, known.capacity)
            made.together, made.recurrent.form = known.together, known.form
            yield made
        finally:
            restore_attentions(before)
