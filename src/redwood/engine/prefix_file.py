"""Texts that stay over a restart: a file of their tokens, keys, values and recurrent states.

The file holds every page and every state once, whichever texts share it, and ends with a digest of
all before it.
It is written under another name and then renamed, so it is there whole or as it was.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from operator import ne
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from redwood._storage import sha256_of, typed, write_parts
from redwood.backends.native.backend import NativeBackend, extension
from redwood.engine.prefix_cache import PrefixCache
from redwood.engine.turns import when_free
from redwood.errors import ArgumentError, KvCacheError
from redwood.table.target import TargetId

if TYPE_CHECKING:
    from redwood._native import State

_log = logging.getLogger(__name__)
_MAGIC = b"redwood kv 1\n"
_SHA = 32  # bytes of the digest at the end
_MOST_HEADER = 1 << 28
_BLOCK = 1 << 20


@dataclass(frozen=True)
class _Text:
    """A text: its salt, its tokens, which of the file's pages hold them, and which of its states
    follow how many of them."""

    salt: str
    length: int
    pages: list[int]
    states: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Header:
    """What stands before tokens, pages and states; `build`: what bits depend on but the model."""

    target: dict[str, str]
    build: str
    page_bytes: int
    num_pages: int
    texts: list[_Text]
    state_bytes: int = 0
    num_states: int = 0


class PrefixFile:
    """What a prefix cache holds, in a file: read at the start, written by `close`.

    A file that is damaged, or of another build of Redwood or other weights in memory, is passed
    over with a line in the log, and replaced by `close`.

    Args:
        path: of the file, which need not exist yet; its folder must.
        target: whose keys and values they are, as identified by its files.
        backend: that computes them.
        prefixes: that get what the file holds, as much as their bound allows.

    Raises:
        KvCacheError: a file of another model, or of another kind; no folder for it.
    """

    def __init__(
        self, path: str | Path, target: TargetId, backend: NativeBackend, prefixes: PrefixCache
    ) -> None:
        self.path = Path(path).expanduser().resolve()
        self._target, self._backend, self._prefixes = target, backend, prefixes
        self._build, self._pid = _build_of(backend), os.getpid()
        if not self.path.parent.is_dir():
            raise KvCacheError(f"{self.path.parent} does not exist: make the folder first")
        if self.path.is_dir():
            raise KvCacheError(f"{self.path} is a folder: keys and values are kept in a file")
        if self.path.exists():
            if not self.path.is_file():  # it would be replaced, whatever device it is
                raise KvCacheError(f"{self.path} is no ordinary file: name another one")
            self._load()

    def _load(self) -> None:
        try:
            with self.path.open("rb") as file:
                _check_magic(file.read(len(_MAGIC)), self.path)
                header = _checked_header(file, self.path.stat().st_size)
                self._check_model(header)
                sizes = (self._backend.page_bytes, self._backend.state_bytes)
                if (header.build, header.page_bytes, header.state_bytes) != (self._build, *sizes):
                    _log.warning("%s is of another build, prompts are read anew", self.path)
                    return
                self._restore(header, file)
        except (_DamageError, ArgumentError, MemoryError) as error:
            self._prefixes.clear()
            _log.warning("%s is passed over, prompts are read anew: %s", self.path, error)
        except OSError as error:
            raise KvCacheError(f"cannot read {self.path}: {error.strerror or error}") from error

    def _check_model(self, header: _Header) -> None:
        theirs = header.target
        if (theirs["weights"], theirs["tokenizer"]) != (
            self._target.weights,
            self._target.tokenizer,
        ):
            raise KvCacheError(
                f"{self.path} belongs to {theirs['name']}, not to {self._target.name}: name "
                "another file, or remove this one"
            )

    def _restore(self, header: _Header, file: IO[bytes]) -> None:
        """Gives the cache the latest texts that fit; the file stands at the tokens."""
        counts = [text.length for text in header.texts]
        tokens = [np.frombuffer(file.read(4 * count), "<i4").tolist() for count in counts]
        backend, first = self._backend, file.tell()
        behind = first + header.num_pages * backend.page_bytes
        made = list[tuple[int, Sequence[int]]]()  # row, and its pages' numbers in the file
        states: dict[int, State] = {}  # by their numbers there
        for i in self._chosen(header):
            text = header.texts[i]
            useful = self._useful(text)
            for n in useful.values():
                if n not in states:
                    data = _block(file, behind, n, backend.state_bytes)
                    states[n] = backend.make_state(data)
            row, whole = self._begin(made, text)
            pages = (_block(file, first, n, backend.page_bytes) for n in text.pages[whole:])
            how: dict[str, Any] = {}
            if backend.state_bytes:
                found = {at: states[n] for at, n in useful.items()}
                how = {"token_ids": tokens[i], "states": found}
            try:
                backend.restore(row, pages, text.length, **how)
                self._prefixes.put(row, tokens[i], text.salt)
            except BaseException:
                backend.release(row)
                raise
            made.append((row, text.pages))

    def _chosen(self, header: _Header) -> list[int]:
        """The latest texts that fit together, in the order in which they were used."""
        backend, chosen = self._backend, list[int]()
        pages, states = set[int](), set[int]()
        for i in reversed(range(len(header.texts))):  # the latest used is last
            text = header.texts[i]
            if text.length > backend.capacity:
                continue
            pages |= set(text.pages)
            states |= set(self._useful(text).values())
            held = len(pages) - (-len(states) * backend.state_bytes // backend.page_bytes)
            if held > self._prefixes.max_pages:
                break
            chosen.append(i)
        return chosen[::-1]

    def _useful(self, text: _Text) -> dict[int, int]:
        """Those of a text's states that a row has here: the file may be of another distance."""
        every, last = self._backend.checkpoint_tokens, max(text.states, default=0)
        return {
            at: number
            for at, number in text.states.items()
            if at == last or (every and at % every == 0)
        }

    def _begin(self, made: Sequence[tuple[int, Sequence[int]]], text: _Text) -> tuple[int, int]:
        """A row that shares what another one has already, and how many pages these are."""
        best, source = 0, -1
        for row, pages in made:
            same = _same(pages, text.pages)
            if same > best and self._prefixes.holds(row):
                best, source = same, row
        size = self._backend.page_slots
        best = min(best, self._backend.length(source) // size) if best else 0
        if not best:
            return self._backend.open(), 0
        return self._backend.fork(source, best * size), best

    def save(self) -> None:
        """Writes what the cache holds now.

        Raises:
            KvCacheError: a disk that is full, a folder that cannot be written; the old file stays.
        """
        kept, backend = self._prefixes.kept(), self._backend
        rows = [(e.row, backend.page_ids(e.row), backend.states_of(e.row)) for _, e in kept]
        where: dict[int, tuple[int, int]] = {}  # of a page: a row, and its place there
        states: dict[int, State] = {}
        for row, pages, found in rows:
            for index, page in enumerate(pages):
                where.setdefault(page, (row, index))
            for state in found.values():
                states.setdefault(state.id, state)
        page_at = {page: number for number, page in enumerate(where)}
        state_at = {state: number for number, state in enumerate(states)}
        texts = [
            _Text(
                salt,
                len(entry.tokens),
                [page_at[page] for page in pages],
                {at: state_at[state.id] for at, state in found.items()},
            )
            for (salt, entry), (_, pages, found) in zip(kept, rows, strict=True)
        ]
        target = {name: str(value) for name, value in asdict(self._target).items()}
        held = (backend.page_bytes, len(where), texts, backend.state_bytes, len(states))
        head = json.dumps(asdict(_Header(target, self._build, *held))).encode()
        parts = chain(
            (np.array(entry.tokens, "<i4").tobytes() for _, entry in kept),
            (backend.read_page(*place).tobytes() for place in where.values()),
            (_bytes_of(state, backend.state_bytes) for state in states.values()),
        )
        try:
            first = (_MAGIC, len(head).to_bytes(8, "little"), head)
            write_parts(self.path, _with_digest(chain(first, parts)))
        except OSError as error:
            raise KvCacheError(f"cannot write {self.path}: {error.strerror or error}") from error

    def close(self) -> None:
        """Saves for the last time, once no step is under way; a failure is a line in the log."""
        if os.getpid() == self._pid:  # else a forked child: the file is its parent's
            when_free([self._backend], self._save_or_say)

    def _save_or_say(self) -> None:
        try:
            self.save()
        except KvCacheError as error:
            _log.warning("keys and values were not kept: %s", error)
        except Exception:
            _log.exception("%s could not be saved", self.path)


class _DamageError(ValueError):
    """The file is not what was written."""


def _build_of(backend: NativeBackend) -> str:
    """Names all that the bits of keys and values depend on, but for the files of the model."""
    code = sha256_of(Path(extension().__file__))
    return hashlib.sha256(
        repr((code, backend.spec, backend.formats, backend.kv)).encode()
    ).hexdigest()


def _check_magic(first: bytes, path: Path) -> None:
    """Tells a file that begins as ours, or did before it was damaged, from somebody else's."""
    if first == _MAGIC:
        return
    if _MAGIC.startswith(first):
        raise _DamageError("it is cut short")
    if len(first) == len(_MAGIC) and sum(map(ne, first, _MAGIC)) == 1:
        raise _DamageError("its first bytes are not what was written")
    raise KvCacheError(f"{path} holds no keys and values of Redwood")


def _checked_header(file: IO[bytes], size: int) -> _Header:
    """Reads the header, and all of the file for its digest; leaves it at the tokens."""
    count = int.from_bytes(file.read(8), "little")
    start = len(_MAGIC) + 8
    if not 0 < count <= min(_MOST_HEADER, size - start - _SHA):
        raise _DamageError("it is cut short")
    file.seek(0)
    known, left = hashlib.sha256(), size - _SHA
    while left:
        block = file.read(min(_BLOCK, left))
        if not block:
            raise _DamageError("it is cut short")
        known.update(block)
        left -= len(block)
    if file.read(_SHA) != known.digest():
        raise _DamageError("its contents do not have the digest that stands in it")
    file.seek(start)
    try:
        header: _Header = typed(_Header, json.loads(file.read(count)), "header")
    except (ValueError, ArgumentError, RecursionError) as error:
        raise _DamageError(f"its header is none: {error}") from error
    held = 4 * sum(text.length for text in header.texts)
    held += header.num_pages * header.page_bytes + header.num_states * header.state_bytes
    pages = {page for text in header.texts for page in text.pages}
    states = {state for text in header.texts for state in text.states.values()}
    if (
        size != start + count + held + _SHA
        or not all(0 <= page < header.num_pages for page in pages)
        or not all(0 <= state < header.num_states for state in states)
    ):
        raise _DamageError("it has another length than its header says")
    return header


def _block(file: IO[bytes], first: int, number: int, size: int) -> NDArray[np.uint8]:
    """One of the blocks of `size` bytes that stand from `first` on."""
    file.seek(first + number * size)
    return np.frombuffer(file.read(size), np.uint8)


def _bytes_of(state: State, size: int) -> bytes:
    out = np.empty(size, np.uint8)
    state.read(out)
    return out.tobytes()


def _same(a: Sequence[int], b: Sequence[int]) -> int:
    both = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(both) if x != y), min(len(a), len(b)))


def _with_digest(parts: Iterable[bytes]) -> Iterator[bytes]:
    """The parts, and behind them their digest."""
    known = hashlib.sha256()
    for part in parts:
        known.update(part)
        yield part
    yield known.digest()
