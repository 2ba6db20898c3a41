"""JSON text that comes in pieces: where an object ends, and whether a string is open."""

from __future__ import annotations

import re

_INTERESTING = re.compile(r'["\\{}\[\]]')
_IN_STRING = re.compile(r'["\\]')


class ObjectScan:
    """Finds the end of one JSON object or list that comes in pieces.

    It counts brackets outside strings and checks nothing else.

    Attributes: `done`: the last bracket was closed. `in_string`: the end so far is inside a string.
    """

    def __init__(self) -> None:
        self.done = self.in_string = False
        self._depth = 0
        self._escaped = False

    def feed(self, text: str) -> int:
        """Returns how many characters of `text` belong to the object."""
        place = 0
        if self._escaped and text:
            self._escaped, place = False, 1
        while place < len(text) and not self.done:
            found = (_IN_STRING if self.in_string else _INTERESTING).search(text, place)
            if found is None:
                return len(text)
            place = found.end()
            sign = found.group()
            if sign == "\\":
                if self.in_string:
                    self._escaped = place >= len(text)
                    place = min(place + 1, len(text))
            elif sign == '"':
                self.in_string = not self.in_string
            else:
                self._depth += 1 if sign in "{[" else -1
                self.done = self._depth <= 0
        return place


def is_string_open(text: str) -> bool:
    """Whether what follows `text`, the beginning of an object, would be inside a string."""
    scan = ObjectScan()
    scan.feed(text)
    return scan.in_string
