"""Tokenizers of model folders: loading them, what ends a text, whether two mean the same tokens."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from redwood.errors import ModelError, TokenizerMismatchError

_MADE = "redwood.json"
"""In a folder whose tokenizer was made from a GGUF file (`models._cache.MANIFEST`)."""
_REFUSED = "tokenizer-refused.txt"
"""In a folder made from a GGUF file (`models._convert.REFUSED`): why it has no tokenizer."""


def load_tokenizer(folder: Path) -> Any:
    """Returns the Transformers tokenizer of a model folder; no remote code runs.

    Raises:
        ModelError: a folder without a usable tokenizer.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if is_refused(folder):
        raise ModelError((folder / _REFUSED).read_text("utf-8"))
    # AutoTokenizer replaces the splitting of some architectures by what it thinks that theirs is.
    kind = PreTrainedTokenizerFast if (folder / _MADE).is_file() else AutoTokenizer
    try:
        return kind.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the tokenizers library raises plain ones
        raise ModelError(f"{folder} has no usable tokenizer: {error}") from error


def is_refused(folder: Path) -> bool:
    """Whether a folder made from a GGUF file has a reason in place of a tokenizer."""
    return (folder / _REFUSED).is_file()


def eos_ids(folder: Path, tokenizer: Any, own: Path | None = None) -> list[int]:
    """Returns the tokens that end a text, from tokenizer and generation config.

    Args:
        folder: of the model.
        own: of the tokenizer, if it is another one.
    """
    ids: set[int] = set()
    names = ("generation_config.json", "config.json")
    for path in [place / name for place in (folder, own) if place for name in names]:
        with suppress(OSError, ValueError):
            given = json.loads(path.read_text()).get("eos_token_id")
            ids.update([given] if isinstance(given, int) else given or ())
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return sorted(ids)


def check_same_tokens(target: Any, drafter: Any) -> None:
    """Raises TokenizerMismatchError unless equal ids mean equal tokens; the sizes may differ."""
    ours = {index: token for token, index in target.get_vocab().items()}
    theirs = {index: token for token, index in drafter.get_vocab().items()}
    for index in sorted(ours.keys() & theirs.keys()):
        if ours[index] != theirs[index]:
            raise TokenizerMismatchError(
                f"drafter and target use different tokenizers: token {index} is {ours[index]!r} "
                f"for the target and {theirs[index]!r} for the drafter"
            )
    if len(ours.keys() & theirs.keys()) < 0.9 * max(len(ours), len(theirs)):
        raise TokenizerMismatchError(
            f"drafter and target use different tokenizers: {len(theirs)} tokens against {len(ours)}"
        )
