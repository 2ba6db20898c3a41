"""How many tokens a text has at least, known without tokenising it.

A token of L bytes pays at most 1/L for each of them. So a byte that no token longer than L holds is
worth at least 1/L of a token, and the worths of a text's bytes add up to no more than its tokens.
Digits, which many vocabularies have one by one, are counted exactly that way; letters within the
length of the longest word.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

_SPACE = "▁"  # how sentencepiece spells a space
_KEPT = frozenset({"ByteLevel", "Digits", "Metaspace", "Split", "Punctuation"})  # nothing is lost


class TokenBound:
    """A lower bound of token counts for one tokenizer.

    Args:
        tokenizer: of Transformers. Where it may lose characters (an unknown token for whole
            words, say), nothing is certain and every bound is 0.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._fast = getattr(tokenizer, "backend_tokenizer", None)
        self._added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        self._worth: NDArray[np.float64] | None = None
        self._known = False
        self._spelled = False

    def least(self, text: str) -> int:
        """Returns a number of tokens that `text` has at least, without special ones around it."""
        if not self._known:
            self._worth, self._known = self._table(), True
        if self._worth is None or self._fast is None:
            return 0
        normalizer = self._fast.normalizer
        if normalizer is not None:
            text = normalizer.normalize_str(text)
        if self._spelled:
            text = text.replace(" ", _SPACE)
        counts = np.bincount(np.frombuffer(text.encode(), np.uint8), minlength=256)
        return max(0, int(counts @ self._worth * (1.0 - 1e-9)))  # sums of floats are rounded

    def _table(self) -> NDArray[np.float64] | None:
        """What each byte is worth; None where nothing is certain."""
        if self._fast is None or type(self._fast.model).__name__ != "BPE":
            return None
        steps = _steps(self._fast.pre_tokenizer)
        kinds = {step["type"] for step in steps}
        lossy = any(step.get("behavior") == "Removed" for step in steps)
        bytewise = "ByteLevel" in kinds
        if lossy or not kinds <= _KEPT or not (bytewise or self._fast.model.byte_fallback):
            return None
        if _has_byte_level(self._fast.normalizer):
            return None
        self._spelled = "Metaspace" in kinds
        special = {token.content for token in self._added}
        words = [w for w in self._fast.get_vocab(with_added_tokens=False) if w not in special]
        spelling = _byte_signs() if bytewise else None
        longest = np.ones(256, np.int64)
        for word in words:
            _note(longest, _bytes_of(word, spelling))
        for token in self._added:
            _note(longest, token.content.encode())
            if self._fast.normalizer is not None:
                _note(longest, self._fast.normalizer.normalize_str(token.content).encode())
        worth = 1.0 / longest
        if any(token.lstrip or token.rstrip for token in self._added):
            blank = "".join(c for c in map(chr, range(0x3001)) if c.isspace()) + _SPACE
            worth[list(set(blank.encode()))] = 0.0  # it takes any number of them
        return worth


def _steps(part: Any) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer, flat."""
    if part is None:
        return []
    made = json.loads(part.__getstate__())
    return list(made["pretokenizers"]) if made["type"] == "Sequence" else [made]


def _has_byte_level(normalizer: Any) -> bool:
    return normalizer is not None and b"ByteLevel" in normalizer.__getstate__()


def _byte_signs() -> dict[str, int]:
    """Byte-level BPE spells each byte as one printable character: printable ones as themselves."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


def _bytes_of(word: str, spelling: dict[str, int] | None) -> Iterable[int]:
    if spelling is not None:
        return [spelling[char] for char in word if char in spelling]
    if len(word) == 6 and word.startswith("<0x"):  # a byte by its number
        return [int(word[3:5], 16)]
    return word.encode()


def _note(longest: NDArray[np.int64], word: Iterable[int]) -> None:
    held = list(word)
    for byte in set(held):
        if len(held) > longest[byte]:
            longest[byte] = len(held)
