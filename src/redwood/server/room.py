"""How many tokens of keys and values memory has room for, once the models are loaded.

What is free is the least of what the system, the control groups around this process and its own
limits leave. Weights that are mapped from files count as used: the system would take their pages
back, and read them from the disk at every step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from redwood.backends.base import Backend, Nodes
from redwood.drafters.base import ModelDrafter, parts_of
from redwood.engine.free_memory import free_bytes

if TYPE_CHECKING:
    from redwood.engine.text import Engine

_SHARE = 0.8  # of what is free: logits, activations, requests and their answers need some, too


def room_for_tokens(target: Backend, drafter: Any, share: float = 1.0) -> int | None:
    """Returns how many tokens rows may hold together; None where that is not known.

    Args:
        share: of the memory that is free, for this process.
    """
    backends = [target, *(p.backend for p in parts_of(drafter) if isinstance(p, ModelDrafter))]
    sizes = [token_bytes(backend) for backend in backends]
    size = sum(each or 0 for each in sizes)
    free = _free_on_gpu(target) if target.device.type == "cuda" else free_bytes()
    if not size or sizes[0] is None or free is None:
        return None
    if target.device.type != "cuda":
        mapped = sum(sum(getattr(b, "weight_bytes", {}).values()) for b in backends)
        free = max(0, free - mapped)
    return max(1, int(_SHARE * share * free / size))


def bound_tokens(engine: Engine, given: int | None, share: float = 1.0) -> None:
    """Gives an engine the bound of tokens that its rows may hold.

    Args:
        given: by the operator; 0: none. None: the engine's own, else what memory has room for.
        share: of the memory that is free, for this process.
    """
    if given is not None:
        engine.kv_tokens = given or None
    elif engine.kv_tokens is None:
        room = room_for_tokens(engine.target, engine.drafter, share)
        full = engine.max_rows * engine.target.capacity
        engine.kv_tokens = None if room is None else min(room, full)


def token_bytes(backend: Backend) -> int | None:
    """Returns the memory of one token's keys and values; None for a backend that does not say."""
    if getattr(backend, "token_bytes", 0) is None:  # it knows once a row has ended
        row = backend.open()
        try:
            backend.extend([Nodes(row, [0])])
        finally:
            backend.release(row)
    size: int | None = getattr(backend, "token_bytes", None)
    return size


def _free_on_gpu(target: Backend) -> int | None:
    import torch

    free: int = torch.cuda.mem_get_info(target.device)[0]
    return (
        free
        + torch.cuda.memory_reserved(target.device)
        - torch.cuda.memory_allocated(target.device)
    )
