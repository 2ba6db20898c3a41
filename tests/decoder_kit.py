"""Tiny models of each architecture, as folders and as GGUF files, and a plain decoder for them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from torch import Tensor

from redwood.backends.native.spec import DecoderSpec
from redwood.backends.native.weights import Weight, WeightSource

CLASSES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma2": "Gemma2",
    "gemma3": "Gemma3",
    "phi3": "Phi3",
}
_OWN: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
    "mistral": {"head_dim": 16, "sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 10, "sliding_window": 4},
    "gemma3": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 4},
    "phi3": {"sliding_window": 5, "partial_rotary_factor": 0.5},
}


def tiny_config(architecture: str, **changes: Any) -> Any:
    name = CLASSES[architecture] + ("Text" if architecture == "gemma3" else "") + "Config"
    fields = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 7 if architecture == "gemma3" else 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        **_OWN[architecture],
        **changes,
    }
    return getattr(transformers, name)(**copy.deepcopy(fields))  # Transformers writes into dicts


def tiny_model(architecture: str, **changes: Any) -> Any:
    """A random model in float32 whose norms and biases are not all ones and zeros."""
    torch.manual_seed(0)
    config = tiny_config(architecture, **changes)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{CLASSES[architecture]}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn_like(parameter)
            assert torch.isfinite(parameter).all(), name
    return model


def permuted(rows: Tensor, heads: int) -> Tensor:
    """What llama.cpp's converter does to the rows of q and k of llama models."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


