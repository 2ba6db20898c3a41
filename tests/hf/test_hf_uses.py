"""The Transformers door as users open it, on three architectures: streams, assistants, chats."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from transformers import TextIteratorStreamer, TextStreamer, pipeline

from conftest import tiny_tokenizer
from hf_kit import FAMILIES, LOOP, PROMPTS, _batch, _one
from redwood import hf
from redwood.engine.stats import Stats

CHAT = [{"role": "user", "content": "Tom went to the market. Tom went"}]


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    return FAMILIES[request.param]()


def test_a_pipeline_answers_chats_alone_and_in_a_batch(model: Any) -> None:
    stats: list[Stats] = []
    chat = pipeline("text-generation", model=model, tokenizer=tiny_tokenizer(), device="cpu")
    chat.tokenizer.padding_side = "left"
    options = {"max_new_tokens": 12, "do_sample": False}
    door = hf.generate("ngram", stats=stats)
    plain, drafted = chat(CHAT, **options), chat(CHAT, custom_generate=door, **options)
    assert drafted == plain
    assert drafted[0]["generated_text"][-1]["role"] == "assistant"
    assert len(stats) == 1 and stats[0].num_generated_tokens
    several = [CHAT, [{"role": "user", "content": "b"}]]
    assert chat(several, batch_size=2, custom_generate=door, **options) == chat(several, **options)
    assert len(stats) == 2


def test_streamers_of_transformers_get_the_text_of_plain_decoding(
    model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tiny_tokenizer()
    model.generate(**_one(), max_new_tokens=14, streamer=TextStreamer(tokenizer))
    plain = capsys.readouterr().out
    door = hf.generate(streamer=TextStreamer(tokenizer))
    model.generate(**_one(), max_new_tokens=14, custom_generate=door)
    assert capsys.readouterr().out == plain
    pieces = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    options = {**_one(), "max_new_tokens": 14, "streamer": pieces}
    thread = threading.Thread(target=hf.tree_generate, args=(model,), kwargs=options)
    thread.start()
    assert tokenizer.decode(LOOP) + "".join(pieces) + "\n" == plain
    thread.join()


def test_an_assistant_drafts_under_the_name_that_transformers_gives_it(model: Any) -> None:
    family = type(model).__name__.lower()
    small = next(make for name, make in FAMILIES.items() if family.startswith(name))(1)
    stats: list[Stats] = []
    plain = model.generate(**_batch(PROMPTS), max_new_tokens=16)
    options: dict[str, Any] = {"max_new_tokens": 16, "stats": stats}
    text = hf.tree_generate(model, **_batch(PROMPTS), assistant_model=small, **options)
    assert torch.equal(text, plain)
    assert all(each.num_draft_tokens for each in stats)
    sampled = [
        hf.tree_generate(
            model,
            **_one(),
            assistant_model=drafter,
            do_sample=True,
            temperature=0.8,
            seed=5,
            tokenizer=tiny_tokenizer(),
            assistant_tokenizer=tiny_tokenizer(),
            max_new_tokens=12,
        )
        for drafter in (small, model)
    ]
    assert torch.equal(*sampled)
