"""Pieces of text: whole characters, stop strings held back and cut off."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from conftest import tiny_tokenizer
from redwood.engine.detokenizer import Detokenizer

TOKENIZER = tiny_tokenizer()
TEXT = "Größe, naïve, 東京, 😀 and Tom went to the market."


def _pieces(text: str, stop: tuple[str, ...] = ()) -> list[str]:
    detokenizer = Detokenizer(TOKENIZER, stop)
    pieces = []
    for token in TOKENIZER(text)["input_ids"]:
        ended = detokenizer.push(token)
        pieces.append(detokenizer.take(final=ended))
        if ended:
            return pieces
    return [*pieces, detokenizer.take(final=True)]


def test_pieces_add_up_and_never_cut_a_character() -> None:
    pieces = _pieces(TEXT)
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
    assert len([p for p in pieces if p]) > 10


@pytest.mark.parametrize("stop", ["market", "to the mar", "naïve", "京", "😀 a", "."])
def test_text_ends_before_a_stop_string_that_spans_tokens(stop: str) -> None:
    pieces = _pieces(TEXT, ("never seen", stop))
    assert "".join(pieces) == TEXT[: TEXT.index(stop)]


def test_the_earliest_of_several_stop_strings_wins() -> None:
    assert "".join(_pieces(TEXT, ("market", "went", "the"))) == TEXT[: TEXT.index("went")]


def test_a_false_start_of_a_stop_string_is_given_back() -> None:
    assert "".join(_pieces(TEXT, ("market!!",))) == TEXT


def test_nothing_of_a_stop_string_is_ever_shown() -> None:
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choice("abé😀 ") for _ in range(30))
        stop = "".join(rng.choice("abé😀 ") for _ in range(rng.randint(1, 4)))
        shown = "".join(_pieces(text, (stop,)))
        assert shown == (text[: text.index(stop)] if stop in text else text)


def test_an_unfinished_character_comes_out_at_the_end_only() -> None:
    detokenizer = Detokenizer(TOKENIZER)
    first = TOKENIZER("😀")["input_ids"][0]
    if TOKENIZER.decode([first]) == "\ufffd":
        detokenizer.push(first)
        assert detokenizer.take() == ""
        assert detokenizer.take(final=True) == "\ufffd"


WORDS = ["</s>", "<pad>", "▁Tom", "▁went", "▁", "s", "▁▁", "<0xE6>", "<0x9D>", "<0xB1>", "\n"]
FUSED = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
DECODERS = [
    decoders.Metaspace(),
    decoders.Sequence([*FUSED, decoders.Strip(" ", 1, 0)]),
    decoders.Sequence(FUSED),
]


def _sentencepiece(decoder: Any, **how: Any) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="s"))
    made.decoder = decoder
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="</s>", pad_token="<pad>", **how
    )


def _streamed(tokenizer: Any, token_ids: list[int]) -> str:
    detokenizer, text = Detokenizer(tokenizer), ""
    for token in token_ids:
        detokenizer.push(token)
        text += detokenizer.take()
    return text + detokenizer.take(final=True)


@pytest.mark.parametrize("silent", [[0], [0, 1], [999], [0, 999, 1]])
@pytest.mark.parametrize("count", [1, 8, 9, 40])
@pytest.mark.parametrize("tidies", [False, True])
def test_a_word_after_special_tokens_keeps_its_space(
    silent: list[int], count: int, tidies: bool
) -> None:
    tokenizer = _sentencepiece(decoders.Metaspace(), clean_up_tokenization_spaces=tidies)
    between = (silent * count)[:count]
    assert _streamed(tokenizer, [*between, 2, *between, 3, *between]) == "Tom went"


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_stream_says_what_all_tokens_say_together(decoder: Any) -> None:
    tokenizer, chance = _sentencepiece(decoder), random.Random(1)
    for _ in range(300):
        token_ids = [*chance.choices(range(4), k=3)]
        while len(token_ids) < 30:
            token_ids += chance.choice(
                [[0] * 9, [1], [999], [2], [3], [4], [5], [6], [10], [7, 8, 9]]
            )
        assert _streamed(tokenizer, token_ids) == tokenizer.decode(
            token_ids, skip_special_tokens=True
        )


def test_a_stream_of_bytes_says_what_all_tokens_say_together() -> None:
    chance, words = random.Random(2), TOKENIZER(TEXT)["input_ids"]
    for _ in range(100):
        token_ids = [
            token for word in words for token in (*[0] * chance.choice([0, 0, 0, 1, 9]), word)
        ]
        assert _streamed(TOKENIZER, token_ids) == TEXT


def test_special_tokens_inside_a_character_do_not_break_it() -> None:
    tokenizer = _sentencepiece(DECODERS[1])
    assert _streamed(tokenizer, [2, 7, *[0] * 12, 8, 999, 9]) == "Tom東"
