"""What a logits processor may tell beside its mask: which drafts it allows, and what it forces.

Both are hints for drafting. Verification asks the mask alone, so a constraint that is wrong here
costs drafts and never changes a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor


class Chain(NamedTuple):
    """Tokens that are expected one after another.

    Args:
        token_ids: of any number.
        chances: of each, that it comes if those before it came, in [0, 1]; 1: the mask allows no
            other token there.
    """

    token_ids: list[int]
    chances: list[float]


@runtime_checkable
class Constraint(Protocol):
    """A `SamplingParams.logits_processor` that drafts are checked against, and that drafts itself.

    What the methods return depends on their arguments alone: paths come in any order.
    """

    def __call__(self, token_ids: Tensor, scores: Tensor) -> Tensor:
        """Returns scores [1, V] with -inf for what may not follow token_ids int64 [1, L]."""
        ...

    def accepts(self, text: Sequence[int], path: Sequence[int]) -> int:
        """Returns how many tokens of `path`, the first ones, may follow.

        Args:
            text: prompt and answer so far.
            path: drafted tokens behind it.
        """
        ...

    def ahead(self, text: Sequence[int], path: Sequence[int], most: int) -> list[Chain]:
        """Returns what is expected to follow `text` and `path`: chains of at most `most` tokens."""
        ...
