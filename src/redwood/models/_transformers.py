"""Every name of Transformers that has moved between its releases, or is private and may.

Names are found by signature and by behaviour, so that a release that renames one more is tried and
need not be known here. What cannot be found is refused by name. Transformers is imported inside the
functions: it takes seconds, and most commands do without it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from functools import cache
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any

from redwood.errors import UnsupportedError
from redwood.models._pure_processors import pure_processor

if TYPE_CHECKING:
    from torch import Tensor

_log = logging.getLogger(__name__)

OLDEST_TESTED, NEWEST_TESTED = "5.10.1", "5.24.0"
_WITH_PARTS = "5.17"  # `tp_size` is there since 5.14 or before, `pp_size` since 5.16

_CACHE_NAMES = ("cache", "past_key_values", "cache_params")  # the newest first
_PREPARED = frozenset(
    {"attention_mask", "cache_position", "logits_to_keep", "position_ids", "use_cache"}
)
_FSDP = ("transformers.integrations", "transformers.distributed.fsdp")

_HELD_PER_ROW = {
    "EncoderNoRepeatNGramLogitsProcessor": "generated_ngrams",
    "EncoderRepetitionPenaltyLogitsProcessor": "encoder_input_ids",
    "RepetitionPenaltyLogitsProcessor": "prompt_ignore_length",
}


# Versions


@cache
def check_version() -> None:
    """Says once, in one line, that this Transformers is outside of what was tested."""
    import transformers

    here = _release(transformers.__version__)
    if not _release(OLDEST_TESTED) <= here <= _release(NEWEST_TESTED):
        _log.warning(
            "Transformers %s is outside of the versions tested with Redwood, %s to %s: trying it",
            transformers.__version__,
            OLDEST_TESTED,
            NEWEST_TESTED,
        )


def _release(version: str) -> tuple[int, ...]:
    """Major and minor number: fixes of a release that was tested are not news."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


# Forwards