_NAMES = [
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
    ("model.layers.", "blk."),
    ("input_layernorm", "attn_norm"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.qkv_proj", "attn_qkv"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    *((f"self_attn.{part}_proj", f"attn_{part}") for part in "qkv"),
    ("pre_feedforward_layernorm", "ffn_norm"),
    ("post_feedforward_layernorm", "post_ffw_norm"),
    ("mlp.gate_up_proj", "ffn_up"),
    *((f"mlp.{part}_proj", f"ffn_{part}") for part in ("gate", "up", "down")),
]


def gguf_tensors(model: Any) -> dict[str, np.ndarray[Any, Any]]:
    """The weights of a model under the names and in the order of GGUF files."""
    config, kind = model.config, model.config.model_type
    gemma, tensors = kind.startswith("gemma"), {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for part, count in heads.items():
            if kind in ("llama", "mistral") and part in name:
                value = permuted(value, count)
        if gemma and name.endswith("norm.weight"):
            value = value + 1
        after = "post_attention_norm" if gemma else "ffn_norm"
        for theirs, ours in [*_NAMES, ("post_attention_layernorm", after)]:
            name = name.replace(theirs, ours)
        tensors[name] = value.numpy().copy()
    return tensors


def gguf_settings(model: Any) -> dict[str, Any]:
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    settings = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": rope.get("full_attention", rope)["rope_theta"],
    }
    if config.model_type in ("qwen2", "gemma2", "gemma3_text", "phi3"):
        settings["attention.sliding_window"] = config.sliding_window or 0
    if config.model_type == "qwen2":
        kinds = [kind == "sliding_attention" for kind in config.layer_types]
        settings["attention.sliding_window_pattern"] = kinds
    if config.model_type == "gemma2":
        settings["attention.scale"] = config.query_pre_attn_scalar**-0.5
    if config.model_type == "phi3":
        settings["rope.dimension_count"] = int(head_dim * rope["partial_rotary_factor"])
    return settings


def write_gguf(
    path: Path,
    architecture: str,
    settings: dict[str, Any],
    tensors: dict[str, Any],
    general: dict[str, Any] | None = None,
) -> Path:
    """Tensors are float32 arrays, or pairs of bytes and the name of a ggml type."""
    writer = GGUFWriter(path, architecture)
    named = {f"{architecture}.{key}": value for key, value in settings.items()}
    for key, value in {**named, **(general or {})}.items():
        adder = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
        getattr(writer, f"add_{adder[type(value)]}")(key, value)
    for name, value in tensors.items():
        if isinstance(value, tuple):
            writer.add_tensor(name, value[0], raw_dtype=GGMLQuantizationType[value[1]])
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


_SCALES = {
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
    **dict.fromkeys(("IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS"), [0]),
    "IQ1_S": [0],
    "IQ1_M": [],  # its scale lies in four nibbles
    "NVFP4": [],  # a scale of 7 bits for 16 numbers
}


def stored(rows: np.ndarray[Any, Any], kind: str) -> tuple[np.ndarray[Any, Any], str]:
    """A matrix in a ggml type; random blocks of small scale for those that `gguf` cannot write."""
    if kind not in _SCALES:
        return quantize(rows, GGMLQuantizationType[kind]), kind
    step, size = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    rng = np.random.default_rng(rows.size)
    blocks = rng.integers(0, 256, (rows.shape[0], rows.shape[1] // step, size), dtype=np.uint8)
    for at in _SCALES[kind]:
        scales = rng.uniform(1e-4, 4e-4, blocks.shape[:2] + (1,)).astype(np.float16)
        blocks[:, :, at : at + 2] = scales.view(np.uint8)
    if kind == "NVFP4":
        blocks[:, :, :4] = blocks[:, :, :4] % 8 + 2
    if kind == "IQ1_M":
        scales = rng.uniform(1e-4, 4e-4, blocks.shape[:2] + (1,)).astype(np.float16)
        nibbles = scales.view(np.uint16) >> np.array([0, 4, 8, 12], np.uint16) & 15
        blocks[:, :, 49::2] = blocks[:, :, 49::2] & 15 | nibbles << 4
    return blocks.reshape(rows.shape[0], -1), kind


def save_gguf(path: Path, model: Any, kind: str = "F32", **changes: Any) -> Path:
    """A model as a GGUF file, its matrices in a ggml type; settings of None are left out."""
    names = {"mistral": "llama", "gemma3_text": "gemma3"}
    architecture = names.get(model.config.model_type, model.config.model_type)
    settings = {**gguf_settings(model), **changes}
    settings = {key: value for key, value in settings.items() if value is not None}
    tensors: dict[str, Any] = gguf_tensors(model)
    if kind != "F32":
        tensors = {k: stored(x, kind) if x.ndim > 1 else x for k, x in tensors.items()}
    return write_gguf(path, architecture, settings, tensors)


def numbers(weight: Weight) -> Tensor:
    """The weight as the decoder wants it: float32 [rows, cols]."""
    raw = weight.read().reshape(weight.rows, weight.row_bytes)
    values = np.array(dequantize(raw, gguf.GGMLQuantizationType[weight.kind]), np.float32)
    if weight.row_order is not None:
        values = values[weight.row_order]
    return (torch.tensor(values) + weight.add) * weight.times


class PlainDecoder:
    """Logits from a WeightSource, one text at a time, by the letter of DecoderSpec."""

    def __init__(self, source: WeightSource) -> None:
        self.source, self.spec = source, source.spec

    def _get(self, role: str, layer: int | None = None) -> Tensor:
        weight = self.source.get(role, layer)
        assert weight is not None, (role, layer)
        return numbers(weight)

    def _norm(self, x: Tensor, role: str, layer: int | None = None) -> Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.spec.norm_eps)
        return x * scale * self._get(role, layer)[0]

    def _heads(self, x: Tensor, part: str, layer: int) -> Tensor:
        """[heads, n, head_dim], with bias, norm and rotary positions."""
        spec = self.spec
        y = x @ self._get(part, layer).T
        if spec.attention_bias:
            y = y + self._get(f"{part}_bias", layer)[0]
        y = y.view(len(x), -1, spec.head_dim).transpose(0, 1)
        if part == "v":
            return y
        if spec.qk_norm:
            y = self._norm(y, f"{part}_norm", layer)
        rope = spec.ropes[spec.rope_of_layer[layer]]
        angles = torch.arange(len(x))[:, None] * torch.tensor(rope.inv_freq)
        cos, sin = angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor
        first, second, rest = y.split(
            [rope.rotary_dim // 2, rope.rotary_dim // 2, spec.head_dim - rope.rotary_dim], -1
        )
        return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)

    def _attention(self, x: Tensor, layer: int) -> Tensor:
        spec = self.spec
        q, k, v = (self._heads(x, part, layer) for part in "qkv")
        repeats = spec.heads // spec.kv_heads
        k, v = k.repeat_interleave(repeats, 0), v.repeat_interleave(repeats, 0)
        scores = q @ k.transpose(1, 2) * spec.attention_scale
        if spec.attention_softcap:
            scores = torch.tanh(scores / spec.attention_softcap) * spec.attention_softcap
        distance = torch.arange(len(x))[:, None] - torch.arange(len(x))
        hidden = (distance < 0) | (distance >= (spec.windows[layer] or len(x)))
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out = (weights @ v).transpose(0, 1).reshape(len(x), -1) @ self._get("o", layer).T
        return out + self._get("o_bias", layer)[0] if spec.output_bias else out

    def logits(self, token_ids: Tensor) -> Tensor:
        """[n, V] for token_ids [n]."""
        spec: DecoderSpec = self.spec
        embedding = self._get("embed")
        x = embedding[token_ids] * spec.embedding_scale
        for layer in range(spec.layers):
            y = self._attention(self._norm(x, "attn_norm", layer), layer)
            x = x + (self._norm(y, "post_attn_norm", layer) if spec.post_norms else y)
            y = self._norm(x, "ffn_norm", layer)
            gate = y @ self._get("gate", layer).T
            gelu = torch.nn.functional.gelu(gate, approximate="tanh")
            gate = gelu if spec.activation == "gelu_tanh" else torch.nn.functional.silu(gate)
            y = gate * (y @ self._get("up", layer).T) @ self._get("down", layer).T
            x = x + (self._norm(y, "post_ffn_norm", layer) if spec.post_norms else y)
        logits = self._norm(x, "output_norm") @ (embedding if spec.tied else self._get("output")).T
        cap = spec.logit_softcap
        return torch.tanh(logits / cap) * cap if cap else logits


def check_refused(
    read: Callable[[Path], Any], path: Path, error: type[Exception], message: str
) -> None:
    """Reading refuses a folder or file with this error, in one line that says so."""
    with pytest.raises(error) as caught:
        read(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)
