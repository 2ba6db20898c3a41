"""A padded batch, column by column as plain `generate` builds it, from an engine's ragged steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from redwood.engine.engine import RowEngine
from redwood.engine.stats import Stats
from redwood.errors import ArgumentError, CapacityError
from redwood.sampling import SamplingParams


def decode_batch(
    engine: RowEngine,
    rows: Sequence[tuple[list[int], SamplingParams]],
    input_ids: Tensor,
    criteria: Any,
    pad_id: int | None,
    *,
    streamer: Any = None,
    stats: list[Stats] | None = None,
) -> Tensor:
    """Returns int64 [batch, length]: the prompts and what follows, until the criteria end it.

    Args:
        engine: without requests of its own; it has none afterwards.
        rows: prompt without padding, and parameters, per row.
        input_ids: int64 [batch, prompt length], with the padding.
        criteria: StoppingCriteriaList; sees each column once, with the whole batch. What a step
            gave a row beyond the column waits, and is dropped where the row ends before it.
        pad_id: fills rows that have ended.
        streamer: gets the prompts, each column, and the end.
        stats: refilled with those of the rows.

    Raises:
        ArgumentError: no padding token where rows may end early; see also `RowEngine.add`.
        CapacityError: a row that reaches the end of the context before the criteria end it.
    """
    # NOTE: where no criterion knows an EOS token, plain generate lets rows that have ended go on.
    pads = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
    if pads and pad_id is None:
        raise ArgumentError("rows that end early need a pad_token_id: set one")
    keys: list[int] = []
    try:
        for prompt, params in rows:
            keys.append(engine.add(prompt, params))
        ahead = _Ahead(engine, keys)
        if stats is not None:
            stats[:] = [engine.stats(key) for key in keys]
        if streamer is not None:
            streamer.put(input_ids.cpu())
        text, live = input_ids, torch.ones_like(input_ids[:, 0], dtype=torch.bool)
        while any(going := live.tolist()):
            new = [
                ahead.next(key) if on or not pads else pad_id
                for key, on in zip(keys, going, strict=True)
            ]
            column = text.new_tensor(new)
            text = torch.cat([text, column[:, None]], dim=-1)
            live = live & ~criteria(text, None)
            if streamer is not None:
                streamer.put(column.cpu())
            for key, on in zip(keys, live.tolist(), strict=True):
                if pads and not on:
                    engine.cancel(key)
        if streamer is not None:
            streamer.end()
    finally:
        for key in keys:
            engine.cancel(key)
    return text


class _Ahead:
    """Tokens that the engine's steps gave each row ahead of the batch's current column."""

    def __init__(self, engine: RowEngine, keys: Sequence[int]) -> None:
        self._engine = engine
        self._tokens: dict[int, deque[int]] = {key: deque() for key in keys}
        self._ended: set[int] = set()

    def next(self, key: int) -> int:
        """Returns the row's next token, after as many steps as it takes."""
        while not self._tokens[key]:
            if key in self._ended:
                raise CapacityError(
                    f"an answer reached the context of {self._engine.target.capacity} tokens: "
                    "lower max_new_tokens or shorten the prompt"
                )
            for step in self._engine.step():
                if step.error is not None:
                    raise step.error
                self._tokens[step.request].extend(step.token_ids)
                if step.finish_reason is not None:
                    self._ended.add(step.request)
        return self._tokens[key].popleft()
