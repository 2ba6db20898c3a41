"""What is measured: a model on both backends, what drafts for it, and the prompts.

The small subject is the model itself. The large one is the same model grown to the cost of 7B
parameters (`grow.py`): n-gram drafts are as good as on the small model, at the large one's price.
No trained drafter is at hand, so the model drafters are made: for the small subject its own first
layers, a weak drafter; for the large one the small model with noise on its weights. How often their
tokens are accepted is measured, but it is theirs, not that of a trained pair.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from grow import SEVEN_B, Size, grow
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from redwood.backends.cuda_graph.backend import CudaGraphBackend, with_graphs
from redwood.backends.cuda_graph.recording import Repeated
from redwood.backends.load import wrap_model
from redwood.drafters.base import Drafter, ModelDrafter, NgramDrafter
from redwood.engine.engine import RowEngine
from redwood.models import resolve
from redwood.models.tokenizer import eos_ids, load_tokenizer

PROMPTS = Path(__file__).parents[1] / "prompts" / "editing_dev.jsonl"

_TINY = LlamaConfig(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.4,
)
_TINY_GROWN = Size(hidden=64, ffn=128, layers=3, heads=8, kv_heads=2)
_RANDOM = LlamaConfig(  # SmolLM2-135M's sizes
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
)


@dataclass
class Source:
    """A loaded model, the tokens that end its texts, and prompts as token ids."""

    model: Any
    ends: list[int]
    prompts: list[list[int]]


@dataclass
class Subject:
    """A model with everything that is measured on it.

    Args:
        eager, graphs: plain engines on the two backends of one and the same module.
        draft: the model drafter's backend; `assistant` is its module.
        ends: tokens that end a text.
    """

    name: str
    model: Any
    eager: RowEngine
    graphs: RowEngine
    draft: CudaGraphBackend
    assistant: Any
    ends: list[int]
    prompts: list[list[int]]

    def drafter(self, kind: str, tree: Sequence[int] | None = None) -> Drafter:
        """Returns a new drafter: "ngram", or "model", maybe with a tree of its own."""
        return NgramDrafter() if kind == "ngram" else ModelDrafter(self.draft, tree)

    def prepare(self, nodes: Sequence[int], new_tokens: int) -> None:
        """Records the graphs that answers of this length to the prompts will need."""
        low = min(map(len, self.prompts))
        high = max(map(len, self.prompts)) + new_tokens + max(nodes)
        lengths = [*range(low, high, 32), high]
        target: Any = self.graphs.target
        target.prepare(nodes, lengths)
        self.draft.prepare([n for n in nodes if n <= 32], lengths)


def open_source(args: Any, device: torch.device, dtype: torch.dtype) -> Source:
    """Returns the model that the options name; random ones get prompts that repeat themselves."""
    if args.tiny or args.model == "random":
        torch.manual_seed(0)
        config = copy.deepcopy(_TINY if args.tiny else _RANDOM)
        model = LlamaForCausalLM(config).to(device, dtype).eval()
        times = 6 if args.tiny else 40
        return Source(model, [], [[5, 9, 17, 33] * times, [70, 2, 4] * times])
    folder = resolve(args.model, progress=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, local_files_only=True
    )
    tokenizer = load_tokenizer(folder)
    prompts = []
    for line in args.prompts.read_text().splitlines()[: args.num_prompts]:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": json.loads(line)["prompt"]}],
            tokenize=False,
            add_generation_prompt=True,
        )
        prompts.append(list(tokenizer(text, add_special_tokens=False)["input_ids"]))
    return Source(model.to(device).eval(), eos_ids(folder, tokenizer), prompts)


def small(source: Source, args: Any) -> Subject:
    """Returns the model itself, drafted for by its first layers."""
    assistant = copy.deepcopy(source.model)
    layers = max(1, len(assistant.model.layers) * args.draft_layers // 30)
    assistant.model.layers = assistant.model.layers[:layers]
    assistant.config.num_hidden_layers = layers
    return _subject("small", source, source.model, assistant, args)


def large(source: Source, args: Any) -> Subject:
    """Returns the grown model, drafted for by the small one with noise on its weights."""
    assistant = copy.deepcopy(source.model)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in assistant.parameters():
            if weight.dim() > 1:
                weight.add_(torch.randn_like(weight) * args.noise * weight.std())
    model = grow(source.model, _TINY_GROWN if args.tiny else SEVEN_B)
    return _subject("grown", source, model, assistant, args)


def _subject(name: str, source: Source, model: Any, assistant: Any, args: Any) -> Subject:
    recorder = None if model.device.type == "cuda" else Repeated
    eager = wrap_model(model, args.capacity)
    graphs = with_graphs(eager, recorder=recorder)
    draft = with_graphs(wrap_model(assistant, args.capacity), recorder=recorder)
    assistant.generation_config.eos_token_id = source.ends or None
    engine, other = (RowEngine(target, eos_ids=source.ends) for target in (eager, graphs))
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{name}: {size:.0f} million parameters, {model.dtype}", file=sys.stderr, flush=True)
    return Subject(name, model, engine, other, draft, assistant, source.ends, source.prompts)


@contextmanager
def stock(*models: Any) -> Iterator[None]:
    """Gives the modules Transformers' own attention for a while."""
    before = [model.config._attn_implementation for model in models]
    try:
        for model in models:
            model.set_attn_implementation("sdpa")
        yield
    finally:
        for model, attention in zip(models, before, strict=True):
            model.set_attn_implementation(attention)
