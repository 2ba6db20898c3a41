"""Metadata of GGUF files with small real tokenizers, as converters write it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from redwood.models._gguf_vocab import read_facts
from redwood.models.gguf_tokenizer import build_tokenizer

ROOT = Path(__file__).parent.parent
TEXTS = [
    "",
    "Hello world, it's 1234567 and I'LL do 3.14 != 22%",
    "  leading,  inner   and trailing  ",
    "a\n\n\n    b\r\n\tc = d\n",
    "def getUserName(x_1):\n    return HTTPServer[12:345]\n\n1. one\n2. two",
    "你好，世界 12 のテスト 한국어 ไทย",
    "cafe\u0301 caf\u00e9 naïve Ünïcödé м½ x² ٣٤٥",
    "emoji 😀👩‍👩‍👧 ok! …“quoted” — dash",
    "$1,000.50 (a+b)^2 ~ `code` | <tag> #1 @me",
    " 12 345 6",
    "bare <|im_end|> and <|end",
]
END, START = "<|endoftext|>", "<|im_start|>"


@cache
def trained() -> Tokenizer:
    """A byte-level vocabulary with merges across digits, signs and spaces."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", "merged_with_next"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=[END, START, "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sources = [ROOT / "README.md", ROOT / "docs" / "server.md", ROOT / "docs" / "status.md"]
    made.train_from_iterator([path.read_text() for path in sources] + TEXTS * 20, trainer)
    return made


def reference(pre: Any, normalizer: Any = None, *, whole_words: bool = False) -> Tokenizer:
    """The same vocabulary as a model's own fast tokenizer has it, with another splitting."""
    made = Tokenizer.from_str(trained().to_str())
    made.model.ignore_merges = whole_words  # type: ignore[attr-defined]
    made.pre_tokenizer = pre
    if normalizer is not None:
        made.normalizer = normalizer
    made.add_special_tokens([AddedToken(t, normalized=False) for t in (END, START, "<|im_end|>")])
    return made


def byte_level(pre: str | None = "gpt-2", **more: Any) -> dict[str, Any]:
    """Metadata of a file with the trained vocabulary; `more` are keys of `tokenizer.ggml`."""
    import json

    vocabulary = trained().get_vocab()
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    merges = json.loads(trained().to_str())["model"]["merges"]
    about = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "merges": [" ".join(merge) for merge in merges],
        "eos_token_id": 0,
        "add_bos_token": False,
    }
    return ggml({**about, **more})


PIECES = [
    ("<unk>", 0.0, 2),
    ("<s>", 0.0, 3),
    ("</s>", 0.0, 3),
    *((f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)),
    *((piece, -float(rank), 1) for rank, piece in enumerate("▁▁ ▁t he ▁the in ▁a ▁th".split())),
    *((character, -100.0 - rank, 1) for rank, character in enumerate("▁ehtainslrdo<>u")),
    ("<|end|>", -1000.0, 3),
    ("<tool>", -1000.0, 4),
    ("ain", -1000.0, 5),
]


def sentencepiece(**more: Any) -> dict[str, Any]:
    """Metadata of a file with a few pieces; `more` are keys of `tokenizer.ggml`."""
    about = {
        "model": "llama",
        "pre": "default",
        "tokens": [piece for piece, _, _ in PIECES],
        "scores": [score for _, score, _ in PIECES],
        "token_type": [kind for _, _, kind in PIECES],
    }
    return ggml({**about, **more})


def ggml(values: dict[str, Any]) -> dict[str, Any]:
    """Keys of `tokenizer.ggml`; those of None are left out, those with a dot are whole already."""
    return {
        key if "." in key else f"tokenizer.ggml.{key}": value
        for key, value in values.items()
        if value is not None
    }


def built(metadata: dict[str, Any]) -> Any:
    return build_tokenizer(read_facts("small.gguf", metadata))


def ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text)["input_ids"])
