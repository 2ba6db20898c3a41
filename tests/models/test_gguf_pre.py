"""Every splitting rule, against what the models' own fast tokenizers have, or by hand."""

from __future__ import annotations

import unicodedata

import pytest
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

from gguf_tokens_kit import TEXTS, built, byte_level, ids, reference, sentencepiece
from redwood.models._gguf_pre import _DEEPSEEK_LLM, OF_ARCHITECTURE, RULES

NAMES = """default minicpm5 llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2
jina-v5-nano deepseek-llm deepseek-coder deepseek-v3 spark2_5 youtu falcon mpt starcoder gpt-2 phi-2
jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert jais-2 gemma4
granite-embed-multi-311m sarvam-moe jina-v1-en jina-v2-code roberta-bpe refact command-r qwen2
deepseek-r1-qwen kormo f2llmv2 qwen35 stablelm2 olmo dbrx smaug-bpe poro-chat glm4 chatglm-bpe
viking jais tekken smollm codeshell bloom gpt3-finnish exaone exaone4 exaone-moe chameleon
minerva-7b megrez gpt-4o llama4 kanana2 talkie granite-embed-multi-97m tiny_aya cohere2moe superbpe
trillion granite-docling bailingmoe bailingmoe2 llada-moe seed-coder hunyuan hunyuan-dense hy_v4
joyai-llm kimi-k2 ufakzeka grok-2 afmoe laguna minimax-m2 solar-open mellum2""".split()
"""Of llama.cpp in November 2026, but for "whitespace", which is for models that do not write."""

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
DIGITS = pre_tokenizers.Digits(individual_digits=True)
RUNS = pre_tokenizers.Digits(individual_digits=False)
SIGNS = pre_tokenizers.Punctuation("contiguous")


def cut(*patterns: str) -> pre_tokenizers.PreTokenizer:
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*steps, BYTES])


