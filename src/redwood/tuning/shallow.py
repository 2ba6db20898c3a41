"""A model to begin with: the target's own first layers, with its norm and output layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from redwood.errors import ArgumentError, ModelError, check_count

_BY_LAYER = ("layer_types", "mlp_layer_types")
"""Lists in a configuration with an entry per layer."""


def shallow_copy(folder: Path, layers: int) -> Any:
    """Returns the model of a folder with its first layers only, float32, on the CPU.

    Untrained it drafts badly, as no layer but the last learned to feed the output layer; but it
    has the target's tokens and embeddings. The other layers are not read.

    Args:
        folder: of the target, as Transformers loads it.
        layers: how many to keep, fewer than there are.

    Raises:
        ArgumentError: not fewer than there are.
        ModelError: a folder that does not load.
    """
    check_count("layers", layers)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would list the layers that are left out
    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        _cut(config.get_text_config(), layers)
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except ArgumentError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ModelError(f"{folder} does not load with {layers} layers: {reason}") from error
    finally:
        logging.set_verbosity(verbosity)
    if missing := sorted(loading["missing_keys"]):
        raise ModelError(f"{folder} lacks {len(missing)} of its weights, the first is {missing[0]}")
    return model.eval()


def _cut(config: Any, layers: int) -> None:
    count = config.num_hidden_layers
    if layers >= count:
        raise ArgumentError(f"layers {layers} must be fewer than the target's {count}")
    for name in _BY_LAYER:
        if isinstance(getattr(config, name, None), list):
            setattr(config, name, getattr(config, name)[:layers])
    config.num_hidden_layers = layers
