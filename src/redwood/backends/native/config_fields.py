"""Fields of a Transformers configuration, read once and checked; what was not read is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from redwood.errors import ModelError, UnsupportedError

_HARMLESS = frozenset(
    {
        *("architectures", "model_type", "transformers_version", "dtype", "torch_dtype"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"),
        *("initializer_range", "use_cache", "output_hidden_states", "output_attentions"),
        *("return_dict", "output_router_logits", "router_aux_loss_coef", "router_jitter_noise"),
        *(
            "attention_dropout",
            "residual_dropout",
            "embedding_dropout",
            "resid_pdrop",
            "embd_pdrop",
        ),
        *("pretraining_tp", "chunk_size_feed_forward", "id2label", "label2id", "problem_type"),
        *("is_encoder_decoder", "quantization_config", "name_or_path", "_name_or_path"),
        # What they say is in layer_types, rope_parameters or the weights.
        *("max_window_layers", "use_sliding_window", "sliding_window_pattern", "sliding_window"),
        *("layer_types", "original_max_position_embeddings", "no_rope_layer_interval"),
        *("rope_theta", "rope_scaling", "partial_rotary_factor", "rope_local_base_freq"),
        *(
            "tie_word_embeddings",
            "num_nextn_predict_layers",
            "_sliding_window_pattern",
            "cache_implementation",
        ),
    }
)
"""Settings that change no logits, or say again what other ones say."""


class Fields:
    """The fields of a configuration; `where` names it in messages."""

    def __init__(self, config: Any, where: Path) -> None:
        self.where = where
        self._config = config
        self._read: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        """Returns a field as Transformers has it; None if there is none."""
        self._read.add(name)
        mapped = getattr(type(self._config), "attribute_map", {}).get(name)
        if mapped is not None:
            self._read.add(mapped)
        try:
            # Past the guard of configurations some of whose layers differ: who reads
            # per_layer_config knows, and it is refused for others.
            return object.__getattribute__(self._config, mapped or name)
        except AttributeError:
            return default

    def count(self, name: str) -> int:
        """Returns a whole number of at least 1."""
        value = self.get(name)
        if type(value) is not int or not 1 <= value < 1 << 31:
            shown = str(value)[:80]
            raise ModelError(f"{self.where}: {name} {shown} must be a whole number of at least 1")
        return value

    def number(self, name: str) -> float:
        """Returns a positive number."""
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise ModelError(f"{self.where}: {name} {str(value)[:80]} must be a positive number")
        return float(value)

    def softcap(self, name: str) -> float:
        """Returns a soft cap: None means none, 0 here; 0 would divide by 0."""
        return 0.0 if self.get(name) is None else self.number(name)

    def flag(self, name: str) -> bool:
        """Returns a switch; absent is off."""
        return bool(self.get(name, False))

    def stated(self) -> dict[str, Any]:
        """Returns the configuration as it would be written to a file."""
        return dict(self._config.to_dict())

    def refuse_unread(self) -> None:
        """Raises UnsupportedError for a field that Transformers' model may compute with, that was
        not read here, and that does not hold its default."""
        stated, kind = self.stated(), type(self._config)
        try:
            default = kind().to_dict()
        except Exception:  # a class that cannot be made without arguments says no defaults
            default = {}
        if stated.get("per_layer_config") and "per_layer_config" not in self._read:
            default["per_layer_config"] = None
        for name, value in stated.items():
            if name in self._read or name in _HARMLESS or name.startswith("_"):
                continue
            if name in default and value != default[name]:
                raise UnsupportedError(
                    f"{self.where}: the setting {name} {str(value)[:80]} is not computed here"
                )
