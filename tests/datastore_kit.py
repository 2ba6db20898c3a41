"""What the tests of the datastore share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from redwood.datastore import Datastore, create
from redwood.datastore.store import TokenizerId

TOKENIZER = TokenizerId("test", 100_000, "0" * 64)


class Words:
    """A tokenizer with a vocabulary and nothing else."""

    def __init__(self, *words: str, name: str = "words") -> None:
        self._vocab = {word: i for i, word in enumerate(words)}
        self.name_or_path = name
        self.chat_template: Any = None

    def get_vocab(self) -> dict[str, int]:
        return dict(self._vocab)

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
        assert not add_special_tokens
        return {"input_ids": [[self._vocab[word] for word in text.split()] for text in texts]}


def store_of(
    path: Path, documents: Sequence[Sequence[int]], chunk_tokens: int = 1 << 16
) -> Datastore:
    return create(path, TOKENIZER, documents, chunk_tokens=chunk_tokens)


def documents_in(store: Datastore) -> list[list[int]]:
    """The documents of a store, as they lie in its chunks."""
    found: list[list[int]] = []
    for chunk in store.chunks:
        document: list[int] = []
        for value in chunk.values.tolist():
            if value:
                document.append(value - 1)
            else:
                found.append(document)
                document = []
        assert not document
    return found


def files_in(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if entry.name != ".lock")
