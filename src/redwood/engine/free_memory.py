"""Memory that this process may still allocate: the least of what the system, its cgroups and its
own limits leave."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_UNLIMITED = 1 << 60  # bytes; cgroups v1 write a huge number for "no limit"


def free_bytes(root: Path = Path("/")) -> int | None:
    """Returns the bytes that this process may still allocate; None where they are not known.

    Args:
        root: folder that holds /proc and /sys.
    """
    found = [_free_of_system(root), *_free_of_cgroups(root), _free_of_limits(root)]
    known = [each for each in found if each is not None]
    return min(known) if known else None


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
