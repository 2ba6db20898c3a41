"""From a model folder, or a loaded model, to the eager backend, checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from redwood.backends.eager.backend import ATTENTION, EagerBackend
from redwood.backends.eager.packing import pack_linears
from redwood.backends.eager.probe import (
    PROBE_SLOTS,
    Stock,
    check_structure,
    natural_tokens,
    probe,
    stock_logits,
)
from redwood.backends.eager.recurrent import Form
from redwood.backends.eager.stock import (
    config_of,
    device_of,
    dtype_of,
    first_line,
    load_stock,
    slots_of,
)
from redwood.backends.eager.together import together_of
from redwood.errors import NumericalError, UnsupportedError
from redwood.models._transformers import attention_of, check_version
from redwood.models._transformers_states import RECURRENT_LAYERS
from redwood.sampling import check_finite

_LAYER_TYPES = {"full_attention", "sliding_attention"} | RECURRENT_LAYERS


def load_eager(
    folder: Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    capacity: int | None = None,
) -> EagerBackend:
    """Returns the eager backend for the model in `folder`.

    Only safetensors are read, and no remote code runs.

    Args:
        dtype: "float32", "bfloat16", "float16" or torch's own; "auto" is float32
            on a CPU and the model's on CUDA.
        device: "cpu", "cuda", "cuda:N"; "auto" takes CUDA where there is one.
        capacity: slots per row, at most the model's context length, which is the default.

    Raises:
        ArgumentError: unknown dtype or device.
        CapacityError: a capacity that is below 2 or beyond the model's context.
        ModelError: a folder that does not load.
        UnsupportedError: a model that cannot be served exactly, with the reason.
    """
    place = device_of(device)
    config = config_of(folder)
    slots = slots_of(capacity, config)
    model = load_stock(folder, dtype_of(dtype, place, config)).to(place)
    if place.type == "cpu":
        pack_linears(model)
    return wrap_model(model, slots)


def wrap_model(
    model: PreTrainedModel,
    capacity: int | None = None,
    make: Callable[[PreTrainedModel, int], EagerBackend] = EagerBackend,
) -> EagerBackend:
    """Returns a backend around a loaded Transformers model, switched to our attention and checked.

    Args:
        model: to serve.
        capacity: slots of a row; None: the model's context.
        make: the backend's class, or what stands for it.

    Raises:
        UnsupportedError: the model cannot be served exactly, with the reason.
        NumericalError: its logits are NaN or infinite.
    """
    check_version()
    _refuse_unsupported(model.config)
    slots = slots_of(capacity, model.config)
    before = attention_of(model.config)
    try:
        if EagerBackend(model, slots).recurrent.modules and make is not EagerBackend:
            raise UnsupportedError(
                f"{type(model).__name__} has recurrent layers, which the eager backend alone runs"
            )
        structure = check_structure(model)
        model.set_attn_implementation(structure.attention)
        stock = stock_logits(model, natural_tokens(model))
        check_finite(stock.logits)
        model.set_attn_implementation(ATTENTION)
        probed = _probed(model, structure.forms, stock, make, max(slots, PROBE_SLOTS))
        made = make(model, slots)
        made.recurrent.form = probed.recurrent.form
        together = together_of(made)
    except Exception as error:
        model.set_attn_implementation(before)
        if isinstance(error, UnsupportedError | NumericalError):
            raise
        raise UnsupportedError(
            f"{type(model).__name__} does not run with tree attention: {first_line(error)}"
        ) from error
    made = make(model, slots)
    made.together, made.recurrent.form = together, probed.recurrent.form
    if made.recurrent.modules:  # what a row takes is known before the first one
        made.token_bytes, made.state_bytes = probed.token_bytes, probed.state_bytes
    return made


def _probed(
    model: PreTrainedModel,
    forms: Sequence[Form],
    stock: Stock,
    make: Callable[[PreTrainedModel, int], EagerBackend],
    slots: int,
) -> EagerBackend:
    """Returns a backend with the first form in which the real thing is right; see `probe`."""
    for form in forms:
        made = make(model, slots)
        made.recurrent.form = form
        try:
            probe(made, stock)
            break
        except UnsupportedError:
            if form == forms[-1] or not made.recurrent.modules:
                raise
    return made


def _refuse_unsupported(config: Any) -> None:
    if config.is_encoder_decoder:
        raise UnsupportedError("encoder-decoder models are not supported, only causal ones")
    text = config.get_text_config()
    odd = set(getattr(text, "layer_types", None) or ()) - _LAYER_TYPES
    if odd:
        raise UnsupportedError(
            f"{config.model_type} has layers of type {', '.join(sorted(odd))}: a token tree needs "
            "attention whose past can be masked per node"
        )
