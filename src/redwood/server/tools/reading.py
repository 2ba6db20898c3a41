"""From an answer's text to its parts: reasoning, text, calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from redwood.server.tools.parts import (
    CallArguments,
    CallEnd,
    CallStart,
    Malformed,
    Part,
    Reasoning,
    Text,
)


class Reader(Protocol):
    """Reads one answer, piece by piece; see `ToolParser`."""

    def feed(self, text: str) -> list[Part]:
        """Returns what is certain after a further piece."""
        ...

    def finish(self, *, complete: bool) -> list[Part]:
        """Returns the rest; `complete`: the model ended the answer itself."""
        ...


class PlainReader:
    """Text is text."""

    def feed(self, text: str) -> list[Part]:
        """As `Reader.feed`."""
        return [Text(text)] if text else []

    def finish(self, *, complete: bool) -> list[Part]:
        """As `Reader.finish`."""
        return []


class OneCall:
    """Lets one call through; further ones are text with a reason.

    Args:
        reader: reads the answer.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._called = False
        self._extra: str | None = None

    def feed(self, text: str) -> list[Part]:
        """As `Reader.feed`."""
        return self._first(self._reader.feed(text))

    def finish(self, *, complete: bool) -> list[Part]:
        """As `Reader.finish`."""
        made = self._first(self._reader.finish(complete=complete))
        if self._extra is not None:
            made.append(Malformed(self._extra, _ONE))
        return made

    def _first(self, parts: list[Part]) -> list[Part]:
        made: list[Part] = []
        for part in parts:
            if self._called and isinstance(part, CallStart):
                self._extra = f"\n{part.name} "
            elif self._extra is not None and isinstance(part, CallArguments):
                self._extra += part.text
            elif self._extra is not None and isinstance(part, CallEnd):
                made.append(Malformed(self._extra, _ONE))
                self._extra = None
            else:
                self._called = self._called or isinstance(part, CallStart)
                made.append(part)
        return made


_ONE = "parallel_tool_calls is false: one call at most"


@dataclass(frozen=True)
class ThinkTags:
    """What stands around a model's reasoning."""

    opening: str
    closing: str


_KNOWN = (ThinkTags("<think>", "</think>"), ThinkTags("[THINK]", "[/THINK]"))


def think_tags_of(template: Any) -> ThinkTags | None:
    """Returns the tags of a chat template that knows reasoning, None for others."""
    if isinstance(template, Mapping):
        template = template.get("default", "")
    text = str(template or "")
    return next((tags for tags in _KNOWN if tags.closing in text), None)


class ThinkingReader:
    """Takes reasoning off the beginning of an answer; the rest goes to another reader.

    White space at both ends of the reasoning, and before the answer, is dropped.

    Args:
        tags: around it.
        inside: whether the prompt has opened it already.
        then: reads the rest.
    """

    def __init__(self, tags: ThinkTags, then: Reader, *, inside: bool) -> None:
        self._tags, self._then = tags, then
        self._state = "inside" if inside else "before"
        self._buffer = ""
        self._thought = False
        self._space = ""

    def feed(self, text: str) -> list[Part]:
        """As `Reader.feed`."""
        if self._state == "after":
            return self._then.feed(text)
        self._buffer += text
        parts: list[Part] = []
        if self._state == "before":
            self._begin()
        if self._state == "inside":
            parts += self._think()
        if self._state == "gap" and (rest := self._buffer.lstrip()):
            self._state = "after"
            self._buffer = rest
        if self._state == "after" and self._buffer:
            rest, self._buffer = self._buffer, ""
            parts += self._then.feed(rest)
        return parts

    def finish(self, *, complete: bool) -> list[Part]:
        """As `Reader.finish`."""
        parts: list[Part] = []
        if self._state == "inside":
            parts += self._said(self._buffer)
        elif self._state == "before":
            parts += self._then.feed(self._buffer)
        return parts + self._then.finish(complete=complete)

    def _begin(self) -> None:
        """Whether the answer begins with reasoning, once that is certain."""
        text = self._buffer.lstrip()
        if text.startswith(self._tags.opening):
            self._buffer = text[len(self._tags.opening) :]
            self._state = "inside"
        elif not self._tags.opening.startswith(text):
            self._state = "after"

    def _think(self) -> list[Part]:
        closing = self._tags.closing
        place = self._buffer.find(closing)
        if place >= 0:
            said = self._said(self._buffer[:place])
            self._buffer = self._buffer[place + len(closing) :]
            self._state = "gap"
            return said
        held = next(
            (n for n in range(len(closing) - 1, 0, -1) if self._buffer.endswith(closing[:n])), 0
        )
        end = len(self._buffer) - held
        said = self._said(self._buffer[:end])
        self._buffer = self._buffer[end:]
        return said

    def _said(self, text: str) -> list[Part]:
        text = self._space + text
        if not self._thought:
            text = text.lstrip()
        kept = text.rstrip()
        self._space = text[len(kept) :]
        if not kept:
            return []
        self._thought = True
        return [Reasoning(kept)]
