"""A grammar that begins in the middle of an answer: behind reasoning, behind a tag.

What has come before is free. Where the grammar begins is a matter of each path of a tree, so an end
of reasoning inside a draft counts at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

_MOST_KEPT = 8  # grammars at work: there is one for each place where a path may have begun one


class _State(NamedTuple):
    """After some tokens: how many texts have been found, where the grammar began, what ended the
    text so far."""

    found: int
    began: int | None
    tail: bytes


class DelayedGrammar:
    """A logits processor, and a constraint for drafting where the one it makes is one.

    Args:
        make: returns the processor of a grammar that begins behind so many tokens of the text.
        bytes_of: the text of a token, also of a special one.
        awaited: texts that must come one after the other before the grammar begins.
        prompt_length: tokens before the answer.
        unless: a token that may begin the answer; only then is the first text awaited, else the
            grammar begins at once. None: it is awaited in any case.
    """

    def __init__(
        self,
        make: Callable[[int], Any],
        bytes_of: Callable[[int], bytes],
        awaited: Sequence[str],
        prompt_length: int,
        unless: int | None = None,
    ) -> None:
        self._make, self._bytes_of, self._unless = make, bytes_of, unless
        self._awaited = [text.encode() for text in awaited]
        self._prompt_length = prompt_length
        self._read: list[int] = []
        self._states = [_State(0, None, b"") if awaited else _State(0, 0, b"")]
        self._made: dict[int, Any] = {}

    def __call__(self, token_ids: Tensor, scores: Tensor) -> Tensor:
        """Returns scores [1, V] with -inf for what may not follow token_ids [1, L]."""
        answer = token_ids[0, self._prompt_length :].tolist()
        if self._unless is not None and not answer:
            made: Tensor = self._grammar(0)(token_ids, scores)
            if self._unless < scores.shape[1]:
                made = made.clone()
                made[0, self._unless] = scores[0, self._unless]
            return made
        began = self._began(answer)
        return scores if began is None else self._grammar(began)(token_ids, scores)

    def accepts(self, text: Sequence[int], path: Sequence[int]) -> int:
        """As `GrammarProcessor.accepts`; everything is allowed until the grammar begins."""
        answer = list(text[self._prompt_length :])
        known = len(answer)
        free = 0
        whole = [*answer, *path]
        while free < len(path) and self._began(whole[: known + free]) is None:
            free += 1
        if free == len(path):
            return free
        began = self._began(whole[: known + free])
        assert began is not None
        before = [*text, *path[:free]]
        count: int = self._grammar(began).accepts(before, list(path[free:]))
        return free + count

    def ahead(self, text: Sequence[int], path: Sequence[int], most: int) -> Any:
        """As `GrammarProcessor.ahead`; nothing is expected before the grammar begins."""
        answer = list(text[self._prompt_length :])
        began = self._began([*answer, *path])
        if began is None:
            return []
        if began > len(answer):  # in the draft: what came before is none of the grammar's
            text, path = [*text, *path], []
        return self._grammar(began).ahead(text, path, most)

    def _grammar(self, began: int) -> Any:
        if began not in self._made:
            if len(self._made) >= _MOST_KEPT:
                self._made.pop(next(iter(self._made)))
            self._made[began] = self._make(self._prompt_length + began)
        return self._made[began]

    def _began(self, answer: list[int]) -> int | None:
        """Behind how many tokens of an answer the grammar began; None: not yet."""
        shared = len(self._read)
        if self._read != answer[:shared]:
            pairs = enumerate(zip(self._read, answer, strict=False))
            shared = next((i for i, (a, b) in pairs if a != b), min(shared, len(answer)))
        del self._read[shared:], self._states[shared + 1 :]
        for token in answer[shared:]:
            self._states.append(self._after(self._states[-1], token, len(self._read)))
            self._read.append(token)
        return self._states[-1].began

    def _after(self, state: _State, token: int, count: int) -> _State:
        """The state behind one more token, the `count`-th of the answer from 0."""
        if state.began is not None:
            return state
        if count == 0 and self._unless is not None and token != self._unless:
            return _State(0, 0, b"")
        wanted = self._awaited[state.found]
        text = state.tail + self._bytes_of(token)
        place = text.find(wanted)
        if place < 0:
            return state._replace(tail=text[-len(wanted) + 1 :] if len(wanted) > 1 else b"")
        found = state.found + 1
        began = count + 1 if found == len(self._awaited) else None
        return _State(found, began, b"" if began else text[place + len(wanted) :])
