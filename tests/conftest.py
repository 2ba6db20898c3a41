"""Fixtures: tiny random models made here, so that no test needs a download."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# Their fixtures, and what may be skipped.
pytest_plugins = [
    "fork_kit",
    "hf_kit",
    "models_kit",
    "page_kit",
    "planner_kit",
    "server_kit",
    "pool_kit",  # after what it imports
    "skips_kit",
]

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)  # tiny models: a second thread only waits
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job, and its children
    signal.signal(signal.SIGINT, signal.default_int_handler)

_CORPUS = [
    "Tom went to the market. Tom bought apples, and Anna bought pears.",
    "def add(a, b):\n    return a + b\n",
    "Größe, naïve, 東京, 😀 and a few more signs: <>[]{}#@!?",
]
_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def tiny_tokenizer(vocab_size: int = 300) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text round-trips, characters may span tokens."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        _CORPUS,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


def tiny_llama(seed: int = 0, layers: int = 2, **changes: Any) -> LlamaForCausalLM:
    """A random Llama in float32 whose logits are spread enough for arg-max to be clear."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": 300,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "initializer_range": 0.4,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 1,
            **changes,
        }
    )
    return LlamaForCausalLM(config).eval()


def save_model(folder: Path, model: Any, tokenizer: Any) -> Path:
    """Saves a model folder as `redwood.load` reads it."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a 2-layer random Llama, its tokenizer and a chat template."""
    return save_model(tmp_path_factory.mktemp("target"), tiny_llama(), tiny_tokenizer())


@pytest.fixture(scope="session")
def tiny_draft_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 1-layer random Llama with the same tokenizer."""
    return save_model(tmp_path_factory.mktemp("draft"), tiny_llama(1, 1), tiny_tokenizer())


@pytest.fixture(autouse=True)
def _own_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[None]:
    """No fast test touches the user's cache."""
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setenv("REDWOOD_CACHE", str(tmp_path / "cache"))
    yield
