"""A toy grammar: what may follow a path, by a table that is a function of the path."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from redwood.sampling.constraint import Chain


class ToyGrammar:
    """Allows a few tokens after every path, in half of all places a single one.

    Args:
        prompt_length: tokens before the answer.
        end: of the answer, in tokens; then only token 0 is allowed.
    """

    def __init__(
        self, vocab_size: int, prompt_length: int = 0, seed: int = 0, end: int = 1000
    ) -> None:
        self.vocab_size, self._first, self._seed, self._end = vocab_size, prompt_length, seed, end

    def after(self, answer: Sequence[int]) -> list[int]:
        if len(answer) >= self._end:
            return [0]
        rng = np.random.default_rng([self._seed, len(answer), *answer[-3:]])
        least = 1 if rng.random() < 0.5 else 2
        count = 1 if least == 1 else int(rng.integers(2, self.vocab_size))
        return sorted(rng.permutation(self.vocab_size)[:count].tolist())

    def __call__(self, token_ids: Tensor, scores: Tensor) -> Tensor:
        made = torch.full_like(scores, -torch.inf)
        kept = [t for t in self.after(token_ids[0, self._first :].tolist()) if t < scores.shape[1]]
        made[0, kept] = scores[0, kept]
        return made

    def accepts(self, text: Sequence[int], path: Sequence[int]) -> int:
        answer = list(text[self._first :])
        for count, token in enumerate(path):
            if token not in self.after(answer):
                return count
            answer.append(token)
        return len(path)

    def ahead(self, text: Sequence[int], path: Sequence[int], most: int) -> list[Chain]:
        answer, tokens = [*text[self._first :], *path], list[int]()
        while len(tokens) < most and len(allowed := self.after(answer)) == 1:
            tokens += allowed
            answer += allowed
        return [Chain(tokens, [1.0] * len(tokens))]
