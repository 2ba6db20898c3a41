"""A small model of the same make: every layer of a configuration, with few and random weights.

Whether a module computes a tree as it computes its paths depends on how it is built, not on its
weights. On a small instance in float32 it can be checked to 1e-4; with the loaded weights, rounded
to 8 or 16 bits, a difference could not be distinguished from rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from math import gcd
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from redwood.models._transformers import restore_attentions
from redwood.models._transformers_states import recurrent_modules, tighten_limits

_VOCAB, _HIDDEN, _INNER, _EXPERTS, _WINDOW = 256, 64, 128, 8, 5
_MOST = 100_000_000  # parameters of a small model: 400 MB during the check
_SOFTCAP = 2.0  # of scores: low enough to bend those of random weights


def small_models(
    model: Any, seed: int, dtype: torch.dtype, gain: float
) -> Iterator[PreTrainedModel]:
    """Yields small models of the same class on the CPU, the smallest first; those that can be made.

    Windows are shorter than the texts of the check, so that what they hide is missed, soft caps are
    low, and limits of time steps narrow.

    Args:
        model: only its class and configuration are looked at.
        seed: of the weights; the global random state is not changed.
        dtype: of the weights.
        gain: of a layer's outputs over its inputs; with a small one rounding grows less.
    """
    configs = _few_layers if recurrent_modules(model) else _small_configs
    for config in configs(model.config):
        try:
            with torch.device("meta"):
                size = sum(weight.numel() for weight in _make(model, config).parameters())
            if size > _MOST:
                continue
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                with torch.device("cpu"):
                    made = _make(model, config).to(dtype)
                _draw(made, gain)
                tighten_limits(made)
        except Exception:
            continue
        yield made.eval()


def _make(model: Any, config: Any) -> PreTrainedModel:
    kind: Any = type(model)
    if not isinstance(model, PreTrainedModel):  # something around one
        kind = AutoModelForCausalLM.from_config
    made: PreTrainedModel = kind(deepcopy(config))
    return made


@torch.no_grad()
def _draw(model: nn.Module, gain: float) -> None:
    """Random weights that let every part of the model count."""
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.normal_(0, gain / weight.shape[-1] ** 0.5)
        else:
            weight.add_(torch.randn_like(weight), alpha=0.1)


def _small_configs(config: Any) -> Iterator[Any]:
    """Configurations to try: narrow, less narrow, and as wide as they were with two layers."""
    text = _copied(config).get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    if isinstance(heads, int) and isinstance(getattr(text, "hidden_size", None), int):
        if getattr(text, "head_dim", None):
            yield _narrowed(config, free_width=True)
        yield _narrowed(config, free_width=False)
    made = _copied(config)
    made.get_text_config().num_hidden_layers = min(2, text.num_hidden_layers)
    if getattr(text, "layer_types", None) is None:
        yield made


def _few_layers(config: Any) -> Iterator[Any]:
    """Configurations of hybrids: a layer of each kind, with a narrow stream, or as wide as it was.

    A width of a recurrent layer may have to fit another in ways of its own: such a narrow one does
    not come into being, and the next is tried.
    """
    kinds = list(getattr(config.get_text_config(), "layer_types", None) or ())
    first = sorted({kinds.index(kind) for kind in kinds} | {0, min(1, len(kinds) - 1)})
    if isinstance(getattr(config.get_text_config(), "num_attention_heads", None), int):
        made = _narrowed(config, free_width=True)
        _fit_mamba(made.get_text_config(), config.get_text_config().hidden_size)
        yield made
    for few in (first, list(range(len(kinds)))):
        made = _copied(config)
        text = made.get_text_config()
        _shrink(text, None)
        if few != list(range(len(kinds))):
            try:
                text.layer_types = [kinds[i] for i in few]
            except AttributeError:  # it is made of other settings
                if len(set(kinds)) > 1:
                    continue
            text.num_hidden_layers = len(few)
        yield made


def _fit_mamba(text: Any, hidden: int) -> None:
    """Fewer heads of Mamba-2 layers where they are as wide together as a multiple of the stream."""
    names = ("mamba_expand", "mamba_n_heads", "mamba_d_head", "mamba_n_groups")
    sizes = [getattr(text, name, None) for name in names]
    if not all(type(size) is int for size in sizes):
        return
    expand, heads, each, groups = (int(size or 0) for size in sizes)
    if heads * each == expand * hidden and getattr(text, "mamba_d_ssm", None) is None:
        text.mamba_n_heads = max(1, expand * text.hidden_size // each)
        text.mamba_n_groups = gcd(groups, text.mamba_n_heads)


def _copied(config: Any) -> Any:
    """A copy with a small vocabulary, short windows, and Transformers' own attention."""
    made = deepcopy(config)
    restore_attentions([(made, "eager")])
    for gone in ("quantization_config", "distributed_config"):
        if hasattr(made, gone):
            delattr(made, gone)
    text = made.get_text_config()
    # Where some layers differ, what the others have may be read, too.
    text.allow_global_per_layer_attribute_access = True
    vocab = text.vocab_size
    for part in {id(each): each for each in (made, text)}.values():
        for name, value in list(vars(part).items()):
            if name.endswith(("token_id", "token_index")) and value is not None:
                setattr(part, name, None if name.startswith(("bos", "eos")) else 0)
            elif name.startswith("vocab_size") and value == vocab:
                setattr(part, name, min(vocab, _VOCAB))
    if getattr(text, "sliding_window", None):
        text.sliding_window = min(text.sliding_window, _WINDOW)
    if getattr(text, "attn_logit_softcapping", None):
        text.attn_logit_softcapping = min(text.attn_logit_softcapping, _SOFTCAP)
    return made


