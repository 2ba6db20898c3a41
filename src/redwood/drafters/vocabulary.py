"""The tokens that a draft model scores: all, the first ones, or a list of ids.

A draft model's laws are over these tokens alone. They are stated over the target's ids, so that
verification needs no word of it; a token that is not among them is never drafted.
"""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor

from redwood.backends.base import Backend

ABSENT = -1e30
"""Logit of a token that a draft model does not score."""


class DraftVocabulary:
    """Which token each column of a draft model's logits stands for.

    Args:
        size: columns.
        ids: int64 [size], ascending; None: column i is token i.

    Attributes:
        tokens: those that are scored.
        ranked: whether these are a list of ids.
    """

    def __init__(self, size: int, ids: Tensor | None = None) -> None:
        self.size, self._ids, self.ranked = size, ids, ids is not None
        self.tokens: Container[int] = range(size) if ids is None else frozenset(ids.tolist())

    @classmethod
    def of(cls, backend: Backend) -> DraftVocabulary:
        """Returns that of a backend; its `output_ids`, where it has any, are the ids."""
        return cls(backend.vocab_size, getattr(backend, "output_ids", None))

    def columns(self, vocab_size: int) -> int:
        """Returns how many columns are tokens below `vocab_size`; they are the first ones."""
        if self._ids is None:
            return min(self.size, vocab_size)
        return int(torch.searchsorted(self._ids, vocab_size))

    def token_ids(self, columns: Tensor) -> Tensor:
        """Returns the tokens that int64 columns of any shape stand for."""
        return columns if self._ids is None else self._ids[columns]

    def spread(self, row: Tensor, width: int) -> Tensor:
        """Returns logits [width] by token from a row [n] of the first n columns.

        Tokens that are not scored get `ABSENT`; a row of all tokens is returned as it is.

        Args:
            width: at least the row's last token and one.
        """
        if self._ids is None:
            more = width - len(row)
            if more <= 0:
                return row
            return torch.nn.functional.pad(row.float(), (0, more), value=ABSENT)
        whole = torch.full((width,), ABSENT, device=row.device)
        whole[self._ids[: len(row)].to(row.device)] = row.float()
        return whole

    def gather(self, scores: Tensor, count: int) -> Tensor:
        """Returns the first `count` columns out of scores [V] by token; undoes `spread`."""
        return scores[:count] if self._ids is None else scores[self._ids[:count].to(scores.device)]
