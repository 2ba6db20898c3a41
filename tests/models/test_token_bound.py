"""The least number of tokens of a text: never more than there are, and close where it matters."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AddedToken, PreTrainedTokenizerFast

import redwood
from conftest import tiny_tokenizer
from redwood.errors import CapacityError
from redwood.models.token_bound import TokenBound

BYTEWISE = tiny_tokenizer()
SIGNS = st.sampled_from(
    [*"aTom 0123\n\t<>s/", "é", "e\u0301", "東", "😀", "▁", "  ", "</s>", "<s>"]
)


def sentencepiece(metaspace: bool = False) -> PreTrainedTokenizerFast:
    """A BPE of characters with ▁ for spaces and tokens for the bytes of all others."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁Tomas0123", "▁▁", "To", "Tom"]
    made = Tokenizer(
        models.BPE(
            {word: index for index, word in enumerate(words)},
            [("▁", "▁"), ("T", "o"), ("To", "m")],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    if metaspace:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        made.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


def composed() -> PreTrainedTokenizerFast:
    """Normalised, and with tokens that swallow the spaces beside them."""
    made = tiny_tokenizer()
    made.backend_tokenizer.normalizer = normalizers.NFC()
    made.add_tokens([AddedToken("<hole>", lstrip=True, rstrip=True), AddedToken("a   long one")])
    return made


@pytest.mark.parametrize(
    "tokenizer",
    [BYTEWISE, sentencepiece(), sentencepiece(metaspace=True), composed()],
    ids=["bytewise", "sentencepiece", "metaspace", "composed"],
)
@settings(max_examples=150, deadline=None)
@given(st.lists(SIGNS | st.sampled_from(["<hole>", "a   long one"]), max_size=60).map("".join))
def test_no_text_has_fewer_tokens_than_that(tokenizer: Any, text: str) -> None:
    bound = TokenBound(tokenizer)
    assert bound.least(text) <= len(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_signs_that_no_long_token_holds_are_counted_exactly() -> None:
    assert TokenBound(BYTEWISE).least("0123" * 1000) in (3999, 4000)
    assert TokenBound(sentencepiece()).least("東" * 100) in (299, 300)


def test_where_signs_may_be_lost_nothing_is_certain() -> None:
    lossy = Tokenizer(models.BPE({"a": 0, "[UNK]": 1}, [], unk_token="[UNK]", fuse_unk=True))
    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, "[UNK]"))
    removed = tiny_tokenizer()
    removed.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made = [PreTrainedTokenizerFast(tokenizer_object=each) for each in (lossy, words)]
    for tokenizer in (*made, removed, object()):
        assert TokenBound(tokenizer).least("a " * 1000) == 0


@pytest.mark.parametrize("how", ["generate", "stream", "add"])
@pytest.mark.parametrize("chat", [False, True])
def test_a_prompt_that_can_never_fit_is_not_tokenised(
    tiny_engine: redwood.Engine, monkeypatch: pytest.MonkeyPatch, how: str, chat: bool
) -> None:
    engine = redwood.Engine(tiny_engine.target, tokenizer=tiny_engine.tokenizer)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("it was tokenised")

    monkeypatch.setattr(type(engine.tokenizer), "__call__", never)
    text = "7" * 100_000
    with pytest.raises(CapacityError, match="at least"):
        getattr(engine, how)([{"role": "user", "content": text}] if chat else text)


def test_encode_itself_makes_tokens_of_any_length(tiny_engine: redwood.Engine) -> None:
    assert len(tiny_engine.encode("7" * 5000)) == 5000
