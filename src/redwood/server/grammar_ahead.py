"""What a grammar expects next: the tokens that it forces, and guesses where it leaves little free.

Bytes that a grammar forces may be spelled by several tokens, since a token may reach into what is
free behind them; and JSON leaves white space free. So three kinds of tokens are expected: certain
ones, the only ones that the mask allows; the tokenizer's own spelling of forced bytes, with the
white space of the text's layout between them; and, inside of strings and numbers, the end of the
value where what follows that end is known. Where all of that ends before a few signs, one of which
must come (a choice, true or false, another item or the end of a list), each way is followed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from redwood.algorithms.acceptance import AcceptanceTable
from redwood.sampling.constraint import Chain
from redwood.server.json_layout import Layout

_SPACE = b" \n\r\t"
_ENDS, _DIGITS = b",}]", frozenset(b"-0123456789")
_BYTES_PER_TOKEN = 8  # of expected text that is walked for a token, roughly
_MOST_PIECES = 24  # of expected text, each of which may take a mask
_SPELLING = 0.97  # chance that forced bytes are spelled as the tokenizer would
_KNOWN, _UNKNOWN = 0.96, 0.5  # that white space is as the layout says
_LAST = 0.9  # that the last token expected does not reach further
_MOST_WAYS = 8  # signs of which one must come, each of which is followed
_DIGIT_CHANCES = (0.24, 0.16, 0.12, 0.1, 0.1, 0.06, 0.05, 0.06, 0.05, 0.06)
_FIRST_DIGITS = dict(zip(b"1234567890", _DIGIT_CHANCES, strict=True))
_ANOTHER = 0.6  # that a list goes on
# Rates at which a string, or a number, ends behind its first, second, ... token.
_STRING_ENDS = (0.02, 0.25, 0.25, 0.2, 0.15, 0.1)
_NUMBER_ENDS = (0.3, 0.5, 0.6)


class _Piece(NamedTuple):
    """Expected bytes, and the chance of their beginning."""

    text: bytes
    chance: float


class Layouts:
    """Follows the answer as text: its layout, and how soon its values end.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: LLTokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._layout, self._ends = Layout(), AcceptanceTable([*_STRING_ENDS, *_NUMBER_ENDS])

    def after(self, answer: Sequence[int], path: Sequence[int]) -> Layout:
        """Returns a layout of one's own after the answer, which it learns from, and a path."""
        known = len(self._tokens)
        if self._tokens != answer[:known]:
            self.__init__(self._tokenizer)  # type: ignore[misc]
            known = 0
        for token in answer[known:]:
            text = self._tokenizer.decode_bytes([token])
            if (at := _end_bin(self._layout)) is not None and text:
                closes = text[:1] == b'"' if self._layout.in_string else text[0] in _SPACE + _ENDS
                self._ends.count(at, closes)
            self._layout.read(text)
        self._tokens += answer[known:]
        layout = self._layout.fork()
        for token in path:
            layout.read(self._tokenizer.decode_bytes([token]))
        return layout

    def end_chance(self, layout: Layout) -> float:
        """Returns the chance that the string or number ends here; 0 outside of them."""
        at = _end_bin(layout)
        return 0.0 if at is None else self._ends.rates[at]


def _end_bin(layout: Layout) -> int | None:
    if layout.in_string:
        return min(layout.inside, len(_STRING_ENDS) - 1)
    if layout.in_number:
        return len(_STRING_ENDS) + min(layout.inside, len(_NUMBER_ENDS) - 1)
    return None


class Signs:
    """The tokens of single ASCII signs, to try how a text may go on."""

    def __init__(self, tokenizer: LLTokenizer) -> None:
        found = dict[int, int]()
        for sign in range(128):
            tokens = tokenizer.greedy_tokenize(chr(sign))
            if len(tokens) == 1 and tokenizer.decode_bytes(tokens) == bytes([sign]):
                found[sign] = tokens[0]
        self._signs = [sign for sign in found if sign not in _SPACE]
        self._ids = np.array([found[sign] for sign in self._signs], np.int64)

    def allowed(self, mask: bytes) -> list[int]:
        """Returns the signs but white space that a mask [V], a byte each token, allows."""
        row: Any = np.frombuffer(mask, np.uint8)
        return [self._signs[i] for i in np.flatnonzero(row[self._ids])]


