"""Models as Transformers loads them, and what is read of a folder before: config, dtype, device.

Below everything that runs a model: the eager, offload and parallel backends begin here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from redwood.errors import ArgumentError, CapacityError, ModelError
from redwood.models._transformers_states import recurrent_modules

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


def load_stock(folder: Path, dtype: torch.dtype, **how: Any) -> PreTrainedModel:
    """Returns the model of a folder as Transformers loads it, on the CPU, in eval mode.

    Args:
        how: goes to Transformers.

    Raises:
        ModelError: a folder that does not load, or lacks weights.
    """
    transformers_logging.disable_progress_bar()
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config_of(folder),
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **how,
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(f"{folder} does not load: {first_line(error)}") from error
    missing = sorted(loading["missing_keys"])
    if missing:  # Transformers would go on with random numbers in their place
        raise ModelError(f"{folder} lacks {len(missing)} of its weights, the first is {missing[0]}")
    loaded: PreTrainedModel = model.eval()
    return loaded


def device_of(name: str | torch.device) -> torch.device:
    """Returns the device of a name; "auto" takes CUDA where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ArgumentError(f"device {name!r} is unknown: use cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise ArgumentError(f"device {name!r} is not supported: use cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ArgumentError(f"device {name!r}: this machine has {torch.cuda.device_count()} GPUs")
    return device


def dtype_of(name: str | torch.dtype, device: torch.device, config: Any) -> torch.dtype:
    """Returns the dtype of a name; "auto" is float32 on a CPU and the model's on CUDA."""
    name = str(name).removeprefix("torch.")
    if name == "auto":
        if device.type == "cpu":
            return torch.float32
        stored = getattr(config, "dtype", None)
        return next((known for known in DTYPES.values() if known == stored), torch.bfloat16)
    if name not in DTYPES:
        raise ArgumentError(f"dtype {name!r} must be auto or one of {', '.join(DTYPES)}")
    return DTYPES[name]


def config_of(folder: Path) -> Any:
    """Returns the config of a folder; none of its code runs."""
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # Transformers checks the fields with errors of its own
        raise ModelError(f"{folder} has no usable config.json: {first_line(error)}") from error


def has_recurrent_layers(config: Any) -> bool:
    """Whether a model of this config has recurrent layers; none of its weights are made.

    Raises:
        ModelError: a config that no model is made of.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"no model is made of this config.json: {first_line(error)}") from error
    return bool(recurrent_modules(model))


def slots_of(capacity: int | None, config: Any) -> int:
    """Returns the slots of a row: what was asked for, at most the context, which is the default."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None) or 4096
    if capacity is None:
        return int(context)
    if type(capacity) is not int or not 2 <= capacity <= context:
        raise CapacityError(f"capacity {capacity} must be between 2 and the context of {context}")
    return capacity


def first_line(error: BaseException) -> str:
    """Returns an error in one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:300]
