"""Reads what `model.generate` prepared; refuses what decoding through trees cannot serve."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from redwood.errors import UnsupportedError
from redwood.models._transformers import added_inputs, is_sharded

_CACHES = (None, "dynamic", "dynamic_full")
_REFUSED_OPTIONS = (
    "output_scores",
    "output_logits",
    "output_attentions",
    "output_hidden_states",
    "compile_config",
    "low_memory",
    "prefill_chunk_size",
)


def refuse_state(model: Any) -> None:
    """Raises UnsupportedError for a model in training mode or sharded over processes."""
    if model.training:
        raise UnsupportedError(
            "the model is in training mode, where dropout makes logits random: call model.eval()"
        )
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        if distributed.get_world_size() > 1 and is_sharded(model):
            raise UnsupportedError("synced_gpus (FSDP, ZeRO-3): ranks would do unequal forwards")


def refuse_options(
    model: Any, input_ids: Tensor, config: Any, model_kwargs: Mapping[str, Any]
) -> None:
    """Raises UnsupportedError, with its name, for a mode, option or input that is not supported.

    Args:
        input_ids: int64 [batch, length].
        config: the GenerationConfig that `generate` made.
        model_kwargs: what it would hand to the model.
    """
    mode = str(getattr(config.get_generation_mode(), "value", ""))
    if mode not in ("greedy_search", "sample"):
        raise UnsupportedError(
            f"{mode} is not supported, only greedy search and sampling: leave out num_beams, "
            "penalty_alpha, dola_layers, prompt_lookup_num_tokens and their like"
        )
    asked = {name: getattr(config, name, None) for name in _REFUSED_OPTIONS}
    if config.cache_implementation not in _CACHES:
        asked["cache_implementation"] = config.cache_implementation
    asked |= dict.fromkeys(added_inputs(model, input_ids, config, model_kwargs), True)
    for name, value in asked.items():
        if value is not None and value is not False:
            raise UnsupportedError(f"{name} is not supported with redwood.hf: leave it out")
    if model_kwargs.get("use_cache") is False:
        raise UnsupportedError("use_cache=False is not supported: a token tree needs its cache")


def left_padding(input_ids: Tensor, model_kwargs: Mapping[str, Any]) -> list[int]:
    """Returns the number of padding tokens on the left of each row of input_ids [batch, length].

    Raises:
        UnsupportedError: other padding, or positions that are not counted from the first token.
    """
    mask = model_kwargs.get("attention_mask")
    seen = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask != 0
    if seen.shape != input_ids.shape:
        raise UnsupportedError(f"attention_mask of shape {list(seen.shape)} is not supported")
    padding = (~seen).sum(-1)
    columns = torch.arange(input_ids.shape[1], device=seen.device)
    if not torch.equal(seen, columns >= padding[:, None]):
        raise UnsupportedError(
            "attention_mask must hide a beginning of each row only: pad on the left, with the "
            "tokenizer's padding_side='left'"
        )
    positions = model_kwargs.get("position_ids")
    if positions is not None:
        usual = columns - padding[:, None]
        fits = positions.ndim == 2 and positions.shape[1] == input_ids.shape[1]
        if not fits or not bool((~seen | (positions == usual)).all()):
            raise UnsupportedError("position_ids are not supported, other than the usual ones")
    counts: list[int] = padding.tolist()
    return counts
