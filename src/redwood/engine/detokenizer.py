"""From tokens to text, piece by piece: never half a character, stop strings held back."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

_REPLACEMENT = "\ufffd"
_MAX_PENDING = 8  # tokens that one character can span, generously


class Tokenizer(Protocol):
    """The part of a Transformers tokenizer that decoding needs."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = ...) -> str:
        """Returns the text of these tokens."""
        ...


class Detokenizer:
    """Turns a growing list of tokens into pieces of text.

    A piece ends on a whole character, and never inside what may become a stop string. The text up
    to a stop string is final; the string itself is not part of it.

    Args:
        tokenizer: decodes ids; special tokens are left out.
        stop: non-empty strings.
        visible: special tokens that are part of the text all the same, such as the tags of calls.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), visible: Collection[int] = ()
    ) -> None:
        self._decoding, self._stop = _quickest(tokenizer), tuple(stop)
        self._silent = _silence(tokenizer)
        self._visible = {
            each: self._decoding([each], skip_special_tokens=False) for each in visible
        }
        self._token_ids: list[int] = []
        self._start = 0  # tokens before it are context no more
        self._read = 0  # tokens whose text is in self.text
        self.text = ""  # decoded so far, whole characters only
        self._given = 0  # characters handed out
        self.stopped = False

    def push(self, token_id: int) -> bool:
        """Adds a token; returns whether a stop string is now complete (no more may follow)."""
        # A token without text is no context: a word after it would look like a beginning.
        if self._silent(token_id):
            if token_id in self._visible:
                self._take_pending()
                self._append(self._visible[token_id])
            return self.stopped
        self._token_ids.append(token_id)
        # Some tokenizers join words differently at the start of a text, so the piece is the
        # difference between two decodings that begin at the same token.
        before = self._decode(self._start, self._read)
        after = self._decode(self._start, len(self._token_ids))
        pending = len(self._token_ids) - self._read
        if after.endswith(_REPLACEMENT) and pending < _MAX_PENDING:
            return False
        self._accept(after[len(before) :])
        return self.stopped

    def take(self, *, final: bool = False) -> str:
        """Returns text not handed out yet; with `final`, also what was held back."""
        if final:
            self._take_pending()
        end = len(self.text) if final or self.stopped else len(self.text) - self._held_back()
        piece = self.text[self._given : end]
        self._given = max(self._given, end)
        return piece

    def _take_pending(self) -> None:
        """Takes what has come as it is, also where it is half a character."""
        if not self.stopped and self._read < len(self._token_ids):
            before = self._decode(self._start, self._read)
            self._accept(self._decode(self._start, len(self._token_ids))[len(before) :])

    def _decode(self, start: int, end: int) -> str:
        return self._decoding(self._token_ids[start:end], skip_special_tokens=True)

    def _accept(self, piece: str) -> None:
        if piece or len(self._token_ids) - self._start > _MAX_PENDING:
            self._start = self._read
        self._read = len(self._token_ids)
        self._append(piece)

    def _append(self, piece: str) -> None:
        longest = max(map(len, self._stop), default=0)
        searched = max(0, len(self.text) - longest + 1)
        self.text += piece
        found = [p for s in self._stop if (p := self.text.find(s, searched)) >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.stopped = True

    def _held_back(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        for length in range(max(map(len, self._stop), default=1) - 1, 0, -1):
            if any(s.startswith(self.text[-length:]) for s in self._stop if length < len(s)):
                if length <= len(self.text):
                    return length
        return 0


def _quickest(tokenizer: Any) -> Callable[..., str]:
    """Its `decode`, or what does the work in it, in a fourth of the time."""
    inner = getattr(tokenizer, "backend_tokenizer", None)
    tidies = getattr(tokenizer, "clean_up_tokenization_spaces", True)
    decode: Callable[..., str] = (tokenizer if inner is None or tidies else inner).decode
    return decode


def _silence(tokenizer: Any) -> Callable[[int], bool]:
    """Which tokens decoding passes over: special ones, and ids that the tokenizer does not have."""
    inner = getattr(tokenizer, "backend_tokenizer", None)
    if inner is None or not hasattr(inner, "get_added_tokens_decoder"):
        return frozenset(getattr(tokenizer, "all_special_ids", ())).__contains__
    special: set[int] = set()

    def silent(token_id: int) -> bool:
        if inner.decode([token_id], skip_special_tokens=True):
            return False
        if inner.id_to_token(token_id) is None:
            return True
        if not special:  # thousands in some tokenizers, and most texts hold none
            added = inner.get_added_tokens_decoder()
            special.update(index for index, token in added.items() if token.special)
        return token_id in special

    return silent
