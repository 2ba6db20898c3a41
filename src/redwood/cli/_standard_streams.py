"""Makes sure that the standard streams are open and that the working directory exists.

A file opened while stdout is closed gets descriptor 1, and what is printed would go into that file.
So closed streams are opened before anything else: stdin and stderr on the null device, stdout such
that writing to it fails, as it does on a closed one: an answer that is lost is an error.
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
            with suppress(OSError):  # open() takes the lowest free descriptor: this one
                os.open(os.devnull, mode)
    sys.stdin = sys.stdin or _stream(0, "r")
    sys.stdout = sys.stdout or _stream(1, "w")
    sys.stderr = sys.stderr or _stream(2, "w")


def _stream(number: int, mode: str) -> IO[str]:
    errors = "strict" if mode == "r" else "replace"
    return open(number, mode, encoding="utf-8", errors=errors, closefd=False)


def fault_of_folder() -> str | None:
    """Returns what is wrong with the working directory, None if nothing is; without one, libraries
    end the process."""
    try:
        os.getcwd()
    except OSError as error:
        return f"the working directory is gone ({error.strerror}): cd to another one"
    return None
