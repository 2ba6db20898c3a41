"""A corpus on disk: prompts and the target's answers, in files that are whole or refused.

A file holds some samples as safetensors, with a digest and the key of the run that made it; it
appears under its name in one step. No model is known here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from redwood._storage import write_whole
from redwood.errors import ArgumentError

_ABOUT = "redwood"  # one entry: safetensors writes several in any order
_PARTS = ("prompt_lengths", "answer_lengths", "tokens", "top_ids", "top_logprobs")


@dataclass(frozen=True, eq=False)
class Sample:
    """A prompt and the target's answer to it.

    Args:
        prompt, answer: token ids, at least one each.
        top_ids, top_logprobs: [A, k] int64 and float32, the target's most probable tokens at each
            position of the answer, best first; no columns if they were not kept. Where the target
            allows fewer than k tokens the rest has a log-probability of -inf.
    """

    prompt: list[int]
    answer: list[int]
    top_ids: NDArray[np.int64]
    top_logprobs: NDArray[np.float32]

    @classmethod
    def of(cls, prompt: Sequence[int], answer: Sequence[int]) -> Sample:
        """Returns a sample without probabilities."""
        none = np.empty((len(answer), 0))
        return cls(list(prompt), list(answer), none.astype(np.int64), none.astype(np.float32))


def write_samples(path: Path, key: str, samples: Sequence[Sample]) -> None:
    """Writes a file of samples in one step.

    Raises:
        OSError: a disk that is full, a folder that cannot be written.
    """
    arrays = {
        "prompt_lengths": np.array([len(sample.prompt) for sample in samples], np.int64),
        "answer_lengths": np.array([len(sample.answer) for sample in samples], np.int64),
        "tokens": np.concatenate([np.array(s.prompt + s.answer, np.int64) for s in samples]),
        "top_ids": np.concatenate([sample.top_ids for sample in samples]),
        "top_logprobs": np.concatenate([sample.top_logprobs for sample in samples]),
    }
    write_whole(path, save(arrays, {_ABOUT: json.dumps([key, _digest(arrays)])}))


def read_samples(path: Path, key: str | None = None) -> list[Sample]:
    """Returns the samples of a file.

    Args:
        key: the one it must have been written with; None: any.

    Raises:
        ArgumentError: a file that is damaged or of another run; the message names it.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            made_with, digest = json.loads((file.metadata() or {})[_ABOUT])
            arrays = {name: file.get_tensor(name) for name in _PARTS}
        whole = digest == _digest(arrays)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ArgumentError(f"{path} is damaged ({error}): remove it, and run again") from error
    if not whole:
        raise ArgumentError(f"{path} is damaged (its digest differs): remove it, and run again")
    if key is not None and made_with != key:
        raise ArgumentError(f"{path} is of another run: remove it, or choose another folder")
    return _samples(arrays)


def read_corpus(folder: Path, key: str | None = None) -> list[Sample]:
    """Returns all samples of a folder, in order; none if there is no such folder.

    Raises: as `read_samples`.
    """
    files = sorted(folder.glob("*.safetensors"))
    return [sample for file in files for sample in read_samples(file, key)]


def _samples(arrays: dict[str, NDArray[np.generic]]) -> list[Sample]:
    tokens = arrays["tokens"].tolist()
    ids, logprobs = arrays["top_ids"], arrays["top_logprobs"]
    made, token, row = list[Sample](), 0, 0
    lengths = zip(arrays["prompt_lengths"].tolist(), arrays["answer_lengths"].tolist(), strict=True)
    for prompt, answer in lengths:
        rows = slice(row, row + answer)
        middle, end = token + prompt, token + prompt + answer
        made.append(
            Sample(
                tokens[token:middle],
                tokens[middle:end],
                ids[rows].astype(np.int64),
                logprobs[rows].astype(np.float32),
            )
        )
        token, row = end, rows.stop
    return made


def _digest(arrays: dict[str, NDArray[np.generic]]) -> str:
    made = hashlib.sha256()
    for name in _PARTS:
        made.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        made.update(np.ascontiguousarray(arrays[name]).tobytes())
    return made.hexdigest()
