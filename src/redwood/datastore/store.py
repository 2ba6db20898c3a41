"""Reads a datastore: a folder of chunks, and the manifest that says which of them count.

Chunk files never change and their names are not reused; the manifest is replaced atomically. So a
reader finds the old state or the new one, and an open `Datastore` is a snapshot that later
additions do not change. `build` writes.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from redwood import _storage as files
from redwood._storage import sha256_of
from redwood.datastore.chunk import Chunk
from redwood.errors import DatastoreError, TokenizerMismatchError

MANIFEST = "datastore.json"
FORMAT = 1
LOCK = ".lock"
_TRIES = 20  # a writer may replace the manifest, and remove a chunk, between two reads


@dataclass(frozen=True)
class TokenizerId:
    """Identity of the tokenizer of a datastore.

    Args:
        name: of the model it belongs to, for messages and for adding text later.
        vocab_size: number of its tokens.
        sha256: of its tokens and their ids.
    """

    name: str
    vocab_size: int
    sha256: str

    @classmethod
    def of(cls, tokenizer: Any, name: str = "") -> Self:
        """Returns the identity of a Transformers tokenizer: equal if equal ids are equal tokens."""
        vocab: dict[str, int] = tokenizer.get_vocab()
        digest = hashlib.sha256()
        for token, index in sorted(vocab.items(), key=lambda item: (item[1], item[0])):
            digest.update(f"{index} {token!r}\n".encode("utf-8", "backslashreplace"))
        known = name or str(getattr(tokenizer, "name_or_path", "") or "")
        return cls(known, len(vocab), digest.hexdigest())


@dataclass(frozen=True)
class ChunkEntry:
    """A chunk in the manifest: size in bytes, mtime in ns."""

    file: str
    num_values: int
    num_documents: int
    size_bytes: int
    mtime_ns: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The contents of `datastore.json`.

    Args:
        format: version of the layout.
        tokenizer: that the token ids are of.
        chunk_tokens: most values of a chunk, ends of documents included.
        next_number: of the next chunk file.
        chunks: oldest first.
    """

    format: int
    tokenizer: TokenizerId
    chunk_tokens: int
    next_number: int
    chunks: tuple[ChunkEntry, ...] = ()

    @property
    def num_documents(self) -> int:
        """Documents in all chunks; one longer than a chunk counts once for each part."""
        return sum(chunk.num_documents for chunk in self.chunks)

    @property
    def num_tokens(self) -> int:
        """Tokens in all chunks."""
        return sum(chunk.num_values - chunk.num_documents for chunk in self.chunks)

    @property
    def size_bytes(self) -> int:
        """Bytes of all chunks on disk."""
        return sum(chunk.size_bytes for chunk in self.chunks)


def read_manifest(path: Path) -> Manifest:
    """Returns the manifest of a datastore's folder.

    Raises:
        DatastoreError: no datastore, a damaged manifest, or one of another version.
    """
    file = path / MANIFEST
    try:
        value = files.read(file)
        version = value.get("format") if isinstance(value, dict) else None
        if version != FORMAT:
            raise DatastoreError(
                f"{path} has format {version!r}, and this Redwood reads {FORMAT}: "
                "build it anew with `redwood index create`"
            )
        manifest: Manifest = files.typed(Manifest, value, "manifest")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DatastoreError(f"{path} is no datastore: `redwood index create` makes one") from error
    except OSError as error:
        raise DatastoreError(f"cannot read {file}: {error.strerror or error}") from error
    except ValueError as error:
        raise DatastoreError(f"{file} is damaged: {error}") from error
    odd = [chunk.file for chunk in manifest.chunks if Path(chunk.file).name != chunk.file]
    if odd:
        raise DatastoreError(f"{file} is damaged: {odd[0]!r} is no file name")
    return manifest


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Replaces the manifest atomically. Raises OSError, after which the old one is still there."""
    files.write(path / MANIFEST, asdict(manifest))


@dataclass(frozen=True, eq=False)
class Datastore:
    """A datastore as it was when it was opened. Safe to read from several threads.

    Args:
        path: its folder.
        manifest: what it holds.
        chunks: mapped, in the manifest's order.
    """

    path: Path
    manifest: Manifest
    chunks: tuple[Chunk, ...] = field(repr=False)

    @classmethod
    def open(cls, path: str | Path, tokenizer: Any = None) -> Self:
        """Opens a datastore for reading.

        A file whose size and mtime are those of the manifest is not read; another one (a copy) is
        read and its digest checked, at every opening.

        Args:
            tokenizer: of the model that it drafts for; None: not checked.

        Raises:
            DatastoreError: missing, damaged, or of another version.
            TokenizerMismatchError: made with another tokenizer.
        """
        return cls._open(Path(path), tokenizer)

    @classmethod
    def _open(cls, path: Path, tokenizer: Any) -> Self:
        for attempt in range(_TRIES):
            manifest = read_manifest(path)
            if tokenizer is not None:
                check_tokenizer(path, manifest, tokenizer)
            try:
                chunks = [open_chunk(path, entry) for entry in manifest.chunks]
                return cls(path, manifest, tuple(chunks))
            except DatastoreError:
                if attempt + 1 == _TRIES or read_manifest(path) == manifest:
                    raise
        raise AssertionError("the last attempt returns or raises")

    def verify(self) -> None:
        """Reads everything and checks digests and the order of the suffixes. Seconds per GB.

        Raises:
            DatastoreError: the first damage that is found.
        """
        for entry in self.manifest.chunks:
            chunk = open_chunk(self.path, entry, deep=True)
            if fault := chunk.problem():
                raise DatastoreError(f"{chunk.path} is damaged: {fault}; build the datastore anew")


def open_chunk(path: Path, entry: ChunkEntry, *, deep: bool = False) -> Chunk:
    """Opens a chunk of a datastore; checks its digest if its mtime has changed, or if `deep`.

    Raises:
        DatastoreError: missing or damaged.
    """
    file = path / entry.file
    chunk = Chunk(file, entry.num_values, entry.size_bytes)
    try:
        changed = deep or file.stat().st_mtime_ns != entry.mtime_ns
        damaged = changed and sha256_of(file) != entry.sha256
    except OSError as error:
        raise DatastoreError(f"cannot read {file}: {error.strerror or error}") from error
    if damaged:
        raise DatastoreError(
            f"{file} is damaged: its sha256 is not the one that was written; "
            "build the datastore anew"
        )
    return chunk


def check_tokenizer(path: Path, manifest: Manifest, tokenizer: Any) -> None:
    """Raises TokenizerMismatchError if the ids of a datastore mean other tokens."""
    ours, theirs = TokenizerId.of(tokenizer), manifest.tokenizer
    if ours.sha256 != theirs.sha256:
        raise TokenizerMismatchError(
            f"{path} was made with another tokenizer, that of {theirs.name or 'an unnamed model'} "
            f"({theirs.vocab_size} tokens, here {ours.vocab_size}): make one for this model with "
            "`redwood index create`"
        )
