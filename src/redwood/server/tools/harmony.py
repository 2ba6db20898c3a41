"""gpt-oss: messages in channels, of which one may be addressed to a tool.

    <|channel|>analysis<|message|>The user asks for the weather.<|end|>
    <|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>
    {"city": "Oslo"}<|call|>

`analysis` is reasoning, `final` and a `commentary` to nobody are text. An answer ends with <|call|>
or <|return|>, which end the text and are not always part of it.
"""

from __future__ import annotations

import re

from redwood.server.tools.json_text import ObjectScan, is_string_open
from redwood.server.tools.leading import first_tag
from redwood.server.tools.parser import NoCall, Schemas, ToolParser, without_tags
from redwood.server.tools.parts import CallArguments, Part, Reasoning

TAGS = (
    "<|start|>",
    "<|channel|>",
    "<|constrain|>",
    "<|message|>",
    "<|end|>",
    "<|call|>",
    "<|return|>",
)
_TO = re.compile(r"to=(?:functions\.)?([^\s<]+)")
_KNOWN = re.compile(r"\bassistant\b|channel=\s*(?:analysis|commentary|final)\b|to=[^\s<]+|\bjson\b")


def _unused(header: str, *, opened: bool) -> str:
    """What a header says that is none of its own words, and whom it calls for nothing: all but the
    first where its message has begun."""
    words = _KNOWN.sub(" ", header).replace("channel=", " ").split()
    return " ".join([*_TO.findall(header)[int(opened) :], *words])


class HarmonyParser(ToolParser):
    """See the module."""

    def __init__(self, tools: Schemas, *, eager: bool = False) -> None:
        super().__init__(tools, eager=eager)
        self._state = "start"  # header, text, analysis, call, arguments
        self._header = ""
        self._called_name = ""
        self._body = ""  # of a call that is held
        self._scan = ObjectScan()
        self._thought = ""  # white space of the reasoning, held back

    def finish(self, *, complete: bool) -> list[Part]:
        """As `ToolParser.finish`."""
        if self._buffer:  # the beginning of a tag is none
            self._add(self._buffer)
            self._buffer = ""
        self._close(whole=complete)
        self._say_rest()
        return self._take()

    def _step(self) -> bool:
        if self._state == "arguments" and not self._scan.done:
            end = self._stream(self._buffer)  # a tag inside a string is part of it
            self._buffer = self._buffer[end:]
            return self._scan.done
        place, tag = first_tag(self._buffer, TAGS)
        if place:
            self._add(self._buffer[:place])
        self._buffer = self._buffer[place + len(tag) :]
        if not tag:
            return False
        if self._state == "call" and is_string_open(self._body):
            self._body += tag
            return True
        if tag == "<|message|>" and self._state == "header":
            self._open()
        elif self._state == "header" and tag in ("<|channel|>", "<|constrain|>"):
            self._header += " " if tag == "<|constrain|>" else " channel="
        else:
            self._close(whole=True)
            self._border = self._border or "tag"
            self._state, self._header = "header", ""
            if tag == "<|channel|>":
                self._header = "channel="
            elif tag in ("<|end|>", "<|call|>", "<|return|>", "<|message|>"):
                self._state = "between"
        return True

    def _add(self, text: str) -> None:
        match self._state:
            case "header":
                self._header += text
            case "analysis":
                self._think(text)
            case "call":
                self._body += text
            case "arguments":
                self._stream(text)
            case _:
                self._say(text)

    def _open(self) -> None:
        """A message begins; its header says what it is."""
        self._refuse(_unused(self._header, opened=True), "a header that says something else")
        to = _TO.search(self._header)
        if to is not None:
            self._called_name, self._body = to.group(1), ""
            if self._eager and self._called_name in self._tools:
                self._begin(self._called_name)
                self._state, self._scan = "arguments", ObjectScan()
            else:
                self._state = "call"
        elif "channel=analysis" in self._header:
            self._state = "analysis"
        else:
            self._state = "text"

    def _close(self, *, whole: bool) -> None:
        """A message ends."""
        if self._state == "call":
            body = without_tags(self._body, TAGS)
            try:
                if not whole:
                    raise NoCall("the answer was cut inside the call")
                self._called(self._checked_text(self._called_name, self._body))
            except NoCall as error:
                self._refuse(f"{self._called_name} {body}", str(error))
        elif self._state == "arguments":
            if self._scan.done:
                self._end()
            else:
                self._index += 1
        elif self._state == "header":
            header = _unused(self._header, opened=False)
            self._refuse(without_tags(header, TAGS), "a message without a text")
        self._thought = ""
        self._state = "between"

    def _stream(self, text: str) -> int:
        """Hands on arguments; returns how much of the text they are."""
        end = 0 if self._scan.done else self._scan.feed(text)
        if end:
            self._parts.append(CallArguments(self._index, text[:end]))
        return end

    def _think(self, text: str) -> None:
        text = self._thought + text
        kept = text.rstrip()
        self._thought = text[len(kept) :]
        if kept:
            self._parts.append(Reasoning(kept))
