"""How many tokens of keys and values fit into free memory, once the models are loaded.

Free memory is the minimum of what the system, the control groups (cgroups) of this process and its
own limits (`ulimit -v`) leave. Memory-mapped weights count as used: else the system would evict
their pages and read them from disk at every step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from redwood.backends.base import Backend, Nodes
from redwood.drafters.base import draft_models
from redwood.engine.free_memory import free_bytes
from redwood.engine.scheduler import extra_tokens

if TYPE_CHECKING:
    from redwood.engine.text import Engine

_SHARE = 0.8  # of free memory; the rest is for logits, activations, requests and their answers


def max_kv_tokens(target: Backend, drafter: Any, share: float = 1.0) -> int | None:
    """Returns how many tokens all rows together may hold; None where that is not known.

    Args:
        target, drafter: the models whose keys and values are counted.
        share: fraction of free memory that this process may use.
    """
    backends = [target, *(each.backend for each in draft_models(drafter))]
    sizes = [token_bytes(backend) for backend in backends]
    size = sum(each or 0 for each in sizes)
    free = _free_on_gpu(target) if target.device.type == "cuda" else free_bytes()
    if not size or sizes[0] is None or free is None:
        return None
    if target.device.type != "cuda":
        mapped = sum(sum(getattr(b, "weight_bytes", {}).values()) for b in backends)
        free = max(0, free - mapped)
    return max(1, int(_SHARE * share * free / size))


def limit_kv_tokens(engine: Engine, given: int | None, share: float = 1.0) -> None:
    """Sets the limit of tokens that an engine's rows together may hold (`Engine.kv_tokens`).

    Args:
        given: the operator's setting; 0: no limit. None: the engine's own, else what fits into
            free memory.
        share: fraction of free memory that this process may use.
    """
    if given is not None:
        engine.kv_tokens = given or None
    elif engine.kv_tokens is None:
        most = max_kv_tokens(engine.target, engine.drafter, share)
        capacity = engine.target.capacity
        full = engine.max_rows * (capacity + extra_tokens(engine.target, engine.drafter, capacity))
        engine.kv_tokens = None if most is None else min(most, full)


def token_bytes(backend: Backend) -> int | None:
    """Returns the bytes of one token's keys and values; None where the backend does not know."""
    if getattr(backend, "token_bytes", 0) is None:  # known once a row has ended
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
