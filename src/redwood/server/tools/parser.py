"""What every reader of tool calls offers, and what most of them share.

`TaggedParser` is for forms in which a call stands between tags: it finds them, however the text was
cut, keeps the text around them, and asks a subclass what stands between them.
"""

from __future__ import annotations

import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from redwood.server.tools.json_text import ObjectScan
from redwood.server.tools.parts import CallArguments, CallEnd, CallStart, Malformed, Part, Text

Schemas = Mapping[str, Mapping[str, Any]]
"""The tools there are: name -> JSON schema of the parameters."""


class Call(NamedTuple):
    """A call that was read: the tool's name, and the text of a JSON object."""

    name: str
    arguments: str


class NoCall(Exception):
    """What should have been a call is none; the message says why, in a few words."""


class ToolParser(ABC):
    """Reads one answer, piece by piece; what comes out does not depend on how it was cut.

    Tags of a form are never text, not even where they stand alone; what may be the beginning of one
    is held back until the next piece decides, or the end. White space beside a call is no text
    either; where something was left out between two texts, white space parts them.

    Args:
        tools: what may be called; a call of anything else is malformed.
        eager: whether a grammar makes every call right, so that arguments may be handed on as they
            come. Otherwise a call is held until it is whole and its arguments are a JSON object,
            and then handed on at once.
    """

    def __init__(self, tools: Schemas, *, eager: bool = False) -> None:
        self._tools, self._eager = tools, eager
        self._buffer = ""  # what was not decided yet
        self._index = 0  # of the next call
        self._parts: list[Part] = []
        self._space = ""  # white space that is text only if text follows
        self._said = False  # any text so far
        self._border: str | None = None  # what was left out since: "call", or a "tag"

    def feed(self, text: str) -> list[Part]:
        """Returns what is certain after a further piece of the answer's text."""
        self._buffer += text
        while self._step():
            pass
        return self._take()

    @abstractmethod
    def _step(self) -> bool:
        """Decides on the beginning of what is held back; False: more of the text is needed."""

    @abstractmethod
    def finish(self, *, complete: bool) -> list[Part]:
        """Returns the rest; called once, at the end.

        Args:
            complete: whether the model ended its answer itself. False: it was cut, so that a call
                that is not whole has no `CallEnd`, if it was begun, and is `Malformed` otherwise.
        """

    def _take(self) -> list[Part]:
        parts, self._parts = self._parts, []
        return parts

    def _say(self, text: str) -> None:
        """Hands on text; white space at its end only once more text comes."""
        if self._border == "call":
            text, self._space = (self._space + text).lstrip(), ""
            if text and self._said:
                text = "\n" + text
        elif self._border == "tag" and self._said and not (self._space + text[:1]).isspace():
            text = "\n" + text if text else ""
        if not text:
            return
        self._border = None
        text = self._space + text
        kept = text.rstrip()
        self._space = text[len(kept) :]
        if kept:
            self._said = True
            self._parts.append(Text(kept))

    def _say_rest(self) -> None:
        """At the end: white space that ends a text belongs to it."""
        if self._space and self._border != "call":
            self._parts.append(Text(self._space))
        self._space = ""

    def _called(self, call: Call) -> None:
        """Hands on a whole call."""
        self._begin(call.name)
        self._parts.append(CallArguments(self._index, call.arguments))
        self._end()

    def _begin(self, name: str) -> None:
        self._space, self._border = "", "call"
        self._parts.append(CallStart(self._index, name))

    def _end(self) -> None:
        self._parts.append(CallEnd(self._index))
        self._index += 1

    def _refuse(self, text: str, reason: str) -> None:
        """Hands on, as text, what is no call."""
        if text := text.strip():
            between = self._space if self._border is None else ""
            text = (between or "\n" * self._said) + text
            self._space, self._border, self._said = "", "tag", True
            self._parts.append(Malformed(text, reason))
        elif self._border is None:
            self._border = "tag"

    def _checked(self, name: Any, arguments: Any) -> Call:
        """A call whose arguments are values."""
        if not isinstance(name, str):
            raise NoCall("the call has no name")
        if name not in self._tools:
            raise NoCall(f"there is no tool {name[:64]!r}")
        if not isinstance(arguments, dict):
            raise NoCall("the arguments are not a JSON object")
        return Call(name, dumped(arguments))

    def _checked_text(self, name: Any, arguments: str) -> Call:
        """A call whose arguments are JSON text, which is kept as it is."""
        self._checked(name, loads(arguments))
        return Call(name, arguments.strip())


