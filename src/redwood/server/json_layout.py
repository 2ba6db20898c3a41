"""The layout of a JSON text: where it has white space, learned from its beginning.

A schema leaves white space between the parts free, and a model keeps to one layout. So what stood
between two kinds of signs is what will stand there again, with the indentation of the depth.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

_SPACE, _OPEN, _CLOSE = b" \n\r\t", b"{[", b"}]"
_QUOTE, _ESCAPE, _NEWLINE = ord('"'), ord("\\"), ord("\n")
_MARKS = b'{}[],:"'
_VALUE = ord("v")  # stands for the end of a value
_TYPICAL = {ord(":"): b" ", ord(","): b" "}  # white space behind a sign where none was seen


@dataclass
class Layout:
    """The white space of a JSON text so far, sign by sign.

    Attributes:
        in_string: whether the text ends inside of a string.
        inside: how many times `read` ended in this string, or in this number.
    """

    in_string: bool = False
    inside: int = 0
    _depth: int = 0  # open braces and brackets
    _escaped: bool = False
    _before: int = 0  # kind of the last sign that is no white space
    _last: int = 0  # that sign
    _space: bytes = b""  # white space since then
    _seen: dict[tuple[int, int], bytes] = field(default_factory=dict)
    _unit: bytes = b"  "  # indentation of a level

    @property
    def in_number(self) -> bool:
        """Whether the text ends in digits, which may be the middle of a number."""
        return not self.in_string and not self._space and chr(self._last).isdigit()

    def fork(self) -> Layout:
        """Returns a copy that may go another way."""
        return replace(self, _seen=dict(self._seen))

    def read(self, text: bytes) -> None:
        """Follows more of the text: a token, or several."""
        within = self.in_string or self.in_number
        for sign in text:
            within = within and (self.in_string or chr(sign).isdigit())
            if self.in_string:
                if self._escaped:
                    self._escaped = False
                elif sign == _ESCAPE:
                    self._escaped = True
                elif sign == _QUOTE:
                    self.in_string, self._before, self._last = False, _VALUE, sign
                continue
            if sign in _SPACE:
                self._space += bytes([sign])
                continue
            depth = self._depth - (sign in _CLOSE)
            if self._before and not (self._before == _kind(sign) == _VALUE):
                self._note(sign, depth)
            self._depth = depth + (sign in _OPEN)
            self.in_string = sign == _QUOTE
            self._before = _VALUE if sign in _CLOSE else _kind(sign)
            self._last, self._space = sign, b""
        self.inside = self.inside + 1 if within and (self.in_string or self.in_number) else 0

    def _note(self, sign: int, depth: int) -> None:
        line = self._space.rfind(b"\n")
        if line < 0:
            self._seen[self._before, _kind(sign)] = self._space
            return
        self._seen[self._before, _kind(sign)] = b"\n"  # with the indentation of its depth
        indent = self._space[line + 1 :]
        if depth > 0 and indent:
            self._unit = indent[: max(1, len(indent) // depth)]

    def space_before(self, sign: int) -> tuple[bytes, bool]:
        """Returns what is still missing of the white space that is expected before this sign, and
        whether that was learned.
        """
        space = self._seen.get((self._before, _kind(sign)))
        known = space is not None
        if space is None:
            space = self._guessed(sign)
        if b"\n" in space:
            space = b"\n" + self._unit * (self._depth - (sign in _CLOSE))
        if not space.startswith(self._space):
            if b"\n" in self._space:  # a line was broken where none was before
                space = b"\n" + self._unit * (self._depth - (sign in _CLOSE))
            if not space.startswith(self._space):
                return b"", False
            known = False
        return space[len(self._space) :], known

    def _guessed(self, sign: int) -> bytes:
        """White space between two signs that did not follow each other so far."""
        if sign in _CLOSE:  # as behind what it closes
            opened = _OPEN[_CLOSE.index(sign)]
            found = [space for (before, _), space in self._seen.items() if before == opened]
            if found:
                return found[-1]
        alike = [space for (before, _), space in self._seen.items() if before == self._before]
        openings = [space for (before, _), space in self._seen.items() if before in _OPEN]
        if not alike and self._before in _OPEN and sign in _OPEN:
            alike = openings
        if not alike and self._before == ord(","):  # a line for each member, or as behind a colon
            alike = [space for space in openings if b"\n" in space] or [
                space for (before, _), space in self._seen.items() if before == ord(":")
            ]
        if not alike and self._before in _OPEN and not self._seen:
            return b"\n"  # the first gap of all: most models indent
        return alike[-1] if alike else _TYPICAL.get(self._before, b"")


def _kind(sign: int) -> int:
    return sign if sign in _MARKS else _VALUE
