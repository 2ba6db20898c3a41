"""The Transformers door: `model.generate` through token trees against `model.generate` alone."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
)
from transformers.generation import LogitsProcessor

import redwood
from conftest import tiny_llama, tiny_tokenizer
from redwood import hf
from redwood.backends.load import wrap_model
from redwood.engine import RowEngine
from redwood.errors import (
    ArgumentError,
    CapacityError,
    TokenizerMismatchError,
    UnsupportedError,
)
from redwood.hf import model as _hf_model
from redwood.hf.inputs import refuse_state

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


# Greedy decoding: the very tokens of plain generate


@pytest.mark.parametrize("drafter", ["ngram", "model", "union"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_plain_generate_for_one_row_and_a_padded_batch(
    family: str, drafter: str
) -> None:
    model, small = FAMILIES[family](), FAMILIES[family](1)
    given = {"ngram": "ngram", "model": small, "union": [small, "ngram"]}[drafter]
    for inputs in (_one(), _batch(PROMPTS)):
        plain = model.generate(**inputs, max_new_tokens=16)
        drafted = model.generate(**inputs, max_new_tokens=16, custom_generate=hf.generate(given))
        assert torch.equal(plain, drafted)


OPTIONS: dict[str, dict[str, Any]] = {
    "penalty": {"repetition_penalty": 1.4},
    "ngrams": {"no_repeat_ngram_size": 2},
    "prompt": {"encoder_repetition_penalty": 1.5},
    "prompt ngrams": {"encoder_no_repeat_ngram_size": 1},
    "words": {
        "bad_words_ids": [[token] for token in range(2, 300, 3)] + [[4, 6], [9, 10]],
        "sequence_bias": [[[token, token + 1], 9.0] for token in range(1, 299)] + [[[12], 5.0]],
    },
    "lengths": {"min_new_tokens": 6, "forced_eos_token_id": EOS},
    "suppressed": {
        "suppress_tokens": list(range(0, 300, 2)),
        "begin_suppress_tokens": list(range(150)),
    },
    "decay": {"exponential_decay_length_penalty": (4, 1.3)},
    "allowed": {"prefix_allowed_tokens_fn": _even},
    "watermark": {"watermarking_config": WatermarkingConfig(bias=3.0)},
    "several": {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "renormalize_logits": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_processors_apply_per_path_as_in_plain_generate(name: str, llama: Any, draft: Any) -> None:
    # Prompts that hold what the model likes to say, so that every processor has something to do.
    said = llama.generate(**_batch(PROMPTS), max_new_tokens=8, eos_token_id=299)
    inputs = _batch([row[-8 - len(p) :] for row, p in zip(said.tolist(), PROMPTS, strict=True)])
    options = {**inputs, "max_new_tokens": 14, **OPTIONS[name]}
    plain = llama.generate(**options)
    assert not torch.equal(plain, llama.generate(**inputs, max_new_tokens=14))
    door = hf.generate([draft, "ngram"], budget=8)
    assert torch.equal(plain, llama.generate(**options, custom_generate=door))


def test_a_tree_is_really_used(llama: Any) -> None:
    stats: list[redwood.stats.Stats] = []
    door = hf.generate(llama, budget=5, tree=[-1, 0, 1, 2, 3], stats=stats)
    text = llama.generate(
        **_batch(PROMPTS), max_new_tokens=20, eos_token_id=299, custom_generate=door
    )
    assert text.shape == (3, 30)
    assert len(stats) == 3  # the model drafts for itself: all five tokens of every step are kept
    assert all(s.target_passes == 4 and s.num_generated_tokens == 20 for s in stats)


def test_no_drafter_and_own_drafter_objects_serve_too(llama: Any) -> None:
    plain = llama.generate(**_one(), max_new_tokens=12)
    for drafter in ("none", redwood.NgramDrafter(max_branch=2), ["none", "ngram"]):
        door = hf.generate(drafter, budget=3)
        for _ in range(2):  # the same door again
            assert torch.equal(
                plain, llama.generate(**_one(), max_new_tokens=12, custom_generate=door)
            )


def test_the_batch_mask_that_transformers_infers_is_honoured(llama: Any) -> None:
    ids = _batch(PROMPTS)["input_ids"]
    options = {"eos_token_id": 299, "pad_token_id": PAD, "max_new_tokens": 10}
    plain = llama.generate(ids, **options)
    assert torch.equal(plain, llama.generate(ids, custom_generate=hf.generate(), **options))


def test_a_draft_model_with_fewer_tokens_serves_processors_too(llama: Any) -> None:
    small = tiny_llama(1, 1, vocab_size=290)
    tokenizer = tiny_tokenizer(290)
    options = {"max_new_tokens": 16, **OPTIONS["words"], "no_repeat_ngram_size": 2}
    plain = llama.generate(**_one([5, 295, 5, 295]), **options)
    with pytest.raises(TokenizerMismatchError, match="290 tokens, the model 300"):
        hf.tree_generate(llama, **_one(), max_new_tokens=4, assistant_model=small)
    drafted = hf.tree_generate(
        llama,
        **_one([5, 295, 5, 295]),
        assistant_model=small,
        tokenizer=tokenizer,
        assistant_tokenizer=tokenizer,
        **options,
    )
    assert torch.equal(plain, drafted)


def test_draft_tokenizers_are_compared(llama: Any, draft: Any) -> None:
    other = tiny_tokenizer(299)
    other.add_tokens(["<something else>"])
    with pytest.raises(TokenizerMismatchError, match="token 299"):
        hf.tree_generate(
            llama,
            **_one(),
            max_new_tokens=4,
            drafter=draft,
            tokenizer=tiny_tokenizer(),
            assistant_tokenizer=other,
        )


# Sampling


def test_manual_seed_repeats_a_sampled_run(llama: Any, draft: Any) -> None:
    options = {"do_sample": True, "temperature": 0.9, "top_p": 0.9, "max_new_tokens": 16}
    for drafter in ("ngram", draft):
        texts = []
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            texts.append(
                llama.generate(**_batch(PROMPTS), custom_generate=hf.generate(drafter), **options)
            )
        assert torch.equal(texts[0], texts[1])
        assert texts[0].shape != texts[2].shape or not torch.equal(texts[0], texts[2])


def test_greedy_decoding_leaves_the_global_generator_alone(llama: Any) -> None:
    before = torch.get_rng_state()
    llama.generate(**_one(), max_new_tokens=3, custom_generate=hf.generate())
    assert torch.equal(before, torch.get_rng_state())


def test_a_seed_gives_the_text_of_plain_seeded_decoding_whatever_drafts(
    llama: Any, draft: Any
) -> None:
    engine = RowEngine(wrap_model(tiny_llama()), eos_ids=[EOS])
    key = engine.add(LOOP, redwood.SamplingParams(max_tokens=16, temperature=1.0, seed=11))
    expected: list[int] = []
    while engine.busy:
        for step in engine.step():
            assert step.request == key
            expected += step.token_ids
    texts = [
        hf.tree_generate(
            llama, **_one(), drafter=drafter, seed=11, do_sample=True, top_k=0, max_new_tokens=16
        )
        for drafter in ("none", "ngram", draft, [draft, "ngram"])
    ]
    for text in texts:
        assert text[0, len(LOOP) :].tolist() == expected


def test_rows_of_one_prompt_are_sampled_independently(llama: Any) -> None:
    for seed in (None, 5):
        texts = hf.tree_generate(
            llama,
            **_one(),
            seed=seed,
            do_sample=True,
            max_new_tokens=12,
            num_return_sequences=4,
            encoder_no_repeat_ngram_size=3,
            encoder_repetition_penalty=1.2,
        )
        assert len({tuple(row) for row in texts.tolist()}) == 4


def test_first_tokens_have_the_law_of_the_processed_scores() -> None:
    """2,000 rows; each of the first two tokens against the softmax of plain generate's scores.

    At this size a chi-square test at 0.1% sees a total variation of about 0.06 in the first.
    """
    model, small = (tiny_llama(seed, 1, vocab_size=12, initializer_range=0.6) for seed in (0, 1))
    options = {"do_sample": True, "temperature": 1.3, "top_k": 8, "min_p": 0.02}
    options |= {"eos_token_id": 0, "pad_token_id": 0, "return_dict_in_generate": True}
    torch.manual_seed(0)
    answer = hf.tree_generate(
        model,
        torch.tensor([[5]]),
        drafter=small,
        budget=3,
        num_return_sequences=2000,
        max_new_tokens=2,
        **options,
    ).sequences
    first = _law(model, torch.tensor([[5]]), options)
    _check_law(answer[:, 1], first)
    best = int(first.argmax())
    follow = answer[answer[:, 1] == best][:, 2]
    assert len(follow) > 300
    _check_law(follow, _law(model, torch.tensor([[5, best]]), options))


def _law(model: Any, prompt: torch.Tensor, options: dict[str, Any]) -> np.ndarray:
    """What plain generate draws its next token from."""
    scores = model.generate(prompt, max_new_tokens=1, output_scores=True, **options).scores[0]
    return np.asarray(torch.softmax(scores[0].double(), -1))


def _check_law(tokens: torch.Tensor, law: np.ndarray) -> None:
    seen = np.bincount(tokens.numpy(), minlength=len(law))
    assert seen[law == 0].sum() == 0
    kept = law > 0
    assert chisquare(seen[kept], law[kept] * len(tokens)).pvalue > 1e-3


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
    assert drafter._indices == {}


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
    cache = llama(torch.tensor([LOOP[:-1]]), use_cache=True).past_key_values
    with pytest.raises(UnsupportedError, match="past_key_values"):
        hf.tree_generate(llama, **_one(), max_new_tokens=3, past_key_values=cache)
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
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(UnsupportedError):
        hf.tree_generate(MambaForCausalLM(config).eval(), **_one(), max_new_tokens=3)


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
