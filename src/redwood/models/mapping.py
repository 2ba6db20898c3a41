"""Memory-mapped files, and the error when one of them is truncated while it is used."""

from __future__ import annotations

import mmap
from typing import BinaryIO

try:
    from redwood import _native
except ImportError:  # installed without it
    _native = None  # type: ignore[assignment]


def explain_bus_errors() -> None:
    """From now on, a mapped file that was cut short ends the process with a line that names it.

    The system ends a process that reads behind the end of such a file (SIGBUS); no error of Python
    can be made of that. Handlers that others have set still get their turn.
    """
    explain = getattr(_native, "explain_bus_errors", None)
    if explain is not None:
        explain()


def mapped(file: BinaryIO) -> mmap.mmap:
    """Returns a file's bytes, mapped for reading.

    Raises:
        ValueError: an empty file.
        OSError: one that cannot be mapped.
    """
    explain_bus_errors()
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
