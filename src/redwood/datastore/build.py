"""Writes a datastore: creates it, adds documents, drops the oldest ones; one writer at a time.

An addition writes new chunk files, then replaces the manifest atomically, then deletes the files
that the manifest no longer names. The next writer deletes what a killed one left.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from redwood.datastore.chunk import END, MOST_VALUES, Values, as_values, chunk_bytes
from redwood.datastore.chunk import write_chunk as write_chunk_file
from redwood.datastore.folder import clean, discard, explained, foreign_files, writing
from redwood.datastore.store import (
    FORMAT,
    MANIFEST,
    ChunkEntry,
    Datastore,
    Manifest,
    TokenizerId,
    check_tokenizer,
    open_chunk,
    read_manifest,
    write_manifest,
)
from redwood.errors import ArgumentError, DatastoreError, check_count

CHUNK_TOKENS = 1 << 23
"""Tokens of a chunk: every chunk is searched, and the last one is sorted anew by an addition."""

_LEAST_CHUNK = 16

Document = Sequence[int] | NDArray[Any]


class Added(NamedTuple):
    """Result of an addition; a document longer than a chunk counts once for each part."""

    num_documents: int
    num_tokens: int
    manifest: Manifest


def create(
    path: str | Path,
    tokenizer: Any,
    documents: Iterable[Document] = (),
    *,
    name: str = "",
    chunk_tokens: int = CHUNK_TOKENS,
) -> Datastore:
    """Creates a datastore with these documents, or nothing if that fails, and opens it.

    Args:
        path: a folder that does not exist yet, or is empty.
        tokenizer: of the model that it drafts for, or its `TokenizerId`.
        documents: as for `add`.
        name: of that model.
        chunk_tokens: tokens of a chunk at most, from 16 to 2**29.

    Raises:
        ArgumentError: the folder is not empty, `chunk_tokens` is out of range; see `add`.
        DatastoreError: the folder cannot be written, or the disk is full.
        UnsupportedError: pydivsufsort is not installed, and there are documents.
    """
    check_count("chunk_tokens", chunk_tokens, least=_LEAST_CHUNK)
    if chunk_tokens > MOST_VALUES:
        raise ArgumentError(f"chunk_tokens {chunk_tokens} must be at most {MOST_VALUES}")
    path = Path(path)
    known = tokenizer if isinstance(tokenizer, TokenizerId) else TokenizerId.of(tokenizer, name)
    fresh = not path.exists()
    with explained(path):
        path.mkdir(parents=True, exist_ok=True)
    try:
        with writing(path):
            _refuse_what_is_there(path)
            empty = Manifest(FORMAT, known, int(chunk_tokens), 1)
            _extend(path, empty, documents, None, known=False)
    except BaseException:
        if fresh:
            discard(path)
        raise
    return Datastore.open(path)


def _refuse_what_is_there(path: Path) -> None:
    if (path / MANIFEST).exists():  # whole or damaged, of this version or another
        raise ArgumentError(
            f"{path} is a datastore already: `redwood index add` adds to it, "
            "`redwood index remove` removes it"
        )
    others = foreign_files(path)
    if others:
        raise ArgumentError(
            f"{path} is not empty (it holds {others[0]!r}): give a folder that does not exist yet"
        )


def add(
    path: str | Path,
    documents: Iterable[Document],
    *,
    tokenizer: Any = None,
    most_tokens: int | None = None,
) -> Added:
    """Adds documents, all of them or none; sorts the last chunk again and creates further ones.

    A document that does not fit into the last chunk begins a new one; one that is longer than a
    chunk is cut into parts. Empty documents are skipped.

    Args:
        documents: token ids of each, read one by one; memory for one chunk is needed.
        tokenizer: whose ids these are; None: not checked.
        most_tokens: the oldest chunks are dropped as long as the datastore holds more; at least
            `chunk_tokens`. None: nothing is dropped.

    Raises:
        DatastoreError: no datastore, damaged, another version, a full disk. Nothing is changed.
        TokenizerMismatchError: made with another tokenizer.
        ArgumentError: documents that are no token ids.
        UnsupportedError: pydivsufsort is not installed.
    """
    path = Path(path)
    if not (path / MANIFEST).exists():
        read_manifest(path)  # says what is wrong
    with writing(path):
        old = read_manifest(path)
        if tokenizer is not None:
            check_tokenizer(path, old, tokenizer)
        if most_tokens is not None and most_tokens < old.chunk_tokens:
            raise ArgumentError(
                f"most_tokens {most_tokens} must be at least chunk_tokens, {old.chunk_tokens}"
            )
        return _extend(path, old, documents, most_tokens, known=True)


def _extend(
    path: Path,
    old: Manifest,
    documents: Iterable[Document],
    most_tokens: int | None,
    *,
    known: bool,
) -> Added:
    """Writes new chunks and a new manifest, or leaves the old ones; `known`: the old one exists."""
    clean(path, old)
    addition = _Addition(path, old)
    try:
        for document in documents:
            addition.take(as_values(document))
        new = addition.finish(most_tokens)
        if new != old or not known:
            with explained(path):
                write_manifest(path, new)
    except BaseException:
        # The manifest on disk decides: an interruption may come just after it was replaced.
        with suppress(DatastoreError):
            clean(path, read_manifest(path) if (path / MANIFEST).exists() else old)
        raise
    clean(path, new)
    return Added(addition.num_documents, addition.num_tokens, new)


class _Addition:
    """Chunks of an addition; they do not count before the manifest is written."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self._path, self._manifest = path, manifest
        self._chunks = list(manifest.chunks)
        self._number = manifest.next_number
        self._pending: list[Values] = []
        self._size = 0
        self._last: ChunkEntry | None = None  # to be sorted again
        if self._chunks and self._chunks[-1].num_values < manifest.chunk_tokens:
            self._last = self._chunks[-1]
            self._size = self._last.num_values
        self.num_documents = self.num_tokens = 0

    def take(self, values: Values) -> None:
        """Adds a document as `as_values` gave it."""
        most = self._manifest.chunk_tokens
        for start in range(0, len(values) - 1, most - 1):
            part = values[start : min(start + most - 1, len(values) - 1)]
            if self._size + len(part) + 1 > most:
                self._write()
            self._pending.append(np.append(part, np.uint32(END)))
            self._size += len(part) + 1
            self.num_documents += 1
            self.num_tokens += len(part)

    def finish(self, most_tokens: int | None) -> Manifest:
        """Writes the pending chunk; returns the manifest of all chunks."""
        self._write()
        chunks = self._chunks
        while most_tokens is not None and sum(c.num_values for c in chunks) > most_tokens:
            chunks = chunks[1:]
        return replace(self._manifest, chunks=tuple(chunks), next_number=self._number)

    def _write(self) -> None:
        if self._pending:
            values, documents = np.concatenate(self._pending), len(self._pending)
            if self._last is not None:
                old = open_chunk(self._path, self._last, deep=True)
                values = np.concatenate((old.values.astype(np.uint32), values))
                documents += self._last.num_documents
                self._chunks.pop()
            with explained(self._path, chunk_bytes(len(values))):
                name = f"{self._number:08d}.chunk"
                made = write_chunk_file(self._path / name, values)
            num, size_bytes, mtime_ns, sha256 = made
            self._chunks.append(ChunkEntry(name, num, documents, size_bytes, mtime_ns, sha256))
            self._number += 1
        self._pending, self._size, self._last = [], 0, None
