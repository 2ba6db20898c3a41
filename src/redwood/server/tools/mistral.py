"""Mistral: [TOOL_CALLS], then a list in JSON, or (since v11) a name and arguments for each call.

[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Oslo"}, "id": "a1b2c3d4e"}]
[TOOL_CALLS]get_weather[ARGS]{"city": "Oslo"}
"""

from __future__ import annotations

import re

from redwood.server.tools.hermes import named_arguments
from redwood.server.tools.json_text import ObjectScan
from redwood.server.tools.parser import Call, NoCall, TaggedParser, loads

_ARGS, _ID = "[ARGS]", "[CALL_ID]"
_WORD = r"[^\s\[\]{}]"  # a name's, or an id's: whatever else stands there is text, and no call
_SPACED = rf"\s*(?:{_WORD}+\s*)?"  # not \s*W*\s*, which tries every cut of a run of spaces
_NAME = re.compile(rf"\s*({_WORD}+)\s*(?:{re.escape(_ID)}{_SPACED})?{re.escape(_ARGS)}\s*(?=\{{)")


def _begun(text: str, then: str = "") -> str:
    """A pattern for a beginning of `text`, and for all of it with `then` behind it."""
    for sign in reversed(text):
        then = f"(?:{re.escape(sign)}{then})?"
    return then


_ARGS_BEGUN = _begun(_ARGS, r"\s*")
_ID_BEGUN = _begun(_ID, _SPACED + _ARGS_BEGUN)
_BEGINNING = re.compile(rf"{_SPACED}(?:{_ARGS_BEGUN}|{_ID_BEGUN})\Z")


class MistralParser(TaggedParser):
    """See the module."""

    opening, closing = "[TOOL_CALLS]", ""
    others = (_ARGS, _ID)

    def _head(self, body: str) -> tuple[str, int] | None:
        found = _NAME.match(body)
        return None if found is None else (found.group(1), found.end())

    def _step_held(self) -> bool:
        body = self._buffer
        if not body.strip():
            return False
        start = len(body) - len(body.lstrip())
        if body[start] not in "[{":
            found = _NAME.match(body)
            if found is None:
                if _BEGINNING.match(body):
                    return False
                return self._no_call("the call has no arguments")
            start = found.end()
        scan = ObjectScan()
        end = start + scan.feed(body[start:])
        if not scan.done:
            return False
        try:
            calls = self._read(body[:end])
        except NoCall as error:
            self._refuse(self._without_tags(body[:end]), str(error))
        else:
            for call in calls:
                self._called(call)
        self._leave(end)
        return True

    def _no_call(self, reason: str) -> bool:
        """What stands before the next call, or the end, is no call."""
        place = self._buffer.find(self.opening)
        if place < 0:
            return False
        self._refuse(self._without_tags(self._buffer[:place]), reason)
        self._leave(place)
        return True

    def _unfinished(self) -> str:
        if not self._buffer.strip() or _BEGINNING.match(self._buffer):
            return "the call has no arguments"
        if self._buffer.lstrip()[0] in "[{" or _NAME.match(self._buffer):
            return "the arguments have no end"
        return "the call has no arguments"

    def _read(self, body: str) -> list[Call]:
        if (head := self._head(body)) is not None:
            return [self._checked_text(head[0], body[head[1] :])]
        value = loads(body)
        calls = value if isinstance(value, list) else [value]
        if not calls:
            raise NoCall("there is no call in the list")
        return [self._checked(*named_arguments(each)) for each in calls]
