"""Standard streams and a working directory that are there, whatever the process was given.

A file opened while stdout is closed gets its number, and what is printed goes into that file. So
closed ones are opened before anything else: stdin as an empty file, stderr as one that forgets, and
stdout such that writing fails, as it would have: an answer that goes nowhere is an error.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import IO

_MODES = (os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)  # by descriptor


def open_streams() -> None:
    """Opens those of stdin, stdout and stderr that are closed."""
    for number, mode in enumerate(_MODES):
        try:
            os.fstat(number)
        except OSError:
            with suppress(OSError):  # opened from the lowest number on, so it gets this one
                os.open(os.devnull, mode)
    sys.stdin = sys.stdin or _stream(0, "r")
    sys.stdout = sys.stdout or _stream(1, "w")
    sys.stderr = sys.stderr or _stream(2, "w")


def _stream(number: int, mode: str) -> IO[str]:
    errors = "strict" if mode == "r" else "replace"
    return open(number, mode, encoding="utf-8", errors=errors, closefd=False)


def fault_of_folder() -> str | None:
    """Returns what is wrong with the working directory: libraries end the process without one."""
    try:
        os.getcwd()
    except OSError as error:
        return f"the working directory is gone ({error.strerror}): cd to another one"
    return None
