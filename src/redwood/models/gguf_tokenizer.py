"""A fast tokenizer from a GGUF file's own metadata, held against the file.

Byte-level vocabularies ("gpt2") cut a text by the rule of the file's `pre` name (`_gguf_pre`),
those of sentencepiece ("llama", "t5") go by scores (`_gguf_spm`). What is not known is refused by
name: a tokenizer that is nearly right gives a model other tokens than those it learned, and nobody
notices.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redwood.errors import ModelError
from redwood.models import _gguf_pre, _gguf_spm
from redwood.models._gguf import GGUFFile
from redwood.models._gguf_vocab import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    WAY_OUT,
    Facts,
    read_facts,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_NOT_DECODERS = ("bert", "rwkv", "plamo2", "hybriddna", "whitespace")
_PHI3 = re.compile(r"phi[-_ ]?3")
_PHI3_PLAIN = ("<unk>", "<s>", "<|endoftext|>")
_SPECIAL = ("bos", "eos", "unk", "pad")


def read_gguf_facts(source: Path) -> Facts:
    """Returns what a GGUF file says about its tokens.

    Raises: ModelError for a file that is damaged, or without tokens.
    """
    with GGUFFile(source) as file:
        return read_facts(source.name, {key: file.metadata[key] for key in _ours(file.metadata)})


def build_tokenizer(facts: Facts) -> Any:
    """Returns a file's tokenizer, a `PreTrainedTokenizerFast` of Transformers.

    Lines for the user are added to `facts.notes`; `facts.types` are mended where they are wrong.

    Raises: ModelError for a kind of tokenizer, or a splitting rule, that is not known; for one that
        does not hold against the file.
    """
    from transformers import PreTrainedTokenizerFast

    inner, reachable, add_bos, add_eos = _build(facts)
    facts.promote(reachable)
    _add_tokens(facts, inner)
    _add_ends(facts, inner, add_bos, add_eos)
    names = {f"{name}_token": facts.text_of(name) for name in _SPECIAL if _is_special(facts, name)}
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, clean_up_tokenization_spaces=False, **names
    )
    if facts.templates:
        alone = list(facts.templates) == ["default"]
        made.chat_template = facts.templates["default"] if alone else dict(facts.templates)
    hold_against(made, facts)
    return made


def hold_against(tokenizer: Any, facts: Facts) -> None:
    """Checks that a tokenizer spells every id as the file does, and back, and ends as it does.

    Raises: ModelError, naming what does not hold.
    """
    inner, size = tokenizer.backend_tokenizer, len(facts.tokens)
    if len(tokenizer) != size:
        raise facts.refusal(f"the tokenizer made from it has {len(tokenizer)} tokens, not {size}")
    for index, token in enumerate(facts.tokens):
        spelled, found = inner.id_to_token(index), inner.token_to_id(token)
        if spelled != token or found != index:
            raise facts.refusal(
                f"token {index} is {token!r}, and the tokenizer made from it has {spelled!r} there "
                f"and that token at {found}"
            )
    for name in _SPECIAL:
        wanted = facts.ids[name] if _is_special(facts, name) else None
        if (held := getattr(tokenizer, f"{name}_token_id")) != wanted:
            raise facts.refusal(f"its {name} token is {wanted}, in the tokenizer made it is {held}")


def check_same_spelling(tokenizer: Any, source: Path) -> None:
    """Checks that a tokenizer given in place of a file's own means the same by its ids.

    A few may differ: names of tokens that were kept free are changed in training.

    Raises: ModelError, naming the first that differs, if more than one in a hundred does.
    """
    with GGUFFile(source) as file:
        listed = file.metadata.get("tokenizer.ggml.tokens", [])
    ours = dict(enumerate(listed if isinstance(listed, list) else []))
    theirs = {index: token for token, index in tokenizer.get_vocab().items()}
    both = ours.keys() & theirs.keys()
    wrong = [index for index in sorted(both) if ours[index] != theirs[index]]
    if len(wrong) > len(both) // 100 or len(both) < 0.9 * len(ours):
        first = next(iter(wrong), len(theirs))
        raise ModelError(
            f"the tokenizer given is not that of {source.name}: token {first} is "
            f"{ours.get(first)!r} in the file and {theirs.get(first)!r} in the tokenizer"
        )


def _ours(metadata: Mapping[str, Any]) -> list[str]:
    return [key for key in metadata if key.startswith("tokenizer.") or key in _ALSO]


_ALSO = ("general.architecture", "general.name")


def _build(facts: Facts) -> tuple["Tokenizer", set[str], bool, bool]:
    """Returns the tokenizer, tokens that merging arrives at, and whether BOS and EOS are added."""
    from tokenizers import models

    model = facts.model
    add_prefix = facts.get("add_space_prefix", bool)
    if model in ("gpt2", "gemma4"):
        rule = _rule(facts)
        if not facts.merges:
            raise facts.refusal("tokenizer.ggml.merges is missing")
        reachable = {first + second for first, second in facts.merges}
        if not rule.byte_level:
            inner = _gguf_spm.character_bpe(facts, facts.merges, prefix=bool(add_prefix))
            return inner, reachable, rule.add_bos, False
        bare = rule.patterns == (_gguf_pre.GPT2,)  # elsewhere the models' own do not ask it
        prefix = rule.space_prefix if add_prefix is None or not bare else bool(add_prefix)
        bpe = models.BPE(
            vocab=dict(facts.vocabulary), merges=facts.merges, ignore_merges=rule.whole_words
        )
        return _byte_level(bpe, rule, prefix=prefix), reachable, rule.add_bos, False
    if model == "llama":
        merges = _gguf_spm.scored_merges(facts)
        inner = _gguf_spm.character_bpe(facts, merges, prefix=add_prefix is not False)
        return inner, {first + second for first, second in merges}, True, False
    if model == "t5":
        every = set(facts.tokens) if facts.typed else set()
        return _gguf_spm.unigram(facts, prefix=add_prefix is not False), every, False, True
    known = "is not for models that write" if model in _NOT_DECODERS else "is not known"
    raise facts.refusal(f"tokenizer.ggml.model {model!r} {known} (gpt2, llama, gemma4 and t5 are)")


def _rule(facts: Facts) -> _gguf_pre.Rule:
    name = "gemma4" if facts.model == "gemma4" else facts.pre
    if not name:
        architecture = str(facts.metadata.get("general.architecture"))
        name = _gguf_pre.OF_ARCHITECTURE.get(architecture, "default")
        facts.notes.append(
            f"{facts.file} is of an old kind and names no tokenizer.ggml.pre: its texts are split "
            f"as {name!r}, which may not be as its model learned; {WAY_OUT}"
        )
    if name not in _gguf_pre.RULES:
        raise facts.refusal(f"tokenizer.ggml.pre {name!r} is not known")
    return _gguf_pre.RULES[name]


def _byte_level(bpe: Any, rule: _gguf_pre.Rule, *, prefix: bool) -> "Tokenizer":
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers

    made = Tokenizer(bpe)
    if rule.nfc:
        made.normalizer = normalizers.NFC()
    if prefix:
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)
    else:
        steps: list[Any] = [
            pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in rule.patterns
        ]
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        steps += [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in rule.of_bytes]
        made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    made.decoder = decoders.ByteLevel()
    return made


def _add_tokens(facts: Facts, inner: "Tokenizer") -> None:
    """Makes tokens of their own of those that stand for themselves wherever a text spells them."""
    from tokenizers import AddedToken

    # Phi-3's own swallow the line break behind them; no key of the format says so.
    name = str(facts.metadata.get("general.name", "")).lower()
    strips = facts.model == "llama" and _PHI3.search(name) is not None
    added = [
        AddedToken(
            token,
            special=kind != USER_DEFINED,
            normalized=False,
            rstrip=strips and token not in _PHI3_PLAIN,
        )
        for token, kind in zip(facts.tokens, facts.types, strict=True)
        if kind in (CONTROL, UNKNOWN, USER_DEFINED)
    ]
    if facts.model == "gemma4":  # runs of line breaks are tokens, even where no merge makes them
        made = {first + second for first, second in facts.merges}
        added += [
            AddedToken(token, special=False, normalized=False)
            for token in facts.of_type(NORMAL)
            if len(token) > 1 and not token.strip("\n") and token not in made
        ]
    inner.add_tokens(added)


def _add_ends(facts: Facts, inner: "Tokenizer", add_bos: bool, add_eos: bool) -> None:
    """Makes a text begin with BOS and end with EOS where the file says so, or by default."""
    from tokenizers import processors

    pieces: list[str] = ["$A"]
    tokens = []
    for name, default, first in (("bos", add_bos, True), ("eos", add_eos, False)):
        told = facts.get(f"add_{name}_token", bool)
        forced = name == "bos" and facts.model == "gemma4"
        if not (forced or (default if told is None else told)):
            continue
        if name not in facts.ids:
            if not told:
                continue
            raise facts.refusal(f"add_{name}_token is true, and there is no {name}_token_id")
        pieces.insert(0 if first else len(pieces), name)
        tokens.append({"id": name, "ids": [facts.ids[name]], "tokens": [facts.text_of(name)]})
    if tokens:
        inner.post_processor = processors.TemplateProcessing(single=pieces, special_tokens=tokens)


def _is_special(facts: Facts, name: str) -> bool:
    """Whether a special id is a token that no text becomes: others keep their place in texts."""
    return name in facts.ids and facts.types[facts.ids[name]] != NORMAL
