"""Fills a table from text: the target's rows after every token, a chunk of tokens per pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from redwood.algorithms.successors import BEST, AnyTable
from redwood.backends.base import AcceptedPath, Backend, Nodes
from redwood.sampling import PathRows, SamplingParams
from redwood.sampling.logits import History
from redwood.tree import TokenTree

CHUNK = 128
"""Tokens of a pass: its rows take 78 MB at a vocabulary of 152,000."""
_WINDOW = 2048  # most tokens of a part
_TAIL = 3


def parts_of(token_ids: Sequence[int], capacity: int) -> Iterator[Sequence[int]]:
    """Yields a text in parts, each of which the target reads with an empty context before it.

    Args:
        token_ids: of the text.
        capacity: of the target, in tokens.
    """
    size = min(_WINDOW, capacity)
    for start in range(0, len(token_ids), size):
        yield token_ids[start : start + size]


def read_part(
    backend: Backend,
    table: AnyTable,
    token_ids: Sequence[int],
    on_tokens: Callable[[int], None] = lambda count: None,
) -> None:
    """Teaches a table the target's row after every token of a text.

    Args:
        token_ids: at most the backend's capacity.
        on_tokens: called with the tokens of each chunk when it was read.

    Raises: as `Backend.extend`.
    """
    row = backend.open()
    try:
        for start in range(0, len(token_ids), CHUNK):
            chunk = list(token_ids[start : start + CHUNK])
            (logits,) = backend.extend([Nodes(row, chunk)])
            backend.commit([AcceptedPath(row, range(len(chunk)))])
            tree = TokenTree.chain(chunk)
            rows = PathRows(logits, tree, SamplingParams(), History(()))
            found = rows.best_few(BEST)
            if found is not None:
                tail = list(token_ids[max(0, start - _TAIL) : start])
                table.learn(tail, chunk, tree.parent_list, *found)
            on_tokens(len(chunk))
    finally:
        backend.release(row)
