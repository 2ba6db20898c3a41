"""How byte-level vocabularies cut a text into words before merging: one rule for each name that
`tokenizer.ggml.pre` may have.

The names are those that llama.cpp knows (November 2026). A rule is the one of the models' own fast
tokenizer; where a comment says so, llama.cpp approximates it by another. Patterns are in the syntax
of the `tokenizers` library (Oniguruma), and each cuts the pieces that the one before it left.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Rule:
    """How a text becomes words.

    Attributes:
        patterns: what they match stands alone, and so does what lies between.
        of_bytes: the same for the text as bytes in GPT-2's alphabet, where some of the bytes of
            other characters look like digits.
        nfc: the text is composed first (Unicode's form C).
        whole_words: a word that is a token is that token, whatever the merges say.
        add_bos: the file need not say so for a text to begin with the BOS token.
        space_prefix: a space is put before a text that begins without one; of GPT-2's rule only.
        byte_level: words are bytes in GPT-2's alphabet; else characters, spaces as U+2581.
    """

    patterns: tuple[str, ...]
    of_bytes: tuple[str, ...] = ()
    nfc: bool = False
    whole_words: bool = False
    add_bos: bool = False
    space_prefix: bool = False
    byte_level: bool = True


_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"
_DIGITS = r"\p{N}+"
_TO_THREE = r"\p{N}{1,3}"
_LLAMA3 = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_SIGNS}|{_SPACES}"
_QWEN2 = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_SIGNS}|{_SPACES}"
_QWEN35 = (
    rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)

_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"


def _cased(end: str, digits: str, slash: str, but: str = "") -> str:
    """Words whose capitals come first, so that "userName" is two of them."""
    before, upper, lower = r"[^\r\n\p{L}\p{N}]?", f"[{_UPPER}{but}]", f"[{_LOWER}{but}]"
    return (
        rf"{before}{upper}*{lower}+{end}|{before}{upper}+{lower}*{end}|{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n{slash}]*|{_SPACES}"
    )


_TEKKEN = _cased("", _DIGIT, "/")
_GPT4O = _cased(f"{_ENDINGS}?", _TO_THREE, "/")
_YOUTU = _cased(f"{_ENDINGS}?", _DIGIT, "/")
_KIMI = r"\p{Han}+|" + _cased(f"{_ENDINGS}?", _TO_THREE, "", r"&&[^\p{Han}]")

_ASCII_SIGN = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""
_PUNCTUATION = r"[\p{P}$+<=>^`|~]+"
_KANA_HAN = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_HAN_HANGUL = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK3 = (
    rf"{_ASCII_SIGN}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)
_SPARK = (
    rf"{_ASCII_SIGN}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
    r"| ?[\p{P}\p{S}]+|[\r\n]|\s+(?!\S)|\s+"
)
_DEEPSEEK_LLM = (
    r"[\r\n]",
    # Letters with case, but for the mathematical ones.
    r"\s?[\p{Lu}\p{Ll}\p{Lt}&&[^\x{1D400}-\x{1D7FF}]]+",
    r"\s?[!-/:-~\uFF01-\uFF0F\uFF1A-\uFF5E\u2018-\u201F\u3000-\u3002]+",
    r"\s+$",
    _HAN_HANGUL,
    _DIGIT,
)
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_THREES = r"\d{1,3}(?=(?:\d{3})*\b)"
_LONG_SPACES = "|".join(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4))

_YOUTU_SCRIPTS = (
    "[\uac00-\ud7a3\u3131-\u318e]+"
    "|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
    "|[\u3105-\u312f]+|[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
)
_ASIAN_SCRIPTS = (
    "[\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf"
    "\u0e40-\u0e7f\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff"
    "\uac00-\ud7af\u1100-\u11ff]+"
)

_PLAIN = Rule((GPT2,))
_DIGITS_APART = Rule((_DIGIT, GPT2))
_OF_LLAMA3 = Rule((_LLAMA3,), whole_words=True, add_bos=True)
_OF_QWEN2 = Rule((_QWEN2,))
_OF_GPT4O = Rule((_GPT4O,))
_OF_DEEPSEEK3 = Rule((_TO_THREE, _KANA_HAN, _DEEPSEEK3))
_OF_BLOOM = Rule((_BLOOM,))
_BAILING = Rule(
    (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
        r"|\s*[\r\n]|\s+(?!\S)|\s+",
    )
)
_TINY_AYA = Rule((_THREES, _GPT4O))
_CHARACTERS = Rule((), byte_level=False)

_FALCON = (_PUNCTUATION, GPT2)
_HUNDREDS = "[0-9][0-9][0-9]"

_GROUPS: tuple[tuple[str, Rule], ...] = (
    ("default", Rule((*_FALCON, _DIGITS, _HUNDREDS))),  # llama.cpp's own, where no name is given
    ("falcon", Rule(_FALCON, (_DIGITS, _HUNDREDS))),  # of characters
    ("falcon3", Rule(_FALCON, (_DIGIT,), whole_words=True, add_bos=True)),  # Llama 3's
    ("falcon-h1", Rule((_PUNCTUATION, _TEKKEN), whole_words=True, add_bos=True)),  # Llama 3's
    ("llama3 llama-v3 llama-bpe pixtral midm-2.0 lfm2 jina-v5-nano", _OF_LLAMA3),
    ("dbrx smaug-bpe glm4 chatglm-bpe", Rule((_LLAMA3,))),
    ("minicpm5", Rule((_TO_THREE, _LLAMA3.replace("{1,3}", "+")), whole_words=True)),
    (
        "jais-2",
        Rule(
            (_LLAMA3.removesuffix(r"|\s+(?!\S)|\s+") + rf"|{_LONG_SPACES}|\s{{1,2}}(?!\S)|\s{{1}}",)
        ),
    ),
    ("qwen2", Rule((_QWEN2,), nfc=True)),
    ("qwen35", Rule((_QWEN35,), nfc=True)),
    ("stablelm2", Rule((_QWEN2,), nfc=True)),
    ("deepseek-r1-qwen kormo f2llmv2 megrez hunyuan solar-open grok-2", _OF_QWEN2),
    ("ufakzeka", Rule((_QWEN2.removeprefix(f"{_ENDINGS}|"),))),
    ("laguna", Rule((r"[^\n]+|[\n]+", _QWEN2))),
    ("seed-coder", Rule((_QWEN2.replace(_SIGNS, r" ?[^\s\p{L}\p{N}\r\n]+"),))),
    ("bailingmoe bailingmoe2 llada-moe", _BAILING),
    (
        "exaone-moe",
        Rule(
            (
                rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+"
                r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
            )
        ),
    ),
    ("tekken", Rule((_TEKKEN,), whole_words=True, add_bos=True)),
    ("gpt-4o llama4 kanana2 talkie minimax-m2", _OF_GPT4O),
    ("gigachat", _OF_GPT4O),  # GPT-2's
    ("granite-embed-multi-97m", Rule((_GPT4O,), whole_words=True)),
    ("tiny_aya cohere2moe", _TINY_AYA),
    ("youtu", Rule((_YOUTU_SCRIPTS, _YOUTU), whole_words=True)),
    ("kimi-k2", Rule((_KIMI,))),  # words without regard to case
    ("deepseek-v3 hunyuan-dense joyai-llm hy_v4", _OF_DEEPSEEK3),
    ("spark2_5", Rule((_TO_THREE, _KANA_HAN, _SPARK, _DIGIT))),
    ("deepseek-llm", Rule(_DEEPSEEK_LLM)),  # digits in runs
    (
        "deepseek-coder",
        Rule((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN_HANGUL, _DIGIT)),
    ),
    ("afmoe", Rule((r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))", _ASIAN_SCRIPTS, _DEEPSEEK3))),
    ("superbpe", Rule((_DIGITS, r"(?=(\d{3})+(?!\d))"))),
    ("command-r", Rule((_DIGIT, GPT2), nfc=True)),
    ("starcoder refact smollm codeshell exaone mellum2", _DIGITS_APART),
    ("minerva-7b", Rule((GPT2,), space_prefix=True)),  # digits apart
    ("mpt olmo", Rule((GPT2,), nfc=True)),
    ("gpt-2 gpt2 phi-2 jina-es jina-de jina-v2-es jina-v2-de jina-v1-en jina-v2-code", _PLAIN),
    ("roberta-bpe a.x-4.0 mellum modern-bert exaone4 jais trillion granite-docling", _PLAIN),
    ("poro-chat bloom gpt3-finnish", _OF_BLOOM),
    ("viking", Rule((_BLOOM, _DIGIT))),
    (
        "chameleon",
        Rule(
            (
                r"<sentinel:[0-9]+>",
                r"(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
                r"([\t\n]|    |  )",
                _DIGIT,
                r"[\p{P}!-/:-@\[-`{-~]",
                GPT2,
            ),
            add_bos=True,
        ),
    ),
    ("gemma4 granite-embed-multi-311m", Rule((), byte_level=False, add_bos=True)),
    ("sarvam-moe", _CHARACTERS),
)

RULES: Mapping[str, Rule] = MappingProxyType(
    {name: rule for names, rule in _GROUPS for name in names.split()}
)
"""By the value of `tokenizer.ggml.pre`."""

OF_ARCHITECTURE: Mapping[str, str] = MappingProxyType(
    {
        "gpt2": "gpt-2",
        "phi2": "phi-2",
        "qwen2": "qwen2",
        "qwen2moe": "qwen2",
        "qwen3": "qwen2",
        "falcon": "falcon",
        "mpt": "mpt",
        "bloom": "bloom",
        "refact": "refact",
        "starcoder": "starcoder",
        "starcoder2": "starcoder",
        "codeshell": "codeshell",
        "command-r": "command-r",
        "olmo": "olmo",
        "gptneox": "olmo",
        "dbrx": "dbrx",
        "chatglm": "chatglm-bpe",
        "exaone": "exaone",
        "jais": "jais",
    }
)
"""The rule of old files that name none, where all models of an architecture have the same."""
