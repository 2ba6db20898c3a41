"""Forms without tags: a call is the whole answer, and its first sign shows it.

`LlamaParser`: Llama 3.1 and later write a JSON object, sometimes behind <|python_tag|>, several
with semicolons between them. `PythonicParser`: Llama 3.2's and 4's other form, a list of calls.

    {"name": "get_weather", "parameters": {"city": "Oslo"}}
    [get_weather(city="Oslo"), add(a=1, b=2)]
"""

from __future__ import annotations

import ast
import json
import re
from abc import abstractmethod
from typing import Any, ClassVar

from redwood.server.tools.hermes import named_arguments
from redwood.server.tools.parser import Call, NoCall, Schemas, ToolParser, without_tags
from redwood.server.tools.parts import Part

_CONSTANTS = {"null": None, "true": True, "false": False}


class LeadingParser(ToolParser):
    """For calls that begin with the answer and end with it.

    Attributes:
        tags: none of them is text.
        explicit: those behind which a call follows, wherever they stand.
        begins: matches what may be the beginning of a call without such a tag.
    """

    tags: ClassVar[tuple[str, ...]]
    explicit: ClassVar[tuple[str, ...]]
    begins: ClassVar[re.Pattern[str]]

    def __init__(self, tools: Schemas, *, eager: bool = False) -> None:
        super().__init__(tools, eager=False)  # the end of the answer ends the call
        self._state = "start"

    @abstractmethod
    def _read(self, body: str) -> list[Call]:
        """Returns the calls of an answer; raises NoCall."""

    def finish(self, *, complete: bool) -> list[Part]:
        """As `ToolParser.finish`."""
        if self._state in ("start", "text"):
            self._say(self._buffer)
        else:
            self._end_call(complete)
        self._say_rest()
        return self._take()

    def _step(self) -> bool:
        if self._state == "start":
            text = self._buffer.lstrip()
            if not text or any(tag.startswith(text) and tag != text for tag in self.tags):
                return False
            if not any(text.startswith(tag) for tag in self.tags) and self.begins.fullmatch(text):
                self._state = "maybe"
                return False
            self._state = "text"
            return True
        if self._state == "maybe":
            if self.begins.fullmatch(self._buffer.lstrip()):
                return False
            self._state = "text"
            return True
        return self._state == "text" and self._step_text()

    def _step_text(self) -> bool:
        place, tag = first_tag(self._buffer, self.tags)
        self._say(self._buffer[:place])
        self._buffer = self._buffer[place + len(tag) :]
        if tag in self.explicit:
            self._state = "call"
            return False
        if tag and self._border is None:
            self._border = "tag"
        return bool(tag)

    def _end_call(self, complete: bool) -> None:
        body = without_tags(self._buffer, self.tags)
        try:
            if not complete:
                raise NoCall("the answer was cut inside the call")
            for call in self._calls(body):
                self._called(call)
        except NoCall as error:
            self._refuse(body, str(error))

    def _calls(self, body: str) -> list[Call]:
        """The calls in what is held back: a tag inside a string is part of it, others are left
        out."""
        try:
            return self._read(_between_tags(self._buffer, self.tags))
        except NoCall:
            return self._read(body)


class LlamaParser(LeadingParser):
    """JSON; see the module."""

    tags = ("<|python_tag|>", "<|eom_id|>", "<|eot_id|>")
    explicit = ("<|python_tag|>",)
    begins = re.compile(
        r'\{\s*(?:"(?:n(?:a(?:m(?:e(?:".*)?)?)?)?|t(?:y(?:p(?:e(?:".*)?)?)?)?'
        r'|p(?:a(?:r(?:a(?:m(?:e(?:t(?:e(?:r(?:s(?:".*)?)?)?)?)?)?)?)?)?)?'
        r'|f(?:u(?:n(?:c(?:t(?:i(?:o(?:n(?:".*)?)?)?)?)?)?)?)?)?)?',
        re.DOTALL,
    )

    def _read(self, body: str) -> list[Call]:
        decoder, place = json.JSONDecoder(), 0
        calls = []
        while place < len(body):
            if body[place].isspace() or body[place] == ";":
                place += 1
                continue
            try:
                value, place = decoder.raw_decode(body, place)
            except (ValueError, RecursionError):
                raise NoCall("the call is not valid JSON") from None
            calls.append(self._checked(*_named(value)))
        if not calls:
            raise NoCall("there is no call behind the tag")
        return calls


class PythonicParser(LeadingParser):
    """A list of Python calls; see the module."""

    tags = ("<|python_start|>", "<|python_end|>", "<|python_tag|>", "<|eom_id|>", "<|eot|>")
    explicit = ("<|python_start|>", "<|python_tag|>")
    begins = re.compile(r"\[\s*(?:[A-Za-z_][\w.]*\s*(?:\(.*)?)?", re.DOTALL)

    def _read(self, body: str) -> list[Call]:
        try:
            tree = ast.parse(body.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise NoCall("the calls are not a Python list") from None
        if not isinstance(tree, ast.List) or not tree.elts:
            raise NoCall("the calls are not a Python list")
        try:
            return [self._call(each) for each in tree.elts]
        except RecursionError:
            raise NoCall("the arguments are nested too deep") from None

    def _call(self, node: ast.expr) -> Call:
        if not isinstance(node, ast.Call):
            raise NoCall("there is something in the list that is no call")
        if node.args or any(keyword.arg is None for keyword in node.keywords):
            raise NoCall("arguments must have names")
        arguments = {str(each.arg): _literal(each.value) for each in node.keywords}
        return self._checked(_dotted(node.func), arguments)


def first_tag(text: str, tags: tuple[str, ...]) -> tuple[int, str]:
    """Returns where the first tag begins, and it; else where one may have begun, and ""."""
    found = [(at, tag) for tag in tags if (at := text.find(tag)) >= 0]
    if found:
        return min(found)
    for place in range(max(0, len(text) - max(map(len, tags)) + 1), len(text)):
        if any(tag.startswith(text[place:]) for tag in tags):
            return place, ""
    return len(text), ""


def _between_tags(text: str, tags: tuple[str, ...]) -> str:
    """A text without the tags at its beginning and end."""
    before = None
    while before != text:
        before = text = text.strip()
        for tag in tags:
            text = text.removeprefix(tag).removesuffix(tag)
    return text


def _named(value: Any) -> tuple[object, object]:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    elif isinstance(value, dict) and isinstance(value.get("function"), str):
        value = {"name": value["function"], **value}
    return named_arguments(value)


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    raise NoCall("the call has no name")


def _literal(node: ast.expr) -> Any:
    """The value of a literal; also of JSON's names for constants."""
    match node:
        case ast.Constant(value) if value is None or isinstance(value, str | bool | int | float):
            return value
        case ast.Name(id) if id in _CONSTANTS:
            return _CONSTANTS[id]
        case ast.List(elts) | ast.Tuple(elts):
            return [_literal(each) for each in elts]
        case ast.Dict(keys, values):
            return {
                str(_literal(key)): _literal(value)
                for key, value in zip(keys, values, strict=True)
                if key is not None
            }
        case ast.UnaryOp(ast.USub(), ast.Constant(value)) if type(value) in (int, float):
            return -value  # type: ignore[operator]
    raise NoCall("an argument is no literal")
