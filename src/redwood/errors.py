"""Every error that Redwood raises on purpose.

RedwoodError
├── ArgumentError        a value that cannot be right (also a ValueError)
├── CapacityError        a prompt or a tree that does not fit (also a ValueError)
├── UnsupportedError     something that cannot be served exactly, refused with the reason
│   └── TokenizerMismatchError   drafter and target do not speak the same tokens
├── ModelError           a model that is missing, damaged or could not be converted
├── ProfileError         a calibration profile that is missing, damaged or of something else
├── DatastoreError       a datastore that is missing, damaged, or could not be written
├── TableError           a successor table that is missing, damaged or of another model
├── ParallelError        processes of one model that lost each other, or disagree
└── NumericalError       NaN or infinite logits

A message says what was wrong, with the value, and what to do; the command line prints it as one
line.
"""

import os
from numbers import Integral


class RedwoodError(Exception):
    """Base of all errors raised on purpose."""


class ArgumentError(RedwoodError, ValueError):
    """A value that cannot be right, for instance a negative temperature."""


class CapacityError(RedwoodError, ValueError):
    """A prompt, a tree or a number of rows that does not fit what was reserved."""


class UnsupportedError(RedwoodError):
    """Something that Redwood cannot do exactly, and therefore refuses."""


class TokenizerMismatchError(UnsupportedError):
    """Drafter and target use different token ids; the message names the first difference."""


class ModelError(RedwoodError):
    """A model that is missing, damaged, or could not be fetched or converted."""


class ProfileError(RedwoodError):
    """A calibration profile that is missing, damaged, or was made for something else."""


class DatastoreError(RedwoodError):
    """A datastore that is missing, damaged, of another version, or that could not be written."""


class TableError(RedwoodError):
    """A successor table on disk that is missing, damaged, of another version or another model."""


class KvCacheError(RedwoodError):
    """Keys and values in a file are another model's, or cannot be read or written."""


class ParallelError(RedwoodError):
    """Processes that hold one model together and lost each other, or came to disagree."""


class NumericalError(RedwoodError):
    """NaN or infinite logits: the model's answer cannot be sampled from."""


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raises ArgumentError unless `value` is an integer, no bool, of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ArgumentError(f"{name} {value!r} must be a whole number")
    if value < least:
        raise ArgumentError(f"{name} {value} must be at least {least}")


def check_process(pid: int) -> None:
    """Raises UnsupportedError unless this is the process `pid`, where a model was loaded.

    Threads do not survive a fork, and a child that waits for them would wait for ever.
    """
    if os.getpid() != pid:
        raise UnsupportedError(
            f"a model loaded in process {pid} cannot be used in process {os.getpid()}, forked from "
            'it: load it there, or start processes by "spawn"'
        )
