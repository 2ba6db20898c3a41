"""The Transformers door: greedy decoding and sampling."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import (
    WatermarkingConfig,
)

import redwood
from conftest import tiny_llama, tiny_tokenizer
from hf_kit import EOS, FAMILIES, LOOP, PAD, PROMPTS, _batch, _even, _one
from redwood import hf
from redwood.backends.load import wrap_model
from redwood.engine.engine import RowEngine
from redwood.errors import (
    TokenizerMismatchError,
)

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
    stats: list[redwood.engine.stats.Stats] = []
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
