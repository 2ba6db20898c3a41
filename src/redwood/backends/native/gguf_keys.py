"""The settings of a GGUF file, read by name and checked; what is not known is refused."""

from __future__ import annotations

import math
from typing import Any

from redwood.backends.native.families import (
    FAMILIES,
    GEMMA,
    LATENT,
    by_gguf,
    gguf_architectures,
)
from redwood.errors import ModelError, UnsupportedError
from redwood.models._gguf import GGUFFile
from redwood.models._gguf_parts import GGUFModel

_KNOWN = {
    *("vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length"),
    *("expert_count", "expert_used_count", "tensor_data_layout"),
    "attention.layer_norm_epsilon",
    *("attn_logit_softcapping", "final_logit_softcapping"),
    *(f"attention.{name}" for name in ("head_count", "head_count_kv", "key_length")),
    *(f"attention.{name}" for name in ("value_length", "key_length_swa", "value_length_swa")),
    *(f"attention.{name}" for name in ("layer_norm_rms_epsilon", "scale", "causal")),
    *("attention.sliding_window", "attention.sliding_window_pattern"),
    *("rope.dimension_count", "rope.dimension_count_swa", "rope.freq_base", "rope.freq_base_swa"),
    *("rope.scale_linear", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.finetuned"),
    *("rope.scaling.original_context_length", "rope.scaling.attn_factor"),
    *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
    *("rope.scaling.yarn_attn_factor", "rope.scaling.yarn_ext_factor"),
}
_EXPERTS = {
    *("expert_feed_forward_length", "expert_shared_feed_forward_length", "expert_shared_count"),
    *("expert_weights_scale", "expert_weights_norm", "expert_gating_func"),
    *("expert_group_count", "expert_group_used_count"),
}
_SHARED = {"leading_dense_block_count", "nextn_predict_layers"}
_LATENT = {
    *(f"attention.{name}" for name in ("q_lora_rank", "kv_lora_rank")),
    *(f"attention.{name}" for name in ("key_length_mla", "value_length_mla")),
    "rope.scaling.yarn_log_multiplier",
}
_LAYERS = {"embedding_length_per_layer_input", "attention.shared_kv_layers"}
_STREAMS = {"altup.active_idx", "altup.num_inputs", "activation_sparsity_scale"}
"""What Gemma 3n and Gemma 4 have beside others, and Gemma 3n alone."""
_RECURRENT = {
    "": set[str](),
    "short_conv": {"shortconv.l_cache"},
    "delta": {
        *("ssm.conv_kernel", "ssm.state_size", "ssm.group_count", "ssm.time_step_rank"),
        *("ssm.inner_size", "full_attention_interval", "nextn_predict_layers"),
        "rope.dimension_sections",  # of a text all positions are the same
    },
    "mamba": {
        *("ssm.conv_kernel", "ssm.state_size", "ssm.group_count", "ssm.time_step_rank"),
        "ssm.inner_size",
    },
}
_SCALES = {"embedding_scale", "residual_scale", "logit_scale"}


class Keys:
    """The settings of one architecture, by their names without its prefix."""

    def __init__(self, file: GGUFFile | GGUFModel) -> None:
        self.file = file
        architecture = file.metadata.get("general.architecture")
        if not isinstance(architecture, str):
            raise ModelError(f"{file.path} does not say its general.architecture")
        family = by_gguf(architecture)
        if family is None:
            raise UnsupportedError(
                f"{file.path}: architecture {architecture!r} is not supported, only "
                f"{', '.join(gguf_architectures())}"
            )
        self.architecture, self.family = architecture, family
        if architecture == "llama" and self.get("expert_count"):
            self.family = "mixtral"

    def get(self, name: str) -> Any:
        """Returns a setting or None."""
        return self.file.metadata.get(f"{self.architecture}.{name}")

    def fault(self, name: str, fault: str) -> ModelError:
        """Returns an error that names the key."""
        return ModelError(f"{self.file.path}: {self.architecture}.{name} {fault}")

    def refused(self, name: str, reason: str) -> UnsupportedError:
        """Returns an error that names the key and its value."""
        value = str(self.get(name))[:80]
        return UnsupportedError(f"{self.file.path}: {self.architecture}.{name} {value} {reason}")

    def count(self, name: str, default: int | None = None) -> int:
        """Returns a whole number of at least 1; a list must repeat one number."""
        value = self.get(name)
        if isinstance(value, list) and value:
            if len(set(value)) > 1:
                raise self.refused(name, "differs between layers, which is not supported")
            value = value[0]
        if value is None:
            value = default
        if value is None:
            raise self.fault(name, "is missing")
        if type(value) is not int or not 1 <= value < 1 << 31:
            raise self.fault(name, f"{value!r} must be a whole number of at least 1")
        return value

    def counts(self, name: str, layers: int, default: int | None = None) -> tuple[int, ...]:
        """Returns a whole number of at least 1 for each layer; a single one counts for all."""
        values = self.get(name)
        if not isinstance(values, list):
            return (self.count(name, default),) * layers
        if len(values) != layers or any(
            type(value) is not int or not 1 <= value < 1 << 31 for value in values
        ):
            raise self.fault(name, f"{str(values)[:80]} is no list of {layers} whole numbers")
        return tuple(values)

    def kv_heads(self, heads: int) -> int:
        """Returns the key-value heads of layers with attention; others may state 0 of them."""
        name = "attention.head_count_kv"
        value = self.get(name)
        if not isinstance(value, list) or not FAMILIES[self.family].recurrent:
            return self.count(name, heads)
        stated = {count for count in value if count != 0}
        if len(stated) != 1 or type(count := stated.pop()) is not int or not 1 <= count < 1 << 31:
            raise self.fault(name, f"{str(value)[:80]} must state one number of heads, and zeros")
        return count

    def number(self, name: str, default: float | None = None) -> float:
        """Returns a finite number."""
        value = self.get(name)
        if value is None:
            value = default
        if value is None:
            raise self.fault(name, "is missing")
        if type(value) not in (int, float) or not math.isfinite(value):
            raise self.fault(name, f"{value!r} must be a finite number")
        return float(value)

    def refuse_other(self, name: str, expected: object) -> None:
        """Raises UnsupportedError if a key is there and says something else."""
        if self.get(name) not in (None, expected):
            raise self.refused(name, f"is not supported, only {expected}")

    def refuse(self) -> None:
        """Raises UnsupportedError for whatever this decoder would have to leave out."""
        metadata, prefix = self.file.metadata, f"{self.architecture}."
        if metadata.get("general.type") not in (None, "", "model"):
            raise UnsupportedError(f"{self.file.path} is a {metadata['general.type']}, no model")
        family = FAMILIES[self.family]
        known = _KNOWN | (_EXPERTS if family.experts else set()) | _RECURRENT[family.recurrent]
        if family.experts.startswith("deepseek"):
            known = known | _SHARED
        if self.family in LATENT:
            known = known | _LATENT
        if self.architecture == family.images[2]:  # what images alone need
            known = known | {"rope.dimension_sections", "n_deepstack_layers"}
        if family.traits.get("value_norm"):
            known = known | _LAYERS | (_STREAMS if self.family == "gemma3n" else set())
        if self.family.startswith("granite"):
            # Dense models of Granite 4 are written as hybrids without such layers.
            known = known | _SCALES | _EXPERTS | _RECURRENT["mamba"]
        if family.traits.get("parallel"):
            known = known | {"logit_scale"}
        for key in metadata:
            if key.startswith(prefix) and key.removeprefix(prefix) not in known:
                raise UnsupportedError(f"{self.file.path}: the setting {key} is not supported")
        if self.get("expert_count") and not family.experts:
            raise self.refused(
                "expert_count",
                f"says mixture of experts, which {self.architecture} models have not",
            )
        self.refuse_other("attention.causal", True)
        if self.architecture != "gemma2" and self.get("attn_logit_softcapping"):
            raise self.refused("attn_logit_softcapping", "is defined for gemma2 only")
        if self.family not in GEMMA and self.get("final_logit_softcapping"):
            raise self.refused("final_logit_softcapping", "is defined for Gemma only")
