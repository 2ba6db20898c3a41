"""From files, folders and recorded chats to documents: lists of token ids.

A text file is a document, or several when it is long; a folder stands for the text files in it; in
a .jsonl file every line is a document: a string, or an object with one of the following (a .jsonl
file of another kind is plain text in a folder, and an error where it was named)

    text                    plain text
    messages                a chat: objects with role and content, put through the chat template
    prompt, response        a chat of one question and its answer
    token_ids               what a model said, as it was
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from redwood.errors import ArgumentError
from redwood.models.chat_template import chat_text

_BLOCK = 1 << 20  # characters that are tokenised together; a longer file is cut at line ends
_LINES = (".jsonl", ".ndjson")
_KNOWN = "a string, or an object with text, messages, prompt and response, or token_ids"


class SourceFile(NamedTuple):
    """A file to read; `given` if it was named itself, and must be text then."""

    path: Path
    size_bytes: int
    given: bool


def find_files(paths: Sequence[str | Path]) -> list[SourceFile]:
    """Returns the files that these paths stand for, folders in order of their names.

    Of folders, hidden files and links are left out.

    Raises:
        ArgumentError: a path that does not exist, or cannot be read.
    """
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            for folder, names, files in os.walk(path):
                names[:] = sorted(name for name in names if not name.startswith("."))
                for name in sorted(files):
                    file = Path(folder, name)
                    if not name.startswith(".") and file.is_file() and not file.is_symlink():
                        found.append(SourceFile(file, file.stat().st_size, False))
        elif path.exists():
            found.append(SourceFile(path, path.stat().st_size, True))
        else:
            raise ArgumentError(f"{path} does not exist: give text files, .jsonl files or folders")
    return found


class Documents:
    """The documents in files, one by one, tokenised.

    Args:
        files: as `find_files` gives them.
        tokenizer: a Transformers tokenizer.
        on_file: called with the bytes of a file when it has been read.

    Attributes:
        skipped: files of folders that are no UTF-8 text.

    Raises: when iterated, ArgumentError: a named file that is no UTF-8 text or cannot be read, a
        line that is none of the above, a chat without a chat template.
    """

    def __init__(
        self,
        files: Sequence[SourceFile],
        tokenizer: Any,
        on_file: Callable[[int], None] = lambda size_bytes: None,
    ) -> None:
        self._files, self._tokenizer, self._on_file = files, tokenizer, on_file
        self.skipped: list[Path] = []

    def __iter__(self) -> Iterator[list[int]]:
        for file in self._files:
            if file.path.suffix.lower() in _LINES and (file.given or self._is_known(file.path)):
                yield from self._tokenised(self._lines(file.path))
            else:
                try:
                    yield from self._tokenised(_blocks(file.path))
                except UnicodeDecodeError as error:
                    if file.given:
                        raise _not_text(file.path, error) from error
                    self.skipped.append(file.path)
            self._on_file(file.size_bytes)

    def _tokenised(self, texts: Iterable[str | list[int]]) -> Iterator[list[int]]:
        """Texts as token ids, about _BLOCK characters in one call; what is no text stays."""
        waiting: list[str] = []
        size = 0
        for text in texts:
            if isinstance(text, str):
                waiting.append(text)
                size += len(text)
            if size >= _BLOCK or not isinstance(text, str):
                yield from self._ids(waiting)
                waiting, size = [], 0
            if not isinstance(text, str):
                yield text
        yield from self._ids(waiting)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        made: list[list[int]] = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
        return made

    def _lines(self, path: Path) -> Iterator[str | list[int]]:
        number = 0
        try:
            with path.open(encoding="utf-8") as file:
                for line in file:
                    number += 1
                    if line.strip():
                        text = self._entry(json.loads(line))
                        if isinstance(text, str):
                            text.encode()  # half a surrogate pair cannot be tokenised
                        yield text
        except UnicodeDecodeError as error:
            raise _not_text(path, error) from error
        except OSError as error:
            raise ArgumentError(f"cannot read {path}: {error.strerror or error}") from error
        except (ValueError, RecursionError) as error:
            raise ArgumentError(f"{path} line {number}: {error}") from error

    def _is_known(self, path: Path) -> bool:
        """Whether the first line of a file is a document; others in a folder are plain text."""
        try:
            with path.open(encoding="utf-8") as file:
                line = next((line for line in file if line.strip()), "0")
            self._entry(json.loads(line))
        except (OSError, ValueError, RecursionError):
            return False
        return True

    def _entry(self, value: Any) -> str | list[int]:
        if isinstance(value, str):
            return value
        if isinstance(value, dict):
            if isinstance(value.get("text"), str):
                return str(value["text"])
            if isinstance(value.get("token_ids"), list):
                return list(value["token_ids"])
            if "messages" in value:
                return self._chat(value["messages"])
            if {"prompt", "response"} <= value.keys():
                pairs = (("user", value["prompt"]), ("assistant", value["response"]))
                return self._chat([{"role": role, "content": text} for role, text in pairs])
        raise ArgumentError(f"a line must be {_KNOWN}")

    def _chat(self, messages: Any) -> str:
        if not isinstance(messages, list) or not all(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
            for message in messages
        ):
            raise ArgumentError("messages must have a role and a content that are text")
        if not getattr(self._tokenizer, "chat_template", None):
            raise ArgumentError("this model has no chat template: give lines with text")
        return chat_text(self._tokenizer, messages)


def _blocks(path: Path) -> Iterator[str]:
    """A text file in pieces of about _BLOCK characters, cut at line ends.

    The first piece is given only when the whole file was seen to be text.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            while file.read(_BLOCK):
                continue
            file.seek(0)
            while lines := file.readlines(_BLOCK):
                yield "".join(lines)
    except OSError as error:
        raise ArgumentError(f"cannot read {path}: {error.strerror or error}") from error


def _not_text(path: Path, error: UnicodeDecodeError) -> ArgumentError:
    return ArgumentError(f"{path} is not UTF-8 text (byte {error.start})")
