"""The draft vocabulary of `load`: from what a caller names to the tokens that a model scores."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from redwood.errors import ArgumentError, TableError, check_count
from redwood.table.ranking import ranked_ids, read_ranking

AUTO, ALL = "auto", "all"
DRAFT_VOCAB = 49152
"""First tokens of the vocabulary, scored where nothing ranks them."""
RANKED_VOCAB = 49152
"""Tokens that are scored where a table ranks them: at this size a ranking covers more than the
first ids do, and costs the same; smaller lists cover less (docs/planner.md)."""
OF_TABLE = "table"
"""Names the table that the engine keeps."""

Vocab: TypeAlias = int | str | Path | None
_SIZED = re.compile(r"(.+):(\d+)", re.DOTALL)
_log = logging.getLogger(__name__)


def outputs_of(
    vocab: Vocab, table: str | Path | None, tokenizer: Any, ends: Iterable[int] = ()
) -> int | NDArray[np.int64] | None:
    """Returns the tokens that a draft model scores: how many, the first ones, or which; None: all.

    Args:
        vocab: a number; None or "all"; "table" or the path of a table, maybe with ":" and a number;
            "auto": "table" where that ranks enough tokens.
        table: that the engine keeps, which need not exist yet.
        tokenizer: of the target; its special tokens are always scored.
        ends: tokens that end a text, which are, too.

    Raises:
        ArgumentError: none of these, or "table" without a table.
        TableError: see `read_ranking`.
    """
    check_vocab(vocab, table)
    if vocab is None or vocab == ALL:
        return None
    if isinstance(vocab, int):
        return vocab
    source, size = _split(vocab)
    if source in (AUTO, OF_TABLE):
        if table is None:
            return DRAFT_VOCAB
        path = Path(table).expanduser()
        ranking = read_ranking(path, tokenizer) if path.exists() else np.empty(0, np.int64)
    else:
        path = Path(source).expanduser()
        ranking = read_ranking(path, tokenizer)
    if not len(ranking):
        if source != AUTO:
            _log.warning(
                "%s ranks too few tokens yet: draft models score the first %d", path, DRAFT_VOCAB
            )
        return DRAFT_VOCAB
    return ranked_ids(ranking, size, [*special_ids(tokenizer), *ends])


def check_vocab(vocab: Vocab, table: str | Path | None) -> None:
    """Raises what `outputs_of` raises whatever the tokenizer; arguments as there."""
    if vocab is None or vocab == ALL:
        return
    if type(vocab) is int:
        check_count("draft_vocab", vocab)
        return
    if not isinstance(vocab, str | Path):
        raise ArgumentError(f"draft_vocab {vocab!r} must be a number, a table or None")
    source, _ = _split(vocab)
    if source == OF_TABLE and table is None:
        raise ArgumentError("draft_vocab ranks by the table that is kept, and none is: give table")
    if source not in (AUTO, OF_TABLE) and not Path(source).expanduser().is_file():
        raise TableError(f"draft_vocab {str(vocab)!r}: {source} does not exist")


def _split(vocab: str | Path) -> tuple[str, int]:
    """What ranks, and how many tokens."""
    sized = _SIZED.fullmatch(str(vocab))
    if sized is None or Path(str(vocab)).exists():
        return str(vocab), RANKED_VOCAB
    size = int(sized[2])
    check_count("draft_vocab", size)
    return sized[1], size


def special_ids(tokenizer: Any) -> list[int]:
    """Returns the ids of tokens that are no text: of chat templates, ends, paddings."""
    return [*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()]
