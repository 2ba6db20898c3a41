"""A Llama-family model made larger without changing what it computes.

Where weights of a large model are not at hand, this gives one that costs what a large model costs
and says what a small one says. Wider: the channels added to the residual stream are always zero,
heads and feed-forward units that are added have no way out. Deeper: the layers that are added write
zeros. Weights that only ever meet zeros, or whose product is never read, are random: a GPU draws
less power on zeros, and would be faster than on a real model.
"""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

FAMILY = ("llama", "mistral", "qwen2")
"""Model types whose norms and layers are the ones that this file knows."""


class Size(NamedTuple):
    """Sizes of a decoder; the heads keep their dimension."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int


SEVEN_B = Size(hidden=4096, ffn=14336, layers=32, heads=64, kv_heads=16)
"""Mistral 7B's matrices and bytes of keys and values, with heads of 64: 7.2e9 parameters with
SmolLM2's embedding."""


def size_of(model: Any) -> Size:
    """Returns the sizes of a model."""
    c = model.config
    return Size(
        c.hidden_size,
        c.intermediate_size,
        c.num_hidden_layers,
        c.num_attention_heads,
        c.num_key_value_heads,
    )


def grow(
    model: Any,
    size: Size,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """Returns a larger model with the same logits, made on the device; the given one stays.

    An RMSNorm divides by the mean square over all channels, zeros included: with H of H' channels
    in use it is smaller by H / H'. So eps is multiplied by H / H' and the weights by its root.
    In float32 the logits are the same up to rounding. In bf16 the scaled norm weights round once
    more, unless H' / H is a power of 4: then it is a model very near to the given one.

    Args:
        model: a causal language model of FAMILY.
        size: no size may be smaller, and kv heads may not serve fewer heads each.
        device, dtype: of the result; None: as the model's.

    Raises:
        ValueError: another family, or a size that does not hold the model.
    """
    config = copy.deepcopy(model.config)
    if config.model_type not in FAMILY:
        raise ValueError(f"{config.model_type} is not one of {', '.join(FAMILY)}")
    old = size_of(model)
    groups, wide_groups = old.heads // old.kv_heads, size.heads // size.kv_heads
    if min(new - was for new, was in zip(size, old, strict=True)) < 0 or wide_groups < groups:
        raise ValueError(f"{size} does not hold {old}")
    if size.heads % size.kv_heads:
        raise ValueError(f"{size.heads} heads do not divide among {size.kv_heads} kv heads")
    dim = getattr(config, "head_dim", None) or old.hidden // old.heads
    config.head_dim = dim
    config.hidden_size, config.intermediate_size = size.hidden, size.ffn
    config.num_hidden_layers = size.layers
    config.num_attention_heads, config.num_key_value_heads = size.heads, size.kv_heads
    config.rms_norm_eps *= old.hidden / size.hidden
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[0]] * size.layers
    device = model.device if device is None else torch.device(device)
    with torch.device(device), torch.random.fork_rng(devices=_cuda(device)):
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(
            config, dtype=dtype or model.dtype, attn_implementation="sdpa"
        ).eval()
    made.generation_config = copy.deepcopy(model.generation_config)

    # Head (i, j), the j-th that reads kv head i, stays the j-th that reads kv head i.
    heads = [i * wide_groups + j for i in range(old.kv_heads) for j in range(groups)]
    q = torch.cat([torch.arange(h * dim, (h + 1) * dim) for h in heads])
    channels, ffn = torch.arange(old.hidden), torch.arange(old.ffn)
    kv = torch.arange(old.kv_heads * dim)
    scale = math.sqrt(old.hidden / size.hidden)
    with torch.no_grad():
        _place(made.model.embed_tokens.weight, model.model.embed_tokens.weight, None, channels)
        if not config.tie_word_embeddings:
            _place(made.lm_head.weight, model.lm_head.weight, None, channels)
        _norm(made.model.norm, model.model.norm, scale)
        for layer, source in zip(made.model.layers, model.model.layers, strict=False):
            _norm(layer.input_layernorm, source.input_layernorm, scale)
            _norm(layer.post_attention_layernorm, source.post_attention_layernorm, scale)
            for name, rows in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
                new, was = getattr(layer.self_attn, name), getattr(source.self_attn, name)
                _linear(new, was, rows, channels)
            _linear(layer.mlp.gate_proj, source.mlp.gate_proj, ffn, channels)
            _linear(layer.mlp.up_proj, source.mlp.up_proj, ffn, channels)
            _linear(layer.self_attn.o_proj, source.self_attn.o_proj, channels, q, alone=True)
            _linear(layer.mlp.down_proj, source.mlp.down_proj, channels, ffn, alone=True)
        for layer in made.model.layers[old.layers :]:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                for parameter in linear.parameters():
                    parameter.zero_()
    return made


def _linear(new: Any, old: Any, rows: Tensor, columns: Tensor, *, alone: bool = False) -> None:
    """Places a layer's weights; `alone`: all others are zero, as what it writes is read."""
    if alone:
        new.weight.zero_()
    _place(new.weight, old.weight, rows, columns, clear=False)
    if old.bias is not None:
        new.bias.zero_()
        new.bias[rows.to(new.bias.device)] = old.bias.to(new.bias)


def _place(
    new: Tensor, old: Tensor, rows: Tensor | None, columns: Tensor, *, clear: bool = True
) -> None:
    """Writes a matrix into these rows (None: all) and columns of a larger one."""
    if clear:
        new.zero_()
    rows = torch.arange(len(new)) if rows is None else rows
    new[rows.to(new.device)[:, None], columns.to(new.device)] = old.to(new)


def _norm(new: Any, old: Any, scale: float) -> None:
    new.weight.fill_(1.0)  # of channels that are always zero
    new.weight[: len(old.weight)] = (old.weight.float() * scale).to(new.weight)


def _cuda(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []
