"""How many tokens of keys and values memory has room for, once the models are loaded.

What is free is the least of what the system, the control groups around this process and its own
limits leave. Weights that are mapped from files count as used: the system would take their pages
back, and read them from the disk at every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redwood.backends.base import Backend, Nodes
from redwood.drafters.base import ModelDrafter, parts_of

if TYPE_CHECKING:
    from redwood.engine.text import Engine

_SHARE = 0.8  # of what is free: logits, activations, requests and their answers need some, too
_UNLIMITED = 1 << 60  # control groups of the first kind say so with a huge number


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


def free_bytes(root: Path = Path("/")) -> int | None:
    """Returns the memory that this process may still take; None where the system does not say.

    Args:
        root: of the system's own files.
    """
    found = [_of_system(root), *_of_groups(root), _of_limits(root)]
    known = [each for each in found if each is not None]
    return min(known) if known else None


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


def _of_system(root: Path) -> int | None:
    available = _named(root / "proc/meminfo").get("MemAvailable:")
    return None if available is None else 1024 * available


def _of_limits(root: Path) -> int | None:
    """What `ulimit -v` leaves."""
    try:
        import resource
    except ImportError:
        return None
    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    used = _named(root / "proc/self/status").get("VmSize:")
    return None if most == resource.RLIM_INFINITY or used is None else max(0, most - 1024 * used)


def _of_groups(root: Path) -> Iterator[int]:
    """What each control group from this process's up to the root leaves, without its files."""
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
        inner = folder / path.lstrip("/")  # a container may see its own group as the root
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
    """Names and whole numbers of a file with a pair in each line."""
    try:
        rows = [line.split() for line in file.read_text("ascii").splitlines()]
    except (OSError, ValueError):
        return {}
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}
