"""A grammar that begins in the middle of an answer: behind reasoning, behind a tag, or with a call
that has begun without one.

What has come before is free. Where the grammar begins is a matter of each path of a tree, so an end
of reasoning inside a draft counts at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

_MOST_KEPT = 8  # grammars at work: there is one for each place where a path may have begun one


_LONGEST = 512  # bytes before a call without a tag that are looked through


@dataclass(frozen=True)
class BareCalls:
    """Calls that no tag opens; see `redwood.server.tools.bare`.

    Args:
        begins: what a call begins with; group 1 is the name of its tool.
        leads: it begins the answer, and the grammar is of the answer from there on; else it is of
            what follows.
        make: returns the processor for a call of this tool that begins behind so many tokens.
    """

    begins: re.Pattern[bytes]
    leads: bool
    make: Callable[[str, int], Any]


class _State(NamedTuple):
    """After some tokens: how many texts have been found, where the grammar began, what ended the
    text so far; of calls without a tag, where the text that may be one began, that text (None: it
    is none), and the tool of one that has begun."""

    found: int
    began: int | None
    tail: bytes
    start: int = 0
    head: bytes | None = b""
    tool: str | None = None


class DelayedGrammar:
    """A logits processor, and a constraint for drafting where the one it makes is one.

    Args:
        make: returns the processor of a grammar that begins behind so many tokens of the text.
        bytes_of: the text of a token, also of a special one.
        awaited: texts that must come one after the other before the grammar begins.
        prompt_length: tokens before the answer.
        unless: a token that may begin the answer; only then is the first text awaited, else the
            grammar begins at once. None: it is awaited in any case.
        bare: calls that may begin before the last of the texts, and then have another grammar.
            That text may be "" then: there is no such text.
    """

    def __init__(
        self,
        make: Callable[[int], Any],
        bytes_of: Callable[[int], bytes],
        awaited: Sequence[str],
        prompt_length: int,
        unless: int | None = None,
        bare: BareCalls | None = None,
    ) -> None:
        self._make, self._bytes_of, self._unless = make, bytes_of, unless
        self._awaited, self._bare = [text.encode() for text in awaited], bare
        self._prompt_length = prompt_length
        self._read: list[int] = []
        self._states = [_State(0, None, b"") if awaited else _State(0, 0, b"")]
        self._made: dict[tuple[int, str | None], Any] = {}

    def __call__(self, token_ids: Tensor, scores: Tensor) -> Tensor:
        """Returns scores [1, V] with -inf for what may not follow token_ids [1, L]."""
        answer = token_ids[0, self._prompt_length :].tolist()
        if self._unless is not None and not answer:
            made: Tensor = self._grammar(0, None)(token_ids, scores)
            if self._unless < scores.shape[1]:
                made = made.clone()
                made[0, self._unless] = scores[0, self._unless]
            return made
        state = self._after_all(answer)
        if state.began is None:
            return scores
        masked: Tensor = self._grammar(state.began, state.tool)(token_ids, scores)
        return masked

    def accepts(self, text: Sequence[int], path: Sequence[int]) -> int:
        """As `GrammarProcessor.accepts`; everything is allowed until the grammar begins."""
        answer = list(text[self._prompt_length :])
        known = len(answer)
        free = 0
        whole = [*answer, *path]
        while free < len(path) and self._after_all(whole[: known + free]).began is None:
            free += 1
        if free == len(path):
            return free
        state = self._after_all(whole[: known + free])
        assert state.began is not None
        before = [*text, *path[:free]]
        count: int = self._grammar(state.began, state.tool).accepts(before, list(path[free:]))
        return free + count

    def ahead(self, text: Sequence[int], path: Sequence[int], most: int) -> Any:
        """As `GrammarProcessor.ahead`; nothing is expected before the grammar begins."""
        answer = list(text[self._prompt_length :])
        state = self._after_all([*answer, *path])
        if state.began is None:
            return []
        if state.began > len(answer):  # in the draft: what came before is none of the grammar's
            text, path = [*text, *path], []
        return self._grammar(state.began, state.tool).ahead(text, path, most)

    def _grammar(self, began: int, tool: str | None) -> Any:
        """The grammar that began behind so many tokens; `tool`: with a call without a tag."""
        made = self._made.get((began, tool))
        if made is None:
            if len(self._made) >= _MOST_KEPT:
                self._made.pop(next(iter(self._made)))
            length = self._prompt_length + began
            if tool is None:
                made = self._make(length)
            else:
                assert self._bare is not None
                made = self._bare.make(tool, length)
            self._made[began, tool] = made
        return made

    def _after_all(self, answer: list[int]) -> _State:
        """The state behind an answer."""
        shared = len(self._read)
        if self._read != answer[:shared]:
            pairs = enumerate(zip(self._read, answer, strict=False))
            shared = next((i for i, (a, b) in pairs if a != b), min(shared, len(answer)))
        del self._read[shared:], self._states[shared + 1 :]
        for token in answer[shared:]:
            self._read.append(token)
            self._states.append(self._after(self._states[-1], token, len(self._read) - 1))
        return self._states[-1]

    def _after(self, state: _State, token: int, count: int) -> _State:
        """The state behind one more token, the `count`-th of the answer from 0."""
        if state.began is not None:
            return state
        if count == 0 and self._unless is not None and token != self._unless:
            return _State(0, 0, b"")
        wanted, said = self._awaited[state.found], self._bytes_of(token)
        text = state.tail + said
        place = text.find(wanted) if wanted else -1
        if place < 0:
            state = state._replace(tail=text[-len(wanted) + 1 :] if len(wanted) > 1 else b"")
            if self._bare is None or state.head is None or state.found + 1 < len(self._awaited):
                return state
            return self._after_bare(self._bare, state, said, count)
        found = state.found + 1
        began = count + 1 if found == len(self._awaited) else None
        return _State(found, began, b"" if began else text[place + len(wanted) :], count + 1)

    def _after_bare(self, bare: BareCalls, state: _State, said: bytes, count: int) -> _State:
        """The state, if a call without a tag begins with what was said last, or may begin."""
        head = (state.head or b"") + said
        if bare.leads and not head.strip():  # white space behind the reasoning is no answer yet
            return state._replace(start=count + 1)
        if bare.leads:
            found = bare.begins.match(head)
        else:
            head = head[-_LONGEST:]
            found = bare.begins.search(head)
        if found is None:
            return state._replace(head=None if len(head) > _LONGEST else head)
        start, tool = state.start if bare.leads else count + 1, found.group(1).decode()
        path = self._read[start:]
        before = [0] * (self._prompt_length + start)
        if self._grammar(start, tool).accepts(before, path) < len(path):
            return state._replace(head=None)  # written otherwise: it is read as it comes
        return state._replace(began=start, tool=tool)
