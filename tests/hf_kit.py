"""What the tests of this subject share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
)

from conftest import tiny_llama

PAD, EOS = 1, 1
LOOP = [5, 9, 17, 33, 5, 9, 17, 40, 5, 9]
PROMPTS = [LOOP, [2, 3, 2, 3, 2], [77, 120, 77]]


def _gpt2(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=300,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=256,
        initializer_range=0.4,
        bos_token_id=0,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return GPT2LMHeadModel(config).eval()


def _gemma2(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = Gemma2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        sliding_window=12,
        initializer_range=0.4,
        bos_token_id=0,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    model = Gemma2ForCausalLM(config).eval()
    model.set_attn_implementation("eager")  # sdpa leaves out the softcap in Transformers 5.10
    return model


FAMILIES = {"llama": tiny_llama, "gpt2": _gpt2, "gemma2": _gemma2}


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_llama()


@pytest.fixture(scope="module")
def draft() -> Any:
    return tiny_llama(1, 1)


def _batch(prompts: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    longest = max(map(len, prompts))
    ids = [[PAD] * (longest - len(p)) + list(p) for p in prompts]
    mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def _one(prompt: Sequence[int] = LOOP) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([list(prompt)])}


def _even(batch_id: int, text: torch.Tensor) -> list[int]:
    """Another set of tokens for each row of the batch, and for each token before."""
    return list(range((batch_id + int(text[-1])) % 3, 300, 3))
