"""Tokenizers made from GGUF files: ids, kinds of tokens, ends, templates; what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from gguf_tokens_kit import END, PIECES, START, built, byte_level, ids, sentencepiece
from redwood.errors import ModelError
from redwood.models._gguf_vocab import read_facts
from redwood.models.gguf_tokenizer import build_tokenizer, hold_against

FAR = ("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜end▁of▁sentence｜>", "[終]")


def with_tokens(*extra: tuple[str, int], **more: Any) -> dict[str, Any]:
    """The byte-level file with tokens of these kinds behind its own."""
    plain = byte_level()
    return byte_level(
        **{
            "tokens": plain["tokenizer.ggml.tokens"] + [token for token, _ in extra],
            "token_type": plain["tokenizer.ggml.token_type"] + [kind for _, kind in extra],
            **more,
        }
    )


SIZE = len(byte_level()["tokenizer.ggml.tokens"])


# --- kinds of tokens and special ids --------------------------------------------------------------


def test_control_tokens_outside_latin_1_keep_the_files_ids() -> None:
    data = with_tokens(
        *((token, 3) for token in FAR), bos_token_id=SIZE, eos_token_id=SIZE + 2, add_bos_token=True
    )
    made = built(data)
    assert len(made) == SIZE + 4
    assert (made.bos_token_id, made.eos_token_id) == (SIZE, SIZE + 2)
    assert ids(made, FAR[1] + FAR[3] + FAR[1]) == [SIZE, SIZE + 1, SIZE + 3, SIZE + 1]
    assert made.decode([SIZE + 1, SIZE + 3], skip_special_tokens=True) == ""


def test_user_defined_tokens_stand_for_themselves_and_are_shown() -> None:
    made = built(with_tokens(("<tool_call>", 4), ("→ ok", 4)))
    assert ids(made, "<tool_call>→ ok") == [SIZE, SIZE + 1]
    assert made.decode([SIZE, SIZE + 1], skip_special_tokens=True) == "<tool_call>→ ok"


def test_unused_and_padding_tokens_are_spelled_and_never_written() -> None:
    made = built(with_tokens(("[PAD7]", 5), ("<unused3>", 5)))
    assert made.convert_ids_to_tokens([SIZE, SIZE + 1]) == ["[PAD7]", "<unused3>"]
    assert not {SIZE, SIZE + 1} & set(ids(made, "[PAD7] <unused3>"))


def test_a_text_that_spells_a_control_token_in_part_is_text() -> None:
    made = built(byte_level())
    assert made.decode(ids(made, "<|endoftext"), skip_special_tokens=True) == "<|endoftext"
    assert ids(made, f"a{END}b")[1] == 0


@pytest.mark.parametrize("name", ["bos", "unknown", "padding"])
def test_a_special_id_that_is_a_common_token_leaves_texts_alone(name: str) -> None:
    vocabulary = byte_level()["tokenizer.ggml.tokens"]
    common = vocabulary.index("!")
    made = built(byte_level(**{f"{name}_token_id": common}))
    assert made.decode(ids(made, "Hi! there!"), skip_special_tokens=True) == "Hi! there!"


def test_a_bos_token_that_is_a_common_token_is_still_added() -> None:
    common = byte_level()["tokenizer.ggml.tokens"].index("!")
    made = built(byte_level(bos_token_id=common, add_bos_token=True))
    assert ids(made, "a")[0] == common and len(ids(made, "a")) == 2


@pytest.mark.parametrize("index", [-1, 0xFFFFFFFF])
def test_an_id_that_says_none_is_none(index: int) -> None:
    made = built(byte_level(bos_token_id=index, padding_token_id=index))
    assert made.bos_token_id is None and made.pad_token_id is None


@pytest.mark.parametrize("key", ["bos", "eos", "eot", "eom"])
def test_an_id_outside_the_vocabulary_is_refused_by_name(key: str) -> None:
    with pytest.raises(ModelError, match=f"{key}_token_id is 99999, .* 2000 .*--tokenizer FOLDER"):
        built(byte_level(**{f"{key}_token_id": 99999}))


@pytest.mark.parametrize(
    ("pre", "told", "begins"),
    [
        ("llama-bpe", None, True),
        ("llama-bpe", False, False),
        ("tekken", None, True),
        ("qwen2", None, False),
        ("qwen2", True, True),
        ("gpt-2", None, False),
    ],
)
def test_bos_is_added_as_the_file_or_the_rule_says(
    pre: str, told: bool | None, begins: bool
) -> None:
    made = built(byte_level(pre, bos_token_id=1, add_bos_token=told))
    assert (ids(made, "hi")[0] == 1) is begins
    assert ids(made, "") == ([1] if begins else [])
    assert made("hi", add_special_tokens=False)["input_ids"][0] != 1


def test_eos_is_added_where_the_file_says_so() -> None:
    made = built(byte_level(bos_token_id=1, add_bos_token=True, add_eos_token=True))
    assert ids(made, "hi")[0] == 1 and ids(made, "hi")[-1] == 0


def test_a_token_to_be_added_that_is_not_named_is_refused() -> None:
    with pytest.raises(ModelError, match="add_bos_token is true, and there is no bos_token_id"):
        built(byte_level(add_bos_token=True))


def test_a_token_with_a_colon_can_be_added() -> None:
    made = built(with_tokens(("<s:1>", 3), bos_token_id=SIZE, add_bos_token=True))
    assert ids(made, "hi")[0] == SIZE


def test_a_file_without_types_has_control_tokens_where_no_text_leads() -> None:
    made = built(byte_level(token_type=None, bos_token_id=1))
    assert ids(made, f"{START}hi<|im_end|>")[0] == 1
    assert made.decode([1, 2], skip_special_tokens=True) == ""


# --- ends of an answer ----------------------------------------------------------------------------


def ends(data: dict[str, Any]) -> list[str]:
    facts = read_facts("small.gguf", data)
    build_tokenizer(facts)
    return [facts.tokens[index] for index in facts.ends()]


def test_the_files_own_ends_come_first() -> None:
    data = with_tokens(("<stop>", 3), ("<more>", 3), eot_token_id=SIZE, eom_token_id=SIZE + 1)
    assert ends(data) == [END, "<stop>", "<more>", "<|im_end|>"]


@pytest.mark.parametrize(
    "end",
    ["<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<turn|>", "<|EOT|>", "<EOT>"]
    + ["<|return|>", "[EOT]", "<|end_of_text|>", "</s>", FAR[2], "<end_of_utterance>"],
)
def test_known_ends_stop_where_they_are_control_tokens(end: str) -> None:
    assert end in ends(with_tokens((end, 3)))
    assert end in ends(with_tokens((end, 4)))
    assert end in ends(with_tokens((end, 1)))  # no merge leads to it: its kind is a mistake


def test_a_text_that_looks_like_an_end_is_no_end_where_merges_make_it() -> None:
    plain = byte_level()
    tokens = [*plain["tokenizer.ggml.tokens"], "</", "s>", "</s>"]
    merges = [*plain["tokenizer.ggml.merges"], "< /", "s >", "</ s>"]
    types = plain["tokenizer.ggml.token_type"] + [1] * 3
    if len(set(tokens)) < len(tokens):
        pytest.fail("the vocabulary of the test has these pieces by itself")
    assert "</s>" not in ends(byte_level(tokens=tokens, merges=merges, token_type=types))


def test_the_end_of_a_part_is_no_end_beside_the_marks_of_its_format() -> None:
    harmony = [("<|return|>", 3), ("<|call|>", 3), ("<|end|>", 3)]
    assert "<|end|>" not in ends(with_tokens(*harmony))
    assert "<|end|>" in ends(with_tokens(*harmony[1:]))
    assert "</s>" not in ends(with_tokens(("<|tool_response>", 3), ("</s>", 3)))


# --- chat templates -------------------------------------------------------------------------------


def test_chat_templates_are_kept_by_name() -> None:
    assert built(byte_level(**{"tokenizer.chat_template": "{{ 1 }}"})).chat_template == "{{ 1 }}"
    named = {
        "tokenizer.chat_template": "a",
        "tokenizer.chat_template.tool_use": "b",
        "tokenizer.chat_templates": ["tool_use"],
    }
    assert built(byte_level(**named)).chat_template == {"default": "a", "tool_use": "b"}
    del named["tokenizer.chat_template"]
    assert built(byte_level(**named)).chat_template == {"tool_use": "b"}
    assert built(byte_level()).chat_template is None


# --- sentencepiece --------------------------------------------------------------------------------


def spelled(made: Any, text: str) -> list[str]:
    return list(made.convert_ids_to_tokens(ids(made, text)))


def test_pieces_are_joined_by_score_and_characters_without_one_are_bytes() -> None:
    made = built(sentencepiece())
    assert spelled(made, "the") == ["<s>", "▁the"]
    assert spelled(made, "in\na") == ["<s>", "▁", "in", "<0x0A>", "a"]
    assert spelled(made, "é") == ["<s>", "▁", "<0xC3>", "<0xA9>"]
    assert made.decode(ids(made, "the é in\n😀"), skip_special_tokens=True) == "the é in\n😀"


@pytest.mark.parametrize("told", [None, True])
def test_a_space_is_put_before_a_text_and_behind_a_special_token(told: bool | None) -> None:
    made = built(sentencepiece(add_space_prefix=told))
    assert spelled(made, " the") == ["<s>", "▁▁", "t", "he"]
    assert spelled(made, "a<|end|>the") == ["<s>", "▁a", "<|end|>", "▁the"]
    assert ids(made, "") == [1]
    assert made.decode(ids(made, " the"), skip_special_tokens=True) == " the"


def test_without_a_space_prefix_a_leading_space_is_the_texts_own() -> None:
    made = built(sentencepiece(add_space_prefix=False))
    assert spelled(made, "the") == ["<s>", "t", "he"]
    assert spelled(made, " the") == ["<s>", "▁the"]
    for text in ("the", " the", "  the ", "\n a"):
        assert made.decode(ids(made, text), skip_special_tokens=True) == text


def test_special_ids_and_bos_have_the_defaults_of_sentencepiece() -> None:
    made = built(sentencepiece())
    assert (made.unk_token_id, made.bos_token_id, made.eos_token_id) == (0, 1, 2)
    assert spelled(built(sentencepiece(add_bos_token=False)), "the") == ["▁the"]
    with_end = built(sentencepiece(add_eos_token=True))
    assert spelled(with_end, "the") == ["<s>", "▁the", "</s>"]


def test_unused_and_byte_pieces_are_never_joined_from_text() -> None:
    made = built(sentencepiece(add_space_prefix=False))
    assert spelled(made, "ain") == ["<s>", "a", "in"]
    assert "<0x41>" not in spelled(made, "<0x41>")
    assert spelled(made, "<tool>in") == ["<s>", "<tool>", "in"]


def test_pieces_of_one_score_are_joined_in_the_order_of_their_ids() -> None:
    made = built(sentencepiece(scores=[-1000.0] * len(PIECES)))
    assert spelled(made, " th") == ["<s>", "▁▁", "t", "h"]


def test_extra_spaces_go_where_the_file_says_so() -> None:
    made = built(sentencepiece(remove_extra_whitespaces=True))
    assert spelled(made, "  the   the ") == ["<s>", "▁the", "▁the"]


def test_phi_3s_own_tokens_swallow_the_line_break_behind_them() -> None:
    data = sentencepiece(**{"general.name": "Phi 3 Mini 4k Instruct"})
    assert spelled(built(data), "<|end|>\nthe") == ["<s>", "<|end|>", "▁the"]
    assert spelled(built(sentencepiece()), "<|end|>\n")[-1] == "<0x0A>"


def test_unigram_takes_the_best_sum_of_scores() -> None:
    scores = [-0.5 * index for index in range(len(PIECES))]
    scores[[piece for piece, _, _ in PIECES].index("▁the")] = -0.25
    made = built(sentencepiece(model="t5", scores=scores, eos_token_id=2, unknown_token_id=0))
    assert spelled(made, "the") == ["▁the", "</s>"]
    assert made.decode(ids(made, "the in"), skip_special_tokens=True) == "the in"


def test_gemma_4_joins_characters_by_merges_and_keeps_runs_of_line_breaks() -> None:
    tokens = [piece for piece, _, _ in PIECES] + ["\n", "\n\n", "\n\n\n"]
    types = [kind for _, _, kind in PIECES] + [1] * 3
    merges = ["▁ t", "▁t h", "h e", "▁th e", "i n"]
    data = sentencepiece(
        model="gemma4", tokens=tokens, token_type=types, scores=None, merges=merges, bos_token_id=1
    )
    made = built(data)
    assert spelled(made, " the\n\n\n\nin") == ["<s>", "▁the", "\n\n\n", "\n", "in"]
    assert spelled(made, "é") == ["<s>", "<0xC3>", "<0xA9>"]


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre": "from-next-year"}, "tokenizer.ggml.pre 'from-next-year' is not known"),
        ({"pre": "whitespace"}, "tokenizer.ggml.pre 'whitespace' is not known"),
        ({"model": "bert"}, "model 'bert' is not for models that write"),
        ({"model": "rwkv"}, "model 'rwkv' is not for"),
        ({"model": "new"}, "model 'new' is not known"),
        ({"model": "none"}, "holds no tokenizer"),
        ({"tokens": []}, "holds no tokenizer"),
        ({"merges": None}, "merges is missing"),
        ({"merges": ["a"]}, "the merge 'a' joins what are no tokens"),
        ({"merges": ["Ġ xyzzy"]}, "the merge 'Ġ xyzzy' joins"),
        ({"token_type": [1]}, "1 token types for 2000 tokens"),
        ({"model": "llama", "merges": None}, "scores and merges are both missing"),
        ({"model": "llama", "scores": [0.5]}, "1 tokenizer.ggml.scores for 2000 tokens"),
        ({"model": "gemma4"}, "neither byte tokens nor an unknown token"),
        ({"model": 7}, "tokenizer.ggml.model is '7', which cannot be"),
        ({"eos_token_id": "x"}, "eos_token_id is 'x', which cannot be"),
        ({"add_bos_token": 3}, "add_bos_token is '3', which cannot be"),
    ],
)
def test_what_is_not_known_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        built(byte_level(**{"pre": "gpt-2", **change}))
    assert str(caught.value).endswith("--tokenizer FOLDER")
    assert "small.gguf" in str(caught.value)


def test_two_tokens_of_one_spelling_are_refused() -> None:
    with pytest.raises(ModelError, match=f"the tokens 1 and {SIZE} are both '<.im_start.>'"):
        built(with_tokens((START, 3)))


def test_empty_tokens_get_names() -> None:
    made = built(with_tokens(("", 5), ("", 5)))
    assert made.convert_ids_to_tokens([SIZE, SIZE + 1]) == [
        f"[EMPTY_{SIZE}]",
        f"[EMPTY_{SIZE + 1}]",
    ]


@pytest.mark.parametrize(("architecture", "rule"), [("qwen2", "qwen2"), ("other", "default")])
def test_a_file_that_names_no_rule_gets_one_with_a_note(architecture: str, rule: str) -> None:
    facts = read_facts("old.gguf", byte_level(None, **{"general.architecture": architecture}))
    made = build_tokenizer(facts)
    (note,) = facts.notes
    assert f"split as '{rule}'" in note and "old.gguf" in note and "\n" not in note
    named = built(byte_level(rule))
    assert ids(made, "x 12345's\n\n b") == ids(named, "x 12345's\n\n b")


def test_a_tokenizer_is_held_against_the_file() -> None:
    facts = read_facts("small.gguf", byte_level())
    made = build_tokenizer(facts)
    made.add_tokens(["<one too many>"])
    with pytest.raises(ModelError, match="has 2001 tokens, not 2000"):
        hold_against(made, facts)
    made = build_tokenizer(facts)
    facts.tokens[300], facts.tokens[301] = facts.tokens[301], facts.tokens[300]
    with pytest.raises(ModelError, match="token 300 is"):
        hold_against(made, facts)
    facts.tokens[300], facts.tokens[301] = facts.tokens[301], facts.tokens[300]
    facts.ids["eos"] = 2
    with pytest.raises(ModelError, match="its eos token is 2, in the tokenizer made it is 0"):
        hold_against(made, facts)