def steps(*parts: pre_tokenizers.PreTokenizer) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(list(parts))


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
HAN_KANA, HAN_HANGUL = "[一-龥぀-ゟ゠-ヿ]+", "[一-龥ࠀ-一가-퟿]+"
NFC = normalizers.NFC()
OWN: dict[str, Tokenizer] = {
    "gpt-2": reference(GPT2),
    "exaone4": reference(GPT2),
    "olmo": reference(GPT2, NFC),
    "mpt": reference(GPT2, NFC),
    "refact": reference(steps(DIGITS, GPT2)),
    "starcoder": reference(steps(DIGITS, GPT2)),
    "smollm": reference(steps(DIGITS, GPT2)),
    "codeshell": reference(steps(DIGITS, GPT2)),
    "exaone": reference(steps(DIGITS, GPT2)),
    "command-r": reference(steps(DIGITS, GPT2), NFC),
    "minerva-7b": reference(pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)),
    "falcon": reference(
        steps(SIGNS, GPT2, RUNS, pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"))
    ),
    "falcon3": reference(steps(SIGNS, GPT2, DIGITS), whole_words=True),
    "llama-bpe": reference(cut(LLAMA3), whole_words=True),
    "lfm2": reference(cut(LLAMA3), whole_words=True),
    "chatglm-bpe": reference(cut(LLAMA3)),
    "qwen2": reference(cut(QWEN2), NFC),
    "stablelm2": reference(cut(QWEN2), NFC),
    "deepseek-r1-qwen": reference(cut(QWEN2)),
    "tekken": reference(cut(TEKKEN), whole_words=True),
    "deepseek-v3": reference(cut(r"\p{N}{1,3}", HAN_KANA, DEEPSEEK3)),
    "deepseek-coder": reference(
        steps(
            *(
                pre_tokenizers.Split(Regex(pattern), "isolated")
                for pattern in (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", HAN_HANGUL)
            ),
            DIGITS,
            BYTES,
        )
    ),
}
"""Fast tokenizers as models ship them, written out apart from the table under test."""


@pytest.mark.parametrize("name", OWN)
def test_a_rule_splits_as_its_models_own_tokenizer(name: str) -> None:
    made = built(byte_level(name))
    for text in TEXTS:
        assert ids(made, text) == OWN[name].encode(text).ids, text


@pytest.mark.parametrize("name", NAMES)
def test_every_known_name_splits_and_gives_the_text_back(name: str) -> None:
    rule = RULES[name]
    if rule.byte_level:
        made = built(byte_level(name))
        for text in TEXTS[:-1]:
            expected = unicodedata.normalize("NFC", text) if rule.nfc else text
            if rule.space_prefix and text and text[0] != " ":
                expected = f" {text}"
            assert made.decode(ids(made, text)) == expected
    else:
        merges = ["▁ t", "▁t h", "▁th e", "h e", "i n"]
        made = built(sentencepiece(model="gpt2", pre=name, merges=merges, token_type=CHARACTERS))
        assert made.decode(made("in the\n\n hat", add_special_tokens=False)["input_ids"]) == (
            "in the\n\n hat"
        )


CHARACTERS = [1 if kind == 5 else kind for kind in sentencepiece()["tokenizer.ggml.token_type"]]


def test_the_table_has_llama_cpps_names_and_architectures_have_one_of_them() -> None:
    assert set(RULES) == {*NAMES, "gpt2"}
    assert set(OF_ARCHITECTURE.values()) <= set(RULES)


PIECES = [
    ("falcon", "a12345 7!!", ["a", "123", "45", " ", "7", "!!"]),
    ("default", "x 1234?", ["x", " ", "123", "4", "?"]),
    ("falcon-h1", "userName, ok 12", ["user", "Name", ",", " ok", " ", "1", "2"]),
    ("superbpe", "a 1234567 b", ["a ", "1", "234", "567", " b"]),
    ("afmoe", "1234567 12", ["1", "234", "567", " ", "12"]),
    ("tiny_aya", "1234567 ab", ["1", "234", "567", " ab"]),
    ("gpt-4o", "getUserName's 1234", ["get", "User", "Name's", " ", "123", "4"]),
    ("gigachat", "fooBar/\n", ["foo", "Bar", "/\n"]),
    ("tekken", "getName's 12", ["get", "Name", "'s", " ", "1", "2"]),
    ("kimi-k2", "getName你好 world's", ["get", "Name", "你好", " world's"]),
    ("youtu", "你好，fooBar's 12", ["你好", "，", "foo", "Bar's", " ", "1", "2"]),
    ("deepseek-llm", "a 12 你好!", ["a", " ", "1", "2", " ", "你好", "!"]),
    ("deepseek-llm", "x ʔ𝐀 \n", ["x", " ʔ𝐀", " ", "\n"]),
    ("deepseek-coder", "a, b12\n", ["a", ",", " b", "1", "2", "\n"]),
    ("spark2_5", "foo!\n\n12", ["foo", "!", "\n", "\n", "1", "2"]),
    ("hunyuan-dense", ".method(1234)", [".method", "(", "123", "4", ")"]),
    ("seed-coder", "a!!\n b", ["a", "!!", "\n", " b"]),
    ("qwen2", "a!!\n b", ["a", "!!\n", " b"]),
    ("qwen35", "cafe\u0301x 1", ["caféx", " ", "1"]),
    ("ufakzeka", "İstanbul'da", ["İstanbul", "'da"]),
    ("grok-2", "I'd 12", ["I", "'d", " ", "1", "2"]),
    ("laguna", "a\n\n b", ["a", "\n\n", " b"]),
    ("exaone-moe", "hello big world 12", ["hello big world", " ", "1", "2"]),
    ("bailingmoe", "x\n\n\ny", ["x", "\n\n\n", "y"]),
    ("bailingmoe", "it'S a's", ["it", "'S", " a", "'s"]),
    ("jais-2", "a" + " " * 12 + "b", ["a", " " * 8, " " * 2, " ", " b"]),
    ("minicpm5", "a1234", ["a", "123", "4"]),
    ("bloom", "Hi (you), go", ["Hi", " (", "you", "),", " go"]),
    ("viking", "x12.", ["x", "1", "2", "."]),
    ("chameleon", "a    b<x", ["a", "    ", "b", "<", "x"]),
    ("jais", "we've 12", ["we", "'ve", " 12"]),
    ("mellum2", "v2.10", ["v", "2", ".", "1", "0"]),
]


@pytest.mark.parametrize(("name", "text", "words"), PIECES)
def test_a_rule_cuts_a_text_at_these_places(name: str, text: str, words: list[str]) -> None:
    inner = built(byte_level(name)).backend_tokenizer
    shown = inner.normalizer.normalize_str(text) if inner.normalizer else text
    pieces = inner.pre_tokenizer.pre_tokenize_str(shown)
    assert [shown[start:end] for _, (start, end) in pieces] == words


def test_deepseeks_letters_are_those_with_case_of_the_first_planes() -> None:
    word = Regex(_DEEPSEEK_LLM[1])
    for kept in "aÄßǄʓΩяԯႠḀῼKℵ"[:-1] + "Ａ\U00010400":
        assert pre_tokenizers.Split(word, "removed").pre_tokenize_str(kept) == [], kept
    for left in "ʔƻǀª你1\U0001d400":
        assert len(pre_tokenizers.Split(word, "removed").pre_tokenize_str(left)) == 1, left
