"""Pieces of text: whole characters, stop strings held back and cut off."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from conftest import tiny_tokenizer
from redwood.text import Detokenizer

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


def test_a_word_after_a_special_token_keeps_its_space() -> None:
    words = models.WordLevel({"▁Tom": 0, "▁went": 1, "</s>": 2}, unk_token="</s>")
    made = Tokenizer(words)
    made.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")
    detokenizer = Detokenizer(tokenizer)
    for token in (0, 2, 2, 1):
        detokenizer.push(token)
    assert detokenizer.take(final=True) == "Tom went"
