"""Tokenizers of GGUF files that are sentencepiece models: pieces with scores, spaces as U+2581."""

from typing import TYPE_CHECKING, Any

from redwood.models._gguf_vocab import BYTE, NORMAL, UNUSED, USER_DEFINED, Facts

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPACE = "\u2581"


def scored_merges(facts: Facts) -> list[tuple[str, str]]:
    """Returns the pairs that make a piece, those of the highest score first.

    Sentencepiece joins the two neighbours whose whole has the highest score. Equal scores (files
    without any) are joined in the order of the ids, which is that of the scores where models have
    both.

    Raises: ModelError for pieces with neither scores nor merges.
    """
    scores = facts.scores
    if scores is None:
        if not facts.merges:
            raise facts.refusal("tokenizer.ggml.scores and merges are both missing")
        return facts.merges
    vocabulary, types = facts.vocabulary, facts.types
    parts = {t: i for t, i in vocabulary.items() if types[i] in (NORMAL, USER_DEFINED)}
    order = sorted(parts.values(), key=lambda index: (-scores[index], index))
    pairs = []
    for index in order:
        piece = facts.tokens[index]
        cuts = (
            (parts[piece[:at]], parts[piece[at:]], at)
            for at in range(1, len(piece))
            if piece[:at] in parts and piece[at:] in parts
        )
        pairs += [(piece[:at], piece[at:]) for _, _, at in sorted(cuts)]
    return pairs


def character_bpe(facts: Facts, merges: list[tuple[str, str]], *, prefix: bool) -> "Tokenizer":
    """Returns a tokenizer that joins characters, those without a piece as bytes.

    Args:
        merges: pairs, the first to be joined first.
        prefix: a space is put before each part of a text that begins it or follows a special token.

    Raises: ModelError if characters without a piece could not be spelled.
    """
    from tokenizers import Tokenizer, models

    if not facts.of_type(BYTE) and "unk" not in facts.ids:  # characters would go without a trace
        raise facts.refusal("it has neither byte tokens nor an unknown token")
    made = Tokenizer(
        models.BPE(
            vocab=dict(facts.vocabulary),
            merges=merges,
            unk_token=facts.text_of("unk"),
            fuse_unk=True,
            byte_fallback=bool(facts.of_type(BYTE)),
        )
    )
    made.normalizer = _normalizer(facts, prefix=prefix)
    made.decoder = _decoder(prefix=prefix)
    return made


def unigram(facts: Facts, *, prefix: bool) -> "Tokenizer":
    """Returns a tokenizer that takes the pieces of the highest sum of scores.

    Raises: ModelError without scores, or without an unknown token.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    if facts.scores is None or "unk" not in facts.ids:
        raise facts.refusal("a t5 tokenizer needs tokenizer.ggml.scores and unknown_token_id")
    usable = (NORMAL, USER_DEFINED, UNUSED)
    scored = list(zip(facts.tokens, facts.scores, facts.types, strict=True))
    least = min((score for _, score, kind in scored if kind in usable), default=0.0)
    pieces = [(token, score if kind in usable else least) for token, score, kind in scored]
    made = Tokenizer(
        models.Unigram(pieces, facts.ids["unk"], byte_fallback=bool(facts.of_type(BYTE)))
    )
    steps: list[Any] = []
    charsmap = facts.get("precompiled_charsmap", list)
    if charsmap:
        steps.append(normalizers.Precompiled(bytes(value & 255 for value in charsmap)))
    if facts.get("remove_extra_whitespaces", bool, False):
        steps += _collapsing()
    if steps:
        made.normalizer = normalizers.Sequence(steps)
    scheme = "always" if prefix else "never"
    made.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False)
    made.decoder = _decoder(prefix=prefix)
    return made


def _collapsing() -> list[Any]:
    from tokenizers import Regex, normalizers

    return [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]


def _normalizer(facts: Facts, *, prefix: bool) -> Any:
    from tokenizers import normalizers

    steps: list[Any] = []
    if facts.get("remove_extra_whitespaces", bool, False):
        steps += _collapsing()
    if prefix:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    return normalizers.Sequence(steps)


def _decoder(*, prefix: bool) -> Any:
    from tokenizers import decoders

    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)
