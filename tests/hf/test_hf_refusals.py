"""The Transformers door: what is refused, by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    SynthIDTextWatermarkingConfig,
)
from transformers.generation import LogitsProcessor

from conftest import tiny_llama
from hf_kit import LOOP, _gpt2, _one
from redwood import hf
from redwood.errors import (
    ArgumentError,
    CapacityError,
    UnsupportedError,
)
from redwood.hf.inputs import refuse_state
from redwood.models._transformers import cache_argument

# What is refused, by name


class _OwnProcessor(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.masked_fill(torch.arange(scores.shape[-1]) % 2 == 0, -torch.inf)


class _Scaled(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, more: int) -> torch.Tensor:
        return scores * more


def test_unknown_processors_need_trust(llama: Any) -> None:
    own = LogitsProcessorList([_OwnProcessor()])
    plain = llama.generate(**_one(), max_new_tokens=12, logits_processor=own)
    with pytest.raises(UnsupportedError, match="_OwnProcessor.*trust_processors"):
        hf.tree_generate(llama, **_one(), max_new_tokens=4, logits_processor=own)
    text = hf.tree_generate(
        llama, **_one(), max_new_tokens=12, logits_processor=own, trust_processors=True
    )
    assert torch.equal(plain, text)
    with pytest.raises(UnsupportedError, match="_Scaled wants more than"):
        hf.tree_generate(
            llama,
            **_one(),
            max_new_tokens=4,
            logits_processor=LogitsProcessorList([_Scaled()]),
            trust_processors=True,
        )


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("beam_search", {"num_beams": 3}),
    ("beam_sample", {"num_beams": 3, "do_sample": True}),
    ("contrastive_search", {"penalty_alpha": 0.6, "top_k": 4}),
    ("assisted_generation", {"prompt_lookup_num_tokens": 3}),
    ("dola_generation", {"dola_layers": "low"}),
    ("output_scores", {"output_scores": True, "return_dict_in_generate": True}),
    ("output_logits", {"output_logits": True, "return_dict_in_generate": True}),
    ("output_hidden_states", {"output_hidden_states": True, "return_dict_in_generate": True}),
    ("use_cache", {"use_cache": False}),
    ("cache_implementation", {"cache_implementation": "static"}),
    ("position_ids", {"position_ids": torch.arange(3, 13)[None]}),
    ("UnbatchedClassifierFreeGuidance", {"guidance_scale": 1.5}),
    ("SynthIDTextWatermark", {"watermarking_config": SynthIDTextWatermarkingConfig([3, 4], 2)}),
    ("InfNanRemove", {"remove_invalid_values": True}),
    ("pad on the left", {"attention_mask": torch.tensor([[1] * 8 + [0] * 2])}),
    ("pad on the left", {"attention_mask": torch.tensor([[1, 0] + [1] * 8])}),
    ("synced_gpus", {"synced_gpus": True}),
]


@pytest.mark.parametrize(("name", "options"), REFUSED, ids=[name for name, _ in REFUSED])
def test_what_a_tree_cannot_serve_is_refused_by_name(
    name: str, options: dict[str, Any], llama: Any
) -> None:
    with pytest.raises(UnsupportedError, match=name):
        hf.tree_generate(llama, **_one(), max_new_tokens=4, **options)
    assert llama.config._attn_implementation == "sdpa"


def test_other_inputs_of_the_model_are_refused(llama: Any) -> None:
    embeddings = llama.get_input_embeddings()(torch.tensor([LOOP])).detach()
    with pytest.raises(UnsupportedError, match="inputs_embeds"):
        hf.tree_generate(llama, inputs_embeds=embeddings, max_new_tokens=3)
    name = cache_argument(llama)
    cache = llama(torch.tensor([LOOP[:-1]]), use_cache=True)[name]
    with pytest.raises(UnsupportedError, match=f"{name} is not supported"):
        hf.tree_generate(llama, **_one(), max_new_tokens=3, **{name: cache})
    model = _gpt2()
    with pytest.raises(UnsupportedError, match="token_type_ids"):
        hf.tree_generate(
            model, **_one(), max_new_tokens=3, token_type_ids=torch.zeros(1, 10, dtype=torch.int64)
        )


def test_training_mode_is_refused() -> None:
    model = tiny_llama().train()
    with pytest.raises(UnsupportedError, match="call model.eval"):
        hf.tree_generate(model, **_one(), max_new_tokens=3)


def test_sharded_models_are_refused(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    refuse_state(llama)
    monkeypatch.setattr("transformers.integrations.is_fsdp_managed_module", lambda _: True)
    with pytest.raises(UnsupportedError, match="synced_gpus"):
        refuse_state(llama)


def test_a_model_without_the_attention_interface_is_refused() -> None:
    from transformers import RwkvConfig, RwkvForCausalLM

    config = RwkvConfig(vocab_size=300, hidden_size=16, num_hidden_layers=2)
    with pytest.raises(UnsupportedError):
        hf.tree_generate(RwkvForCausalLM(config).eval(), **_one(), max_new_tokens=3)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("drafter 'eagle'", {"drafter": "eagle"}),
        ("drafter int is no model", {"drafter": 3}),
        ("seed", {"seed": 2**65}),
        ("verifier", {"verifier": "fast"}),
        ("tree gives the shape", {"tree": [-1, 0]}),
        ("stop_strings need tokenizer", {"stop_strings": "x"}),
        ("assistant_tokenizer needs tokenizer", {"assistant_tokenizer": object()}),
    ],
)
def test_wrong_arguments_raise_when_given(message: str, options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=message):
        hf.generate(**options)


def test_wrong_arguments_of_the_wrapper_raise(llama: Any, draft: Any) -> None:
    with pytest.raises(ArgumentError, match="drafter or assistant_model"):
        hf.tree_generate(llama, **_one(), drafter="ngram", assistant_model=draft)
    with pytest.raises(ValueError, match="tree_size"):
        hf.tree_generate(llama, **_one(), tree_size=3)
    with pytest.raises(ValueError, match="num_return_sequences"):
        hf.tree_generate(llama, **_one(), max_new_tokens=4, num_return_sequences=2)
    with pytest.raises(CapacityError, match="budget 300"):
        hf.tree_generate(llama, **_one(), max_new_tokens=4, budget=300)