class Walker:
    """Walks a matcher along what is expected, and back.

    Args:
        matcher: stands where the walk begins.
        layout: of the text up to there; it is changed.
        most: tokens to expect at most.
    """

    def __init__(
        self, matcher: LLMatcher, tokenizer: LLTokenizer, signs: Signs, layout: Layout, most: int
    ) -> None:
        self._matcher, self._tokenizer, self._signs = matcher, tokenizer, signs
        self._layout, self._most = layout, most
        self._taken = 0

    def chains(self, end_chance: float) -> list[Chain]:
        """Returns what is expected, several ways if they part behind what is forced.

        Args:
            end_chance: that the string or number ends where the walk begins.
        """
        try:
            tokens, chances = list[int](), list[float]()
            while len(tokens) < self._most and (sure := self._matcher.compute_ff_tokens()):
                tokens += sure
                chances += [1.0] * len(sure)
                if not self._take(sure):
                    break
                self._layout.read(self._tokenizer.decode_bytes(sure))
            pieces = self._pieces()
            if not pieces and not tokens:
                pieces, known = self._ended(end_chance)
            else:
                known = True
            ways = self._ways(pieces) if len(tokens) < self._most else []
            if not ways and known:
                ways = [pieces]
            return [
                Chain([*tokens, *ids][: self._most], [*chances, *each][: self._most])
                for ids, each in (_spelled(self._tokenizer, way) for way in ways)
                if tokens or ids
            ]
        finally:
            self._matcher.rollback(self._taken)

    def _ways(self, pieces: list[_Piece]) -> list[list[_Piece]]:
        """The pieces, and behind them each sign that may come and what it forces; none where many
        may come, or one."""
        if self._matcher.is_stopped() or self._layout.in_number:
            return []
        signs = self._signs.allowed(self._matcher.compute_logit_bias())
        number = len(signs) > _MOST_WAYS and _DIGITS.issuperset(signs)
        if number:  # a digit begins it, small ones more often than others
            signs = sorted(set(signs) & _FIRST_DIGITS.keys())
        elif not 1 < len(signs) <= _MOST_WAYS:
            return []
        taken, layout, made = self._taken, self._layout, list[list[_Piece]]()
        for sign in signs:
            self._layout = layout.fork()
            piece = self._spaced(sign)
            share = _FIRST_DIGITS[sign] if number else _share(sign, signs)
            piece = piece._replace(chance=piece.chance * share)
            if self._read(piece):
                made.append([*pieces, piece, *([] if number else self._pieces())])
            self._matcher.rollback(self._taken - taken)
            self._taken = taken
        self._layout = layout
        return made

    def _take(self, tokens: Sequence[int]) -> bool:
        count = self._matcher.try_consume_tokens(list(tokens))
        self._taken += count
        return count == len(tokens)

    def _pieces(self) -> list[_Piece]:
        """Forced bytes, and white space between them where the layout says so."""
        pieces, size = list[_Piece](), 0
        while size < _BYTES_PER_TOKEN * self._most and len(pieces) < _MOST_PIECES:
            if self._matcher.is_stopped():
                break
            piece = _Piece(self._matcher.compute_ff_bytes(), 1.0)
            if not piece.text:
                if self._layout.in_string:
                    break
                signs = self._signs.allowed(self._matcher.compute_logit_bias())
                if len(signs) == 1:
                    piece = self._spaced(signs[0])
                elif signs and _DIGITS.issuperset(signs):  # a number: its sign is unknown
                    piece = self._spaced(signs[0], space_only=True)
            if not piece.text or not self._read(piece):
                break
            pieces.append(piece)
            size += len(piece.text)
        return pieces

    def _ended(self, chance: float) -> tuple[list[_Piece], bool]:
        """The end of a string or number, and whether what follows it is known."""
        if chance <= 0.0:
            return [], False
        if self._layout.in_string:
            first = _Piece(b'"', chance)
        else:
            signs = self._signs.allowed(self._matcher.compute_logit_bias())
            ends = [sign for sign in signs if sign in _ENDS]
            if len(ends) != 1:
                return [], False
            first = self._spaced(ends[0])._replace(chance=chance)
        if not self._read(first):
            return [], False
        more = self._pieces()
        return [first, *more], bool(more) or self._matcher.is_stopped()

    def _spaced(self, sign: int, *, space_only: bool = False) -> _Piece:
        if self._layout.in_string:
            return _Piece(bytes([sign]), 1.0)
        space, known = self._layout.space_before(sign)
        text = space if space_only else space + bytes([sign])
        return _Piece(text, _KNOWN if known else _UNKNOWN)

    def _read(self, piece: _Piece) -> bool:
        """Goes along a piece, if the grammar allows it."""
        text = piece.text
        if text.isascii():
            tokens = self._tokenizer.greedy_tokenize(text.decode())
        else:
            tokens = self._tokenizer.tokenize_bytes(text)
        if not self._take(tokens):
            return False
        self._layout.read(text)
        return True


def _share(sign: int, signs: Sequence[int]) -> float:
    """The chance of one of the signs that may come."""
    if len(signs) == 2 and ord(",") in signs:
        return _ANOTHER if sign == ord(",") else 1.0 - _ANOTHER
    return 1.0 / len(signs)


def _spelled(tokenizer: LLTokenizer, pieces: Sequence[_Piece]) -> Chain:
    """The tokens of the pieces, each with the chance of the pieces that begin in it."""
    starts, text = dict[int, float](), b""
    for piece in pieces:
        starts[len(text)] = piece.chance
        text += piece.text
    tokens, chances, at = tokenizer.tokenize_bytes(text), list[float](), 0
    for token in tokens:
        end, chance = at + len(tokenizer.decode_bytes([token])), _SPELLING
        for place in range(at, end):
            chance *= starts.get(place, 1.0)
        chances.append(chance)
        at = end
    if chances:
        chances[-1] *= _LAST
    return Chain(tokens, chances)
