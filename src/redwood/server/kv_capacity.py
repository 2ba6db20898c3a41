"""How many tokens of keys and values fit into free memory, once the models are loaded.

Free memory is the minimum of what the system, the control groups (cgroups) of this process and its
own limits (`ulimit -v`) leave. Memory-mapped weights count as used: else the system would evict
their pages and read them from disk at every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redwood.backends.base import Backend, Nodes
from redwood.drafters.base import ModelDrafter, parts_of

if TYPE_CHECKING:
    from redwood.engine.text import Engine

_SHARE = 0.8  # of free memory; the rest is for logits, activations, requests and their answers
_UNLIMITED = 1 << 60  # bytes; cgroups v1 write a huge number for "no limit"


def max_kv_tokens(target: Backend, drafter: Any, share: float = 1.0) -> int | None:
    """Returns how many tokens all rows together may hold; None where that is not known.

    Args:
        target, drafter: the models whose keys and values are counted.
        share: fraction of free memory that this process may use.
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
        full = engine.max_rows * engine.target.capacity
        engine.kv_tokens = None if most is None else min(most, full)


def free_bytes(root: Path = Path("/")) -> int | None:
    """Returns the bytes that this process may still allocate; None where they are not known.

    Args:
        root: folder that holds /proc and /sys.
    """
    found = [_free_of_system(root), *_free_of_cgroups(root), _free_of_limits(root)]
    known = [each for each in found if each is not None]
    return min(known) if known else None


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


def _free_of_system(root: Path) -> int | None:
    available = _named(root / "proc/meminfo").get("MemAvailable:")
    return None if available is None else 1024 * available


def _free_of_limits(root: Path) -> int | None:
    """What `ulimit -v` leaves, in bytes."""
    try:
        import resource
    except ImportError:
        return None
    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    used = _named(root / "proc/self/status").get("VmSize:")
    return None if most == resource.RLIM_INFINITY or used is None else max(0, most - 1024 * used)


def _free_of_cgroups(root: Path) -> Iterator[int]:
    """What each cgroup from this process's up to the root leaves, in bytes; its page cache counts
    as free."""
    try:
        lines = (root / "proc/self/cgroup").read_text("ascii").splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        number, kinds, path = line.split(":", 2)
        folder = root / "sys/fs/cgroup"
        if number == "0":
            names = ("memory.max", "memory.current", "file")
        elif "memory" in kinds.split(","):
            folder /= "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache")
        else:
            continue
        inner = folder / path.lstrip("/")  # in a container, its own group may be the root
        for group in (inner, *inner.parents):
            if group == folder.parent:
                break
            most, used = _number(group / names[0]), _number(group / names[1])
            if most is not None and used is not None and most < _UNLIMITED:
                cached = _named(group / "memory.stat").get(names[2], 0)
                yield max(0, most - max(0, used - cached))


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text("ascii"))
    except (OSError, ValueError):  # "max", or no such group
        return None


def _named(file: Path) -> dict[str, int]:
    """A file with a name and an integer in each line, as a mapping."""
    try:
        rows = [line.split() for line in file.read_text("ascii").splitlines()]
    except (OSError, ValueError):
        return {}
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}
