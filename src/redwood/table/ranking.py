"""Which tokens a model really says: a ranking from the rows that a table has averaged.

A draft model that scores the best ranked tokens alone has a smaller head: the idea of VocabTrim
(arXiv 2506.22694), which counts tokens in answers of the target to a calibration set.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from redwood.algorithms.successors import ENTRY
from redwood.datastore.store import TokenizerId
from redwood.errors import ArgumentError, TableError
from redwood.table.file import read_table

LEAST_ROWS = 5_000
"""Rows that a table must have learned for its ranking to be used."""


def rank_tokens(entries: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Returns the tokens of a table, those first that the model said most; O(entries).

    A token's weight is its average probability times the rows averaged, over all keys. A row counts
    for each of its keys, of one, two and three tokens, as often as for the others.

    Args:
        entries: [N, 64] of `SuccessorTable.entries`.

    Returns: int64 [M] distinct ids; of equal weights the lower id first.
    """
    held = np.ascontiguousarray(entries).view(ENTRY).reshape(-1)
    weights = held["probs"].astype(np.float64) * held["rows"][:, None]
    said = weights > 0.0
    tokens, places = np.unique(held["tokens"][said], return_inverse=True)
    sums = np.bincount(places.reshape(-1), weights[said], len(tokens))
    return tokens[np.argsort(-sums, kind="stable")].astype(np.int64)


def read_ranking(path: Path, tokenizer: Any) -> NDArray[np.int64]:
    """Returns the ranking of a table in a file; none where it has too few rows.

    The table may be another model's: tokens are ranked, and only the tokenizer must be this one.

    Raises:
        TableError: missing, damaged, of another version, or of another tokenizer.
    """
    info, entries = read_table(path)
    if info.target.tokenizer != TokenizerId.of(tokenizer).sha256:
        raise TableError(
            f"{path} was filled by a model with another tokenizer ({info.target.name}): its "
            "ranking is of other tokens"
        )
    return rank_tokens(entries) if info.rows >= LEAST_ROWS else np.empty(0, np.int64)


def ranked_ids(
    ranking: NDArray[np.int64], size: int, always: Iterable[int] = ()
) -> NDArray[np.int64]:
    """Returns `size` tokens: those of `always`, then the best ranked, then the first ids.

    Returns: int64 [size], ascending.

    Raises:
        ArgumentError: no room for all of `always`.
    """
    first = np.array(sorted(set(always)), np.int64)
    if len(first) > size:
        raise ArgumentError(
            f"a draft vocabulary of {size} has no room for {len(first)} special tokens"
        )
    listed = np.concatenate([first, ranking, np.arange(size)])
    _, places = np.unique(listed, return_index=True)
    return np.sort(listed[np.sort(places)[:size]])
