"""Single tokens as text and bytes, for log-probabilities and traces."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

_REPLACEMENT = "\ufffd"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"  # SentencePiece's character for a space


class TokenTexts:
    """Texts and bytes of tokens, cached.

    Args:
        tokenizer: of the target.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.text = lru_cache(maxsize=65536)(self._text)

    def raw(self, token: int) -> list[int] | None:
        """Returns the bytes of a token, None where they cannot be known."""
        text = self.text(token)
        if _REPLACEMENT not in text:
            return list(text.encode())
        piece = str(self._tokenizer.convert_ids_to_tokens(token))
        if byte := _BYTE.fullmatch(piece):
            return [int(byte[1], 16)]
        alphabet = _alphabet()
        return [alphabet[char] for char in piece] if set(piece) <= alphabet.keys() else None

    def _text(self, token: int) -> str:
        text = str(self._tokenizer.decode([token], skip_special_tokens=False))
        piece = str(self._tokenizer.convert_ids_to_tokens(token))
        # Decoding drops the space before the first word of a text; no token is the first one here.
        return f" {text}" if piece.startswith(_SPACE) and not text.startswith(" ") else text


@lru_cache(maxsize=1)
def _alphabet() -> dict[str, int]:
    """Character -> byte of byte-level tokenizers: printable Latin-1 stands for itself, the other
    bytes for the characters from 256 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): b for i, b in enumerate(rest)}