def _narrowed(config: Any, *, free_width: bool) -> Any:
    """The same layers with few heads of the same size, a narrow stream and few experts.

    Args:
        free_width: the stream need not be as wide as all heads are together.
    """
    made = _copied(config)
    text = made.get_text_config()
    hidden, heads = text.hidden_size, text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    size = getattr(text, "head_dim", None) or hidden // heads
    few_kv = min(kv_heads, 2)
    few = few_kv * min(max(1, heads // kv_heads), 2)
    width = min(hidden, _HIDDEN) if free_width else few * size
    _shrink(text, width)
    if getattr(text, "query_pre_attn_scalar", None):
        text.query_pre_attn_scalar = size
    text.num_attention_heads = few
    if getattr(text, "num_key_value_heads", None):
        text.num_key_value_heads = few_kv
    text.hidden_size = width
    differing = text.to_dict().get("per_layer_config")
    for layer in (differing or {}).values():
        if layer.get("num_key_value_heads"):
            layer["num_key_value_heads"] = min(layer["num_key_value_heads"], few_kv)
    if differing:
        text.per_layer_config = differing
    return made


def _shrink(text: Any, width: int | None) -> None:
    """Fewer experts and narrower inner layers; a stream of `width`, None: as it was."""
    hidden = text.hidden_size
    names = set(text.to_dict()) | set(getattr(text, "attribute_map", None) or ())
    for name in sorted(names):
        value = getattr(text, name, None)
        if type(value) is not int:
            continue
        if name in ("num_experts_per_tok", "moe_topk", "top_k_experts"):
            setattr(text, name, min(value, 2))
        elif name in ("n_group", "topk_group", "num_expert_groups"):
            setattr(text, name, 1)
        elif "experts" in name:
            setattr(text, name, min(value, _EXPERTS))
        elif "intermediate" in name or "ffn" in name or name in ("n_inner", "d_ff"):
            setattr(text, name, min(value, _INNER))
        elif width and value == hidden and any(p in name for p in ("hidden", "embd", "dim")):
            setattr(text, name, width)
