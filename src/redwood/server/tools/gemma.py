"""Gemma 4 and FunctionGemma: call:NAME{key:value} between tags, strings between marks of their own.

<|tool_call>call:get_weather{city:<|"|>Oslo<|"|>,days:3}<tool_call|>
<start_function_call>call:get_weather{city:<escape>Oslo<escape>,days:3}<end_function_call>
"""

from __future__ import annotations

import json
import re
from typing import Any, ClassVar

from redwood.server.tools.parser import Call, NoCall, TaggedParser

_HEAD = re.compile(r"\s*call:\s*([^\s{]+)\s*(?=\{)")
_BARE = re.compile(r"[^,{}\[\]:]+")
_MOST_LEVELS = 64


class Gemma4Parser(TaggedParser):
    """Gemma 4's form; see the module."""

    opening, closing = "<|tool_call>", "<tool_call|>"
    others = ('<|"|>',)
    quote: ClassVar[str] = '<|"|>'

    def _read(self, body: str) -> list[Call]:
        found = _HEAD.match(body)
        if found is None:
            raise NoCall("the call has no name")
        reader = _Values(body, found.end(), self.quote)
        arguments = reader.value()
        if body[reader.place :].strip():
            raise NoCall("there is text behind the arguments")
        return [self._checked(found.group(1), arguments)]

    def _open_string(self, body: str) -> bool:
        return body.count(self.quote) % 2 == 1


class FunctionGemmaParser(Gemma4Parser):
    """FunctionGemma's form; see the module."""

    opening, closing = "<start_function_call>", "<end_function_call>"
    others = ("<escape>",)
    quote = "<escape>"


class _Values:
    """Reads values of this form; `place` is how far."""

    def __init__(self, text: str, place: int, quote: str) -> None:
        self._text, self.place, self._quote = text, place, quote

    def value(self, level: int = 0) -> Any:
        """Returns the value here; raises NoCall where there is none."""
        if level > _MOST_LEVELS:
            raise NoCall("the arguments are nested too deep")
        if self._skip("{"):
            return self._object(level)
        if self._skip("["):
            return self._list(level)
        return self._leaf()

    def _object(self, level: int) -> dict[str, Any]:
        made: dict[str, Any] = {}
        while not self._skip("}"):
            if made:
                self._must(",")
            key = str(self._string() if self._at_quote() else self._bare())
            self._must(":")
            made[key] = self.value(level + 1)
        return made

    def _list(self, level: int) -> list[Any]:
        made: list[Any] = []
        while not self._skip("]"):
            if made:
                self._must(",")
            made.append(self.value(level + 1))
        return made

    def _leaf(self) -> Any:
        if self._at_quote():
            return self._string()
        text = self._bare()
        try:
            return json.loads(text)
        except ValueError:
            return text

    def _at_quote(self) -> bool:
        self._space()
        return self._text.startswith(self._quote, self.place)

    def _string(self) -> str:
        start = self.place + len(self._quote)
        end = self._text.find(self._quote, start)
        if end < 0:
            raise NoCall("a string has no end")
        self.place = end + len(self._quote)
        return self._text[start:end]

    def _bare(self) -> str:
        self._space()
        found = _BARE.match(self._text, self.place)
        if found is None:
            raise NoCall("the arguments are not complete")
        self.place = found.end()
        return found.group().strip()

    def _skip(self, sign: str) -> bool:
        self._space()
        if self._text.startswith(sign, self.place):
            self.place += 1
            return True
        return False

    def _must(self, sign: str) -> None:
        if not self._skip(sign):
            raise NoCall(f"the arguments lack a {sign!r}")

    def _space(self) -> None:
        while self.place < len(self._text) and self._text[self.place].isspace():
            self.place += 1
