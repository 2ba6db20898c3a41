"""Constrained decoding: a JSON schema as a mask over the vocabulary, for each path of the tree.

The parser is llguidance's. Masks are asked for along many paths that share a prefix, in any order;
the matcher is rolled back to the common prefix and advanced from there, so a mask depends on its
path alone.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from torch import Tensor

from redwood.errors import ArgumentError, RedwoodError
from redwood.sampling.constraint import Chain
from redwood.server.grammar_ahead import Layouts, Signs, Walker
from redwood.server.schema import ResponseFormat
from redwood.server.tools.kinds import check_width

_WHITESPACE = r"( |\n[ \t]{0,24})?"
"""White space allowed between the tokens of JSON. Bounded: a small model may otherwise never stop
writing it."""

_BYTES = LLTokenizer("byte")
"""Each byte is a token: for questions that no vocabulary changes, many times as fast."""
_NOTHING_FITS = "Unsatisfiable schema"
_MOST_FITTING = 4096
"""Answers that are kept, by what was asked."""
_USUAL_END = 0.9
"""Chance that the tokenizer's own end-of-sequence token ends a text, where several may."""


class GrammarError(RedwoodError):
    """The parser reached its limits in the middle of an answer: the schema is too complex."""


class Grammars:
    """Compiles grammars for the vocabulary of one model. Creating it takes half a second.

    Args:
        tokenizer: a fast Transformers tokenizer.
        vocab_size: width of the model's logits.
        eos_ids: end-of-sequence tokens, at least one below `vocab_size`.

    Tokenizer and model may differ in size: some tokenizers have more tokens than the model has
    logits, and some models have logits that stand for no token.

    Raises:
        ArgumentError: the tokenizer cannot be read, or there is no end-of-sequence token.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_ids: Collection[int]) -> None:
        self._vocab_size = vocab_size
        self._eos_ids = sorted(token for token in eos_ids if token < vocab_size)
        if not self._eos_ids:
            raise ArgumentError("this model has no token that ends a text, so no JSON could end")
        try:
            size = max(vocab_size, _highest(tokenizer) + 1)
            self._tokenizer = from_tokenizer(tokenizer, size, self._eos_ids)
        except Exception as error:  # llguidance raises plain Exceptions
            raise ArgumentError(f"this model's tokenizer serves no grammar: {error}") from error
        usual = getattr(tokenizer, "eos_token_id", None)
        self._eos_ids.sort(key=lambda token: token != usual)  # the usual one first
        self._signs = Signs(self._tokenizer)
        self._fitting: dict[bytes, bool] = {}

    def compile(self, wanted: ResponseFormat) -> str:
        """Returns the grammar of a format other than "text", validated.

        Raises:
            ArgumentError: an invalid schema, or one with keywords that cannot be enforced.
        """
        schema: dict[str, Any] = {"type": "object"}
        if wanted.json_schema is not None:
            schema = wanted.json_schema.schema_
        check_width(schema, "response_format")
        try:
            text = json.dumps(schema, allow_nan=False)
            grammar: str = LLMatcher.grammar_from_json_schema(
                text, overrides={"whitespace_pattern": _WHITESPACE}
            )
        except ValueError as error:
            raise ArgumentError(f"response_format: {error}") from error
        return self._checked(grammar, "response_format")

    def compile_lark(self, text: str, field: str) -> str:
        """Returns a grammar in llguidance's dialect of Lark, checked.

        Args:
            field: of the request, for errors.

        Raises:
            ArgumentError: as `compile`.
        """
        return self._checked(LLMatcher.grammar_from_lark(text), field)

    def fits(self, text: str) -> bool:
        """Returns whether any text fits a grammar of one value in llguidance's dialect of Lark.

        It is asked for parts of a grammar, since the validation of all of it looks at no terminal.
        What is wrong in another way, and what is too complex to be told, fits here: `compile_lark`
        reports it. The last answers are kept.
        """
        known = self._fitting.get(key := sha256(text.encode()).digest())
        if known is None:
            if len(self._fitting) >= _MOST_FITTING:
                del self._fitting[next(iter(self._fitting))]
            known = self._fitting[key] = self._is_satisfiable(LLMatcher.grammar_from_lark(text))
        return known

    def _is_satisfiable(self, grammar: str) -> bool:
        matcher = LLMatcher(_BYTES, grammar, log_level=0)
        if matcher.is_error():
            return _NOTHING_FITS not in matcher.get_error()
        matcher.compute_logit_bias()  # of a terminal that is empty there is no first token
        return not matcher.is_error()

    def bytes_of(self, token: int) -> bytes:
        """Returns the text of a token, also of a special one."""
        return bytes(self._tokenizer.decode_bytes([token]))

    def _checked(self, grammar: str, field: str) -> str:
        problem = LLMatcher.validate_grammar(grammar, self._tokenizer)
        if problem:
            raise ArgumentError(f"{field}: {' '.join(problem.split())[:300]}")
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():  # its parser has limits that no validation looks at
            raise ArgumentError(f"{field}: {' '.join(matcher.get_error().split())[:300]}")
        return grammar

    def processor(self, grammar: str, prompt_length: int) -> GrammarProcessor:
        """Returns the logits processor of one answer.

        Args:
            grammar: from `compile`.
            prompt_length: tokens before the answer.
        """
        return GrammarProcessor(
            self._tokenizer, grammar, prompt_length, self._vocab_size, self._eos_ids, self._signs
        )


class GrammarProcessor:
    """A `SamplingParams.logits_processor` that masks all tokens that the grammar does not allow.

    Where the grammar is complete, only end-of-sequence tokens are allowed. The scores of a path
    that violates the grammar already are returned unchanged: its probability is 0 anyway.

    It is a `redwood.sampling.constraint.Constraint`, too: it says which drafts the grammar allows,
    and drafts what it forces.
    """

    def __init__(
        self,
        tokenizer: LLTokenizer,
        grammar: str,
        prompt_length: int,
        vocab_size: int,
        eos_ids: Sequence[int],
        signs: Signs | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._signs = signs or Signs(tokenizer)
        self._layouts = Layouts(tokenizer)
        self._matcher = LLMatcher(tokenizer, grammar)
        self._prompt_length, self._vocab_size = prompt_length, vocab_size
        self._eos_ids = list(eos_ids)
        self._read: list[int] = []  # tokens that the matcher has consumed

    def __call__(self, token_ids: Tensor, scores: Tensor) -> Tensor:
        """Returns scores [1, V] with -inf for what may not follow token_ids [1, L].

        Raises:
            GrammarError: the parser's limits were reached.
        """
        if not self._go_to(token_ids[0, self._prompt_length :].tolist()):
            return scores
        allowed = _resized(self._allowed(), scores.shape[1])
        if not allowed.any():
            if scores.shape[1] < self._vocab_size:
                return scores  # a draft model's row without these tokens; the target's row decides
            raise GrammarError("the grammar allows no token here")
        masked = scores.clone()
        masked[0, torch.from_numpy(~allowed)] = -torch.inf
        return masked

    def moved(self, prompt_length: int) -> GrammarProcessor:
        """Lets the grammar begin behind so many tokens of the text; returns itself."""
        self._prompt_length = prompt_length
        return self

    def accepts(self, text: Sequence[int], path: Sequence[int]) -> int:
        """Returns how many tokens of `path`, the first ones, the grammar allows after `text`.

        Args:
            text: prompt and answer so far.
            path: drafted tokens behind it. Nothing is allowed behind an end-of-sequence token.

        Raises:
            GrammarError: the parser's limits were reached.
        """
        answer = list(text[self._prompt_length :])
        if self._go_to([*answer, *path]):
            return len(path)
        count = len(self._read) - len(answer)
        if count < 0:
            return 0
        ends = path[count] in self._eos_ids and self._matcher.is_accepting()
        return count + int(ends)

    def ahead(self, text: Sequence[int], path: Sequence[int], most: int) -> list[Chain]:
        """Returns what is expected to follow `text` and `path`; see `redwood.server.grammar_ahead`.

        Args:
            most: tokens of a chain at most.

        Raises:
            GrammarError: the parser's limits were reached.
        """
        answer = list(text[self._prompt_length :])
        if not self._go_to([*answer, *path]):
            return []
        if self._matcher.is_stopped():
            return [self._end(1.0)]
        layout = self._layouts.after(answer, path)
        walker = Walker(self._matcher, self._tokenizer, self._signs, layout, most)
        chains = walker.chains(self._layouts.end_chance(layout))
        self._check()
        return chains

    def _end(self, chance: float) -> Chain:
        """The usual end-of-sequence token."""
        several = len(self._eos_ids) > 1
        return Chain(self._eos_ids[:1], [chance * (_USUAL_END if several else 1.0)])

    def _go_to(self, path: list[int]) -> bool:
        """Moves the matcher to the end of a path; False: the path violates the grammar."""
        shared = len(self._read)
        if self._read != path[:shared]:
            pairs = enumerate(zip(self._read, path, strict=False))
            shared = next((i for i, (a, b) in pairs if a != b), min(shared, len(path)))
            self._matcher.rollback(len(self._read) - shared)
            del self._read[shared:]
        for token in path[shared:]:
            if token in self._eos_ids or self._matcher.try_consume_tokens([token]) != 1:
                self._check()
                return False
            self._read.append(token)
        self._check()
        return True

    def _allowed(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which tokens may follow, bool [V of the model]."""
        if self._matcher.is_stopped():
            allowed = np.zeros(self._vocab_size, bool)
            allowed[self._eos_ids] = True
            return allowed
        mask = self._matcher.compute_logit_bias()
        self._check()
        return np.frombuffer(mask, np.uint8)[: self._vocab_size].astype(bool)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(f"response_format: {self._matcher.get_error()[:200]}")


def _highest(tokenizer: Any) -> int:
    """The highest id of a tokenizer. Ids may have gaps, so it is not the length minus one."""
    return max(tokenizer.get_vocab().values(), default=-1)


def _resized(allowed: np.ndarray[Any, np.dtype[np.bool_]], width: int) -> Any:
    """The mask cut or extended to a row of another width; tokens beyond it are not allowed."""
    return np.pad(allowed[:width], (0, max(0, width - len(allowed))))
