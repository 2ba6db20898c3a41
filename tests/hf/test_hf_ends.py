"""The Transformers door: ends of the text, output, the user's model."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from transformers import (
    GenerationConfig,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)

import redwood
from conftest import tiny_llama, tiny_tokenizer
from hf_kit import PROMPTS, _batch, _one
from redwood import hf
from redwood.backends.load import wrap_model
from redwood.errors import (
    CapacityError,
    UnsupportedError,
)
from redwood.hf import model as _hf_model

# Ends of the text


class _Recorder(StoppingCriteria):
    """Ends a row at its third token divisible by `of`; remembers every call."""

    def __init__(self, of: int = 5) -> None:
        self.of, self.seen = of, []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        assert scores is None
        self.seen.append(input_ids.tolist())
        return (input_ids[:, 10:] % self.of == 0).sum(-1) >= 3


def test_criteria_see_each_column_of_the_batch_as_in_plain_generate(llama: Any) -> None:
    runs = []
    for door in (None, hf.generate()):
        recorder = _Recorder()
        text = llama.generate(
            **_batch(PROMPTS),
            max_new_tokens=20,
            stopping_criteria=StoppingCriteriaList([recorder]),
            custom_generate=door,
        )
        runs.append((text.tolist(), recorder.seen))
    assert runs[0] == runs[1]


def test_without_an_eos_token_ended_rows_go_on_as_in_plain_generate(llama: Any) -> None:
    model = tiny_llama(eos_token_id=None, pad_token_id=None)
    assert model.generation_config.eos_token_id is None
    runs = []
    for door in (None, hf.generate()):
        text = model.generate(
            **_batch(PROMPTS),
            max_new_tokens=20,
            stopping_criteria=StoppingCriteriaList([_Recorder(3)]),
            custom_generate=door,
        )
        runs.append(text.tolist())
    assert runs[0] == runs[1]


def test_several_eos_tokens_end_and_pad_rows(llama: Any) -> None:
    ends = list(range(1, 300, 9))
    options = {"max_new_tokens": 30, "eos_token_id": ends, "pad_token_id": 0}
    plain = llama.generate(**_batch(PROMPTS), **options)
    assert 0 in plain[:, -1]
    assert torch.equal(
        plain, llama.generate(**_batch(PROMPTS), custom_generate=hf.generate(), **options)
    )


def test_max_length_and_own_length_criteria_hold(llama: Any) -> None:
    plain = llama.generate(**_one(), max_length=17)
    assert torch.equal(
        plain, llama.generate(**_one(), max_length=17, custom_generate=hf.generate())
    )
    own = StoppingCriteriaList([MaxLengthCriteria(13)])
    text = llama.generate(
        **_one(), max_new_tokens=50, stopping_criteria=own, custom_generate=hf.generate()
    )
    assert text.shape[1] == 13


def test_stop_strings_need_the_door_for_their_tokenizer(llama: Any) -> None:
    tokenizer = tiny_tokenizer()
    free = llama.generate(**_one(), max_new_tokens=24)
    pieces = [tokenizer.decode([token]) for token in free[0, 14:30].tolist()]
    stop = next(piece for piece in pieces if piece.isprintable() and piece.isascii())
    plain = llama.generate(**_one(), max_new_tokens=24, stop_strings=stop, tokenizer=tokenizer)
    assert plain.shape[1] < free.shape[1]
    door = hf.generate(tokenizer=tokenizer, stop_strings=stop)
    assert torch.equal(plain, llama.generate(**_one(), max_new_tokens=24, custom_generate=door))
    text = hf.tree_generate(
        llama, **_one(), max_new_tokens=24, stop_strings=stop, tokenizer=tokenizer
    )
    assert torch.equal(plain, text)
    with pytest.raises(UnsupportedError, match="stop_strings in a generation config"):
        hf.tree_generate(llama, **_one(), generation_config=GenerationConfig(stop_strings=stop))


def test_an_answer_beyond_the_context_raises_instead_of_ending_short() -> None:
    model = tiny_llama(max_position_embeddings=24, eos_token_id=299)
    text = model.generate(**_one(), max_length=24, custom_generate=hf.generate())
    assert text.shape == (1, 24)
    with pytest.raises(CapacityError, match="context of 24"):
        model.generate(**_one(), max_length=40, custom_generate=hf.generate())


# Output


class _Streamer:
    def __init__(self) -> None:
        self.parts: list[list[Any]] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.parts.append(value.tolist())

    def end(self) -> None:
        self.ended += 1


def test_a_streamer_gets_what_plain_generate_gives_it(llama: Any) -> None:
    plain, bound, wrapped = _Streamer(), _Streamer(), _Streamer()
    inputs = _batch(PROMPTS)
    llama.generate(**inputs, max_new_tokens=15, streamer=plain)
    llama.generate(**inputs, max_new_tokens=15, custom_generate=hf.generate(streamer=bound))
    hf.tree_generate(llama, **inputs, max_new_tokens=15, streamer=wrapped)
    assert plain.parts == bound.parts == wrapped.parts
    assert plain.ended == bound.ended == wrapped.ended == 1


def test_a_dictionary_comes_back_when_asked_for(llama: Any) -> None:
    output = hf.tree_generate(llama, **_one(), max_new_tokens=5, return_dict_in_generate=True)
    assert torch.equal(output.sequences, llama.generate(**_one(), max_new_tokens=5))
    assert output.sequences.dtype == torch.int64


# The user's model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_models_are_left_as_they_were_found(attention: str) -> None:
    model, small = tiny_llama(), tiny_llama(1, 1)
    for each in (model, small):
        each.set_attn_implementation(attention)
    weights = {name: id(value) for name, value in model.named_parameters()}
    modules = [type(module) for module in model.modules()]
    plain = model.generate(**_one(), max_new_tokens=6)
    door = hf.generate(small)
    for _ in range(2):
        assert torch.equal(plain, model.generate(**_one(), max_new_tokens=6, custom_generate=door))
        assert model.config._attn_implementation == attention
        assert small.config._attn_implementation == attention
    assert weights == {name: id(value) for name, value in model.named_parameters()}
    assert modules == [type(module) for module in model.modules()]
    assert not model.training
    assert torch.equal(plain, model.generate(**_one(), max_new_tokens=6))


def test_attention_is_put_back_and_rows_freed_after_an_error(llama: Any) -> None:
    class Broken(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            assert llama.config._attn_implementation == "redwood"
            raise RuntimeError("broken")

    drafter = redwood.NgramDrafter()
    with pytest.raises(RuntimeError, match="broken"):
        hf.tree_generate(
            llama,
            **_one(),
            drafter=drafter,
            max_new_tokens=6,
            stopping_criteria=StoppingCriteriaList([Broken()]),
        )
    assert llama.config._attn_implementation == "sdpa"
    assert drafter._texts == {}


def test_a_model_is_checked_once_and_again_when_its_attention_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, calls = tiny_llama(), []

    def counted(given: Any) -> Any:
        calls.append(given.config._attn_implementation)
        return wrap_model(given)

    monkeypatch.setattr(_hf_model, "wrap_model", counted)
    for attention in ("sdpa", "sdpa", "eager", "sdpa"):
        model.set_attn_implementation(attention)
        model.generate(**_one(), max_new_tokens=3, custom_generate=hf.generate())
        assert model.config._attn_implementation == attention
    assert calls == ["sdpa", "eager"]


def test_nothing_keeps_a_model_alive() -> None:
    model = tiny_llama()
    model.generate(**_one(), max_new_tokens=3, custom_generate=hf.generate())
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_model_may_be_used_by_two_threads_and_inside_its_own_call() -> None:
    model = tiny_llama()
    plain = model.generate(**_one(), max_new_tokens=12).tolist()
    texts: list[Any] = []

    class Nested(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            if input_ids.shape[1] == 12:
                texts.append(hf.tree_generate(model, **_one(), max_new_tokens=12).tolist())
            return torch.zeros(len(input_ids), dtype=torch.bool)

    def run() -> None:
        nested = StoppingCriteriaList([Nested()])
        door = hf.generate(model)
        text = model.generate(
            **_one(), max_new_tokens=12, stopping_criteria=nested, custom_generate=door
        )
        texts.append(text.tolist())

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == [plain] * 4
    assert model.config._attn_implementation == "sdpa"
