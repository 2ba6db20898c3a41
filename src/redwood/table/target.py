"""Identity of the model that filled a table: fingerprint of its weight files, and tokenizer."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from redwood._storage import digest
from redwood.datastore.store import TokenizerId
from redwood.models import PACKAGED, gguf_parts, resolve

_SAMPLES, _SAMPLE = 256, 4096  # blocks of a weight file that are read, and their bytes
_SMALL = 1 << 20


@dataclass(frozen=True)
class TargetId:
    """Identity of a model.

    Args:
        name: as it was given, for messages only.
        weights: fingerprint of its weights and configuration; does not depend on their path.
        tokenizer: sha256 of the tokens and their ids.
        vocab_size: width of its logits.
    """

    name: str
    weights: str
    tokenizer: str
    vocab_size: int

    def matches(self, other: TargetId) -> bool:
        """Whether these are the same model; its name does not count."""
        return (self.weights, self.tokenizer, self.vocab_size) == (
            other.weights,
            other.tokenizer,
            other.vocab_size,
        )

    @property
    def short(self) -> str:
        """Name of the folder for the tables of this model."""
        return digest(repr({**asdict(self), "name": ""}))[:16]


def target_id(name: str, tokenizer: Any, vocab_size: int) -> TargetId:
    """Returns the identity of a model.

    A file above 1 MiB counts by its size and 256 blocks equally spaced in it, so that a file of
    many gigabytes costs milliseconds and a copy of it is the same model.

    Args:
        name: of the target, as `redwood.load` took it.
        tokenizer: that it is used with.

    Raises:
        ModelError: there is no such model.
    """
    own = TokenizerId.of(tokenizer).sha256
    return TargetId(_shown(name), _weights_of(name), own, int(vocab_size))


def _shown(name: str) -> str:
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def _weights_of(name: str) -> str:
    if name in PACKAGED:
        return PACKAGED[name].sha256
    path = Path(os.path.expanduser(name))
    if not path.is_file():
        path = resolve(name, progress=False)
    return _fingerprint(gguf_parts(path) if path.is_file() else _files_of(path))


def _files_of(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")])


def _fingerprint(files: Sequence[Path]) -> str:
    known = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        known.update(f"{size}\n".encode())
        with path.open("rb") as file:
            if size <= _SMALL:
                known.update(file.read())
                continue
            for i in range(_SAMPLES):
                file.seek(i * (size - _SAMPLE) // (_SAMPLES - 1))
                known.update(file.read(_SAMPLE))
    return known.hexdigest()