class CacheHandle:
    """What a module gets as its cache: it keeps nothing, and hands our attention what it needs."""

    is_compileable = False
    is_sliding: tuple[bool, ...] = ()

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Returns, in place of keys and values, what our attention needs to find them."""
        return (self, layer_idx, keys), values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Asked for by modules that number positions themselves; ours are always given."""
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Asked for where a module makes a mask; ours is made in the attention."""
        return 0

    def get_mask_sizes(self, *_: Any, **__: Any) -> tuple[int, int]:
        """Asked for where a module makes a mask; ours is made in the attention."""
        return 0, 0

    def has_previous_state(self, *_: Any, **__: Any) -> bool:
        """Asked for where recurrent layers might need a mask; with a state they need none."""
        return True


def cache_argument(model: Any) -> str:
    """Returns the argument of a model's forward that takes the cache.

    Raises:
        UnsupportedError: it has none.
    """
    kind: Any = type(model)
    return _cache_argument(kind)


@cache
def _cache_argument(kind: Any) -> str:
    # A forward of (*args, **kwargs) takes what `generate` would hand to it.
    for function in (kind.forward, getattr(kind, "prepare_inputs_for_generation", None)):
        given = signature(function).parameters if function is not None else {}
        for name in _CACHE_NAMES:
            if name in given:
                return name
        for name, parameter in given.items():
            if re.search(r"\bCache\b", str(parameter.annotation)):
                return name
    raise UnsupportedError(f"{kind.__name__} takes no cache of keys and values")


@cache
def _takes(kind: Any, name: str) -> bool:
    given = signature(kind.forward).parameters
    return name in given or any(p.kind is Parameter.VAR_KEYWORD for p in given.values())


def cached_logits(
    model: Any, token_ids: Tensor, positions: Tensor, handle: CacheHandle, kept: int | Tensor
) -> Tensor:
    """Returns logits [rows, kept, V] of the last columns, or of named ones, through our attention.

    Args:
        token_ids, positions: int64 [rows, width], on the model's device.
        handle: gets the keys and values.
        kept: how many of the last, at least 1; or columns, int64 [kept].
    """
    kind: Any = type(model)
    given = {_cache_argument(kind): handle, "position_ids": positions}
    config: Any = getattr(model, "config", None)
    text = None if config is None else config.get_text_config()
    shared = getattr(text, "num_kv_shared_layers", None)
    if isinstance(kept, int) and shared:  # of a number, they would see those columns alone
        kept = token_ids.new_tensor(list(range(token_ids.shape[1] - kept, token_ids.shape[1])))
    usual = {"use_cache": True, "logits_to_keep": kept}
    given |= {name: value for name, value in usual.items() if _takes(kind, name)}
    logits: Tensor = model(input_ids=token_ids, **given).logits
    if isinstance(kept, int):
        return logits[:, -kept:]
    return logits if logits.shape[1] == len(kept) else logits[:, kept]


def plain_logits(model: Any, token_ids: Tensor, kept: int = 0, **given: Any) -> Tensor:
    """Returns logits [rows, width, V] of a forward without cache.

    Args:
        token_ids: int64 [rows, width], on the model's device.
        kept: only the last so many columns; 0: all.
        given: further arguments of the forward.
    """
    kind: Any = type(model)
    if kept and _takes(kind, "logits_to_keep"):
        given["logits_to_keep"] = kept
    logits: Tensor = model(input_ids=token_ids, use_cache=False, **given).logits
    return logits[:, -kept:]


# Attention, by configuration


def attention_of(config: Any) -> str:
    """Returns the name of the attention function that a configuration asks for."""
    name: str = config._attn_implementation
    return name


def attentions_of(model: Any) -> list[tuple[Any, str]]:
    """Returns every configuration of a model and of its parts, with its attention function."""
    from transformers import PreTrainedModel

    found = [part.config for part in model.modules() if isinstance(part, PreTrainedModel)]
    for config in found:  # grows
        parts = (getattr(config, name, None) for name in getattr(config, "sub_configs", ()))
        found.extend(part for part in parts if part is not None)
    return [(config, attention_of(config)) for config in found]


def restore_attentions(before: Sequence[tuple[Any, str]]) -> None:
    """Puts back what `attentions_of` returned."""
    for config, attention in before:
        config._attn_implementation = attention


# What `generate` prepares


def added_inputs(model: Any, input_ids: Tensor, config: Any, given: Mapping[str, Any]) -> list[str]:
    """Returns the names of the inputs that somebody gave to `generate`, beside prompt and mask.

    Inputs that `generate` prepares by itself are none of them: those that are known, and those
    that it prepares for this prompt when nothing else is given, with the same values.

    Args:
        input_ids: int64 [batch, length].
        config: the GenerationConfig that it made.
        given: the inputs of the model that it would hand over.
    """
    caches = {n: v for n, v in given.items() if hasattr(v, "get_seq_length")}
    added = [
        name
        for name, cache in caches.items()
        if getattr(cache, "_is_user_defined", False) or _length(cache) > 0
    ]
    others = {
        name: value
        for name, value in given.items()
        if name not in _PREPARED and name not in caches and value is not None and value is not False
    }
    if others:
        usual = _usual_inputs(model, input_ids, config, given.get("attention_mask"))
        added += [n for n, v in others.items() if n not in usual or not _same(v, usual[n])]
    return added


def _length(cache: Any) -> int:
    try:
        length: int = cache.get_seq_length()
    except ValueError:  # of a model without attention
        return 0
    return length


def _usual_inputs(model: Any, input_ids: Tensor, config: Any, mask: Any) -> dict[str, Any]:
    seen: dict[str, Any] = {}

    def note(model: Any, input_ids: Tensor, *_: Any, **inputs: Any) -> Tensor:
        names = ("logits_processor", "stopping_criteria", "generation_config")
        seen.update({name: value for name, value in inputs.items() if name not in names})
        return input_ids

    plain = type(config)(
        max_new_tokens=1, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    masked = {} if mask is None else {"attention_mask": mask}
    model.generate(input_ids, generation_config=plain, custom_generate=note, **masked)
    return seen


def _same(value: Any, usual: Any) -> bool:
    import torch

    if isinstance(value, torch.Tensor):
        return isinstance(usual, torch.Tensor) and torch.equal(value, usual)
    return type(value) is type(usual) and bool(value == usual)


def pad_id(config: Any) -> int | None:
    """Returns the token that a GenerationConfig fills ended rows with, as `generate` chose it."""
    prepared = getattr(config, "_pad_token_tensor", None)
    token = config.pad_token_id if prepared is None else prepared
    return None if token is None else int(token)


def is_sharded(model: Any) -> bool:
    """Returns whether FSDP or ZeRO-3 has spread the weights of a model over processes."""
    asked: list[tuple[str, tuple[Any, ...]]] = [
        ("is_fsdp_managed_module", (model,)),
        ("is_deepspeed_zero3_enabled", ()),
    ]
    return any(_find(name, _FSDP)(*arguments) for name, arguments in asked)


def _find(name: str, modules: Sequence[str]) -> Callable[..., Any]:
    from importlib import import_module

    for module in modules:
        try:
            found: Callable[..., Any] = getattr(import_module(module), name)
        except (ImportError, AttributeError):
            continue
        return found
    raise UnsupportedError(f"this Transformers has no {name} where it was: ask for a newer Redwood")


# Logits processors


def processor_of_row(processor: Any, row: int, batch: int) -> Any:
    """Returns the processor as it is for one row of the batch alone.

    Raises:
        UnsupportedError: it does not hold what it holds per row where it did.
    """
    from transformers.generation import PrefixConstrainedLogitsProcessor

    name = pure_processor(processor) or ""
    if name == "PrefixConstrainedLogitsProcessor":
        allowed = _held(processor, "_prefix_allowed_tokens_fn")
        prompt = row // _held(processor, "_num_beams")  # of repeated prompts, all rows are one
        return PrefixConstrainedLogitsProcessor(lambda _, text: allowed(prompt, text), 1)
    if name not in _HELD_PER_ROW:
        return processor
    held = _held(processor, _HELD_PER_ROW[name])
    if not hasattr(held, "__len__") or getattr(held, "ndim", 1) == 0:
        return processor  # one for all rows, or none
    # Fewer entries than rows: each prompt was repeated for num_return_sequences.
    index = row * len(held) // batch
    made = copy(processor)
    setattr(made, _HELD_PER_ROW[name], held[index : index + 1])
    if isinstance(held, list):
        made.batch_size = 1
    return made


def _held(processor: Any, name: str) -> Any:
    if not hasattr(processor, name):
        kind = type(processor).__name__
        raise UnsupportedError(f"{kind} of this Transformers has no {name}: leave it out")
    return getattr(processor, name)


# Loading


def split_options(parallel: str, size: int) -> dict[str, Any]:
    """Returns what `from_pretrained` needs to load one part of a model.

    Args:
        parallel: "tensor" or "pipeline".
        size: number of processes.

    Raises:
        UnsupportedError: this version cannot do that.
    """
    import transformers

    field = {"tensor": "tp_size", "pipeline": "pp_size"}[parallel]
    try:
        from transformers.distributed import DistributedConfig

        if field in signature(DistributedConfig).parameters:
            return {"distributed_config": DistributedConfig(**{field: size})}
    except ImportError:
        pass
    raise UnsupportedError(
        f"Transformers {transformers.__version__} has no {parallel} parallel loading of this "
        f"kind: pip install -U 'transformers>={_WITH_PARTS}'"
    )


def tensor_plan(config: Any) -> Mapping[str, str]:
    """Returns how each layer of a model is split over processes; empty: not at all."""
    plan: Mapping[str, str] = getattr(config.get_text_config(), "base_model_tp_plan", None) or {}
    return plan


def pipeline_plan(config: Any) -> Mapping[str, Any]:
    """Returns where a model is cut into stages; empty: nowhere."""
    plan: Mapping[str, Any] = getattr(config.get_text_config(), "base_model_pp_plan", None) or {}
    return plan


def gguf_options() -> dict[str, Any]:
    """Returns what `from_pretrained` needs to read a GGUF file into full weights."""
    import transformers

    if hasattr(transformers, "GgufConfig"):  # earlier versions know only the way we want
        return {"quantization_config": transformers.GgufConfig(dequantize=True)}
    return {}