class TaggedParser(ToolParser):
    """For forms whose calls stand between an opening and a closing tag.

    Attributes:
        opening, closing: the tags.
        ends_open: whether the end of an answer closes a call, too.
        tags: all tags of the form; none of them is ever text.
    """

    opening: ClassVar[str]
    closing: ClassVar[str]
    ends_open: ClassVar[bool] = False
    others: ClassVar[tuple[str, ...]] = ()

    def __init__(self, tools: Schemas, *, eager: bool = False) -> None:
        super().__init__(tools, eager=eager)
        self._tags = tuple({self.opening, self.closing, *self.others} - {""})
        self._inside = False
        self._searched = 0  # of the buffer, for closing tags, inside a call
        self._scan: ObjectScan | None = None  # of a call whose arguments are handed on already

    @abstractmethod
    def _read(self, body: str) -> list[Call]:
        """Returns the calls between two tags.

        Raises:
            NoCall: there are none.
        """

    def _head(self, body: str) -> tuple[str, int] | None:
        """The name of a call that has begun, and where its arguments, an object, begin."""
        return None

    def _open_string(self, body: str) -> bool:
        """Whether a tag behind `body` would stand inside a string."""
        return False

    def finish(self, *, complete: bool) -> list[Part]:
        """As `ToolParser.finish`."""
        while True:
            if self._inside:
                self._close_at_end(complete)
            if self._inside:
                continue
            while self._step():
                pass
            if not self._inside:
                break
        self._say(self._buffer)  # the beginning of a tag is none
        self._buffer = ""
        self._say_rest()
        return self._take()

    def _step(self) -> bool:
        """Reads one thing from the buffer; returns whether there may be another."""
        if not self._inside:
            return self._step_outside()
        if self._scan is not None:
            return self._step_arguments()
        if self._eager and (head := self._head(self._buffer)) and head[0] in self._tools:
            self._begin(head[0])
            self._buffer = self._buffer[head[1] :]
            self._scan = ObjectScan()
            return True
        return self._step_held()

    def _step_outside(self) -> bool:
        place, tag = self._first_tag(self._buffer)
        self._say(self._buffer[:place])
        self._buffer = self._buffer[place + len(tag) :]
        self._inside = bool(tag) and tag == self.opening
        self._searched = 0
        if tag and not self._inside and self._border is None:
            self._border = "tag"
        return bool(tag)

    def _step_held(self) -> bool:
        """Looks for the end of a call that is held."""
        place = self._buffer.find(self.closing, self._searched) if self.closing else -1
        if place < 0:
            self._searched = max(0, len(self._buffer) - len(self.closing) + 1)
            return False
        body = self._buffer[:place]
        try:
            calls = self._read(body)
        except NoCall as error:
            if self._open_string(body):
                self._searched = place + 1  # the tag may be inside a string
                return True
            self._give_up(str(error))
            return True
        for call in calls:
            self._called(call)
        self._leave(place + len(self.closing))
        return True

    def _give_up(self, reason: str) -> None:
        """What stands before the first closing tag is no call; the rest is read anew."""
        place = self._buffer.find(self.closing) if self.closing else -1
        end = len(self._buffer) if place < 0 else place
        self._refuse(self._without_tags(self._buffer[:end]), reason)
        self._leave(end if place < 0 else end + len(self.closing))

    def _leave(self, end: int) -> None:
        self._buffer = self._buffer[end:]
        self._inside, self._searched, self._scan = False, 0, None

    def _step_arguments(self) -> bool:
        assert self._scan is not None
        if not self._scan.done:
            end = self._scan.feed(self._buffer)
            if end:
                self._parts.append(CallArguments(self._index, self._buffer[:end]))
                self._buffer = self._buffer[end:]
            return self._scan.done
        if not self.closing:
            self._end()
            self._leave(0)
            return True
        place = self._buffer.find(self.closing)
        if place < 0:
            return False
        self._end()
        self._leave(place + len(self.closing))
        return True

    def _close_at_end(self, complete: bool) -> None:
        if self._scan is not None:
            if self._scan.done and self.ends_open and complete:
                self._end()
            else:
                self._index += 1  # begun, and never to be whole
            self._leave(len(self._buffer))
            return
        if self.closing and self.closing in self._buffer:
            self._give_up(self._fault(self._buffer[: self._buffer.find(self.closing)]))
            return
        if not complete:
            self._give_up("the answer was cut inside the call")
        elif not self.ends_open:
            self._give_up(self._unfinished())
        else:
            try:
                calls = self._read(self._buffer)
            except NoCall as error:
                self._give_up(str(error))
                return
            for call in calls:
                self._called(call)
            self._leave(len(self._buffer))

    def _unfinished(self) -> str:
        """What a call lacks that the answer's end has cut."""
        return "the end tag is missing"

    def _fault(self, body: str) -> str:
        """Why a body cannot be read."""
        try:
            self._read(body)
        except NoCall as error:
            return str(error)
        return "it is no call"

    def _first_tag(self, text: str) -> tuple[int, str]:
        """Where the first tag begins, and the tag; else where one may have begun, and ""."""
        found = [(at, tag) for tag in self._tags if (at := text.find(tag)) >= 0]
        if found:
            place = min(at for at, _ in found)
            return place, max((tag for at, tag in found if at == place), key=len)
        longest = max(map(len, self._tags))
        for place in range(max(0, len(text) - longest + 1), len(text)):
            if self._is_part_of_tag(text[place:]):
                return place, ""
        return len(text), ""

    def _is_part_of_tag(self, text: str) -> bool:
        return bool(text) and any(tag.startswith(text) for tag in self._tags)

    def _without_tags(self, text: str) -> str:
        return without_tags(text, self._tags)


def without_tags(text: str, tags: tuple[str, ...]) -> str:
    """Returns a text in which no tag is left, also none that removing one has made."""
    before = None
    while before != text:
        before = text
        for tag in tags:
            text = text.replace(tag, "")
    return text


def dumped(arguments: Any) -> str:
    """Returns arguments as JSON text that can be encoded and read anywhere.

    A number beyond the range of doubles, such as 1e999, becomes the largest of them.
    """
    try:
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(arguments), ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a character, which is text as an escape only
        return json.dumps(json.loads(text))
    return text


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    if isinstance(value, float):
        return max(-sys.float_info.max, min(value, sys.float_info.max))
    return value


def loads(text: str) -> Any:
    """Returns the value of a JSON text.

    Raises:
        NoCall: it is none, or too deep.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise NoCall("the arguments are not valid JSON") from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
