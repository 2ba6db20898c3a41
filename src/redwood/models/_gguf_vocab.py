"""What a GGUF file says about its tokens: texts, kinds, merges or scores, special ids, ends."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from redwood.errors import ModelError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of tokens, as `tokenizer.ggml.token_type` numbers them."""

WAY_OUT = "give a folder with the model's own tokenizer: --tokenizer FOLDER"

_LONGEST = 4096
"""Characters of a token: the ways to cut it in two are tried."""

_NO_ID = (-1, 0xFFFFFFFF)
_IDS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "eot": "eot", "eom": "eom"}
_NEEDED_IDS = ("bos", "eos", "eot", "eom")
_DEFAULT_IDS = {
    "llama": {"bos": 1, "eos": 2, "unk": 0},
    "t5": {"eos": 1, "unk": 2, "pad": 0},
}
_ENDS = (
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|end|>",
    "<end_of_turn>",
    "<turn|>",
    "<|tool_response>",
    "<eos>",
    "</s>",
    "<|return|>",
    "<|call|>",
    "<|calls|>",
    "<|flush|>",
    "<|EOT|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "[e~[",
    "<end_of_utterance>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
)
"""Tokens that end an answer wherever a vocabulary has them as control tokens."""

# With these beside it, the last one of the row only ends a part of an answer.
_PARTS = (
    ({"<|return|>", "<|call|>"}, "<|end|>"),
    ({"<|calls|>", "<|flush|>"}, "<|end|>"),
    ({"<|tool_response>"}, "</s>"),
)


@dataclass
class Facts:
    """The part of a file's metadata that makes its tokenizer.

    Attributes:
        file: its name, for messages.
        model, pre: `tokenizer.ggml.model` and `.pre`; "" where there is none.
        tokens: their texts, by id; all differ.
        types: their kinds, by id.
        typed: whether the file says them.
        ids: of "bos", "eos", "unk", "pad", "eot", "eom", where the file has them.
        templates: chat templates by name; the one without a name is "default".
        notes: lines for the user.
    """

    file: str
    metadata: Mapping[str, Any]
    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    typed: bool
    ids: dict[str, int]
    templates: dict[str, str]
    notes: list[str] = field(default_factory=list)

    def refusal(self, what: str) -> ModelError:
        """Returns the error of a tokenizer that cannot be made from the file."""
        return ModelError(f"{self.file}: {what}; {WAY_OUT}")

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """Returns `tokenizer.ggml.KEY`.

        Raises: ModelError if it is of another type.
        """
        return _get(self.file, self.metadata, f"tokenizer.ggml.{key}", kind, default)

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Text to id."""
        return {token: index for index, token in enumerate(self.tokens)}

    @cached_property
    def scores(self) -> list[float] | None:
        """By id, or None where the file has none."""
        given = self.get("scores", list)
        if given is None:
            return None
        if len(given) != len(self.tokens) or not all(isinstance(s, int | float) for s in given):
            raise self.refusal(f"{len(given)} tokenizer.ggml.scores for {len(self.tokens)} tokens")
        return [float(score) for score in given]

    @cached_property
    def merges(self) -> list[tuple[str, str]]:
        """Pairs of tokens in the order in which they are joined; [] where the file has none.

        Raises: ModelError, naming it, for one whose parts or whole are no tokens.
        """
        pairs = []
        for merge in dict.fromkeys(self.get("merges", list, [])):
            cut = merge.find(" ", 1)  # the first part may be a space
            pair = (merge[:cut], merge[cut + 1 :])
            if cut < 0 or not all(part in self.vocabulary for part in (*pair, "".join(pair))):
                raise self.refusal(f"the merge {merge!r} joins what are no tokens")
            pairs.append(pair)
        return pairs

    def of_type(self, *types: int) -> list[str]:
        """Returns the tokens of these kinds, in the order of their ids."""
        return [t for t, kind in zip(self.tokens, self.types, strict=True) if kind in types]

    def text_of(self, name: str) -> str | None:
        """Returns the special token of this name, such as "bos"."""
        return self.tokens[self.ids[name]] if name in self.ids else None

    def promote(self, reachable: set[str]) -> None:
        """Makes control tokens of those that must be: ends and special ids that no text becomes.

        Files made by early converters have no types, or wrong ones.

        Args:
            reachable: tokens that merging may arrive at.
        """
        named = [self.vocabulary[end] for end in _ENDS if end in self.vocabulary]
        for index in [*self.ids.values(), *named]:
            token = self.tokens[index]
            alone = token not in reachable and len(token) > 1
            if self.types[index] == NORMAL and (alone or (not self.typed and token[0] in "<[")):
                self.types[index] = CONTROL

    def ends(self) -> list[int]:
        """Returns the ids that end an answer: those that the file names, then known ones."""
        found = {self.ids[name]: None for name in ("eos", "eot", "eom") if name in self.ids}
        known = [end for end in _ENDS if end in self.vocabulary]
        marks = {
            end for end in known if self.types[self.vocabulary[end]] in (CONTROL, USER_DEFINED)
        }
        for end in known:
            part = any(beside <= marks and end == last for beside, last in _PARTS)
            if end in marks and not part:
                found[self.vocabulary[end]] = None
        return list(found)


def read_facts(file: str, metadata: Mapping[str, Any]) -> Facts:
    """Returns what a file's metadata says about its tokens.

    Raises: ModelError for a file without tokens, or with metadata that cannot be.
    """
    model = _get(file, metadata, "tokenizer.ggml.model", str, "")
    tokens = _get(file, metadata, "tokenizer.ggml.tokens", list, [])
    if not tokens or model in ("none", "no_vocab"):
        raise ModelError(f"{file} holds no tokenizer; {WAY_OUT}")
    if not all(isinstance(token, str) for token in tokens):
        raise ModelError(f"{file}: tokenizer.ggml.tokens holds other things than texts; {WAY_OUT}")
    tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(tokens)]
    if fault := _token_fault(tokens):
        raise ModelError(f"{file}: {fault}; {WAY_OUT}")
    types = _get(file, metadata, "tokenizer.ggml.token_type", list)
    typed = types is not None
    if typed and len(types) != len(tokens):
        raise ModelError(f"{file}: {len(types)} token types for {len(tokens)} tokens; {WAY_OUT}")
    known = {NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE}
    kinds = (
        [kind if kind in known else NORMAL for kind in types] if typed else [NORMAL] * len(tokens)
    )
    pre = _get(file, metadata, "tokenizer.ggml.pre", str, "")
    facts = Facts(file, metadata, model, pre, tokens, kinds, typed, {}, _templates(file, metadata))
    facts.ids.update(_ids(facts))
    return facts


def _get(file: str, metadata: Mapping[str, Any], key: str, kind: Any, default: Any = None) -> Any:
    if key not in metadata:
        return default
    value = metadata[key]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ModelError(f"{file}: {key} is {str(value)[:40]!r}, which cannot be; {WAY_OUT}")
    return value


def _token_fault(tokens: list[str]) -> str | None:
    first: dict[str, int] = {}
    for index, token in enumerate(tokens):
        if (other := first.setdefault(token, index)) != index:
            return f"the tokens {other} and {index} are both {token[:80]!r}"
        if len(token) > _LONGEST:
            return f"token {index} has {len(token)} characters"
    return None


def _ids(facts: Facts) -> dict[str, int]:
    size, ids = len(facts.tokens), {}
    for name, index in _DEFAULT_IDS.get(facts.model, {}).items():
        if index < size:
            ids[name] = index
    for name, key in _IDS.items():
        index = facts.get(f"{key}_token_id", int)
        if index is None:
            continue
        if 0 <= index < size:
            ids[name] = index
        elif index in _NO_ID:
            ids.pop(name, None)
        elif name in _NEEDED_IDS:
            raise facts.refusal(
                f"tokenizer.ggml.{key}_token_id is {index}, and there are {size} tokens"
            )
    return ids


def _templates(file: str, metadata: Mapping[str, Any]) -> dict[str, str]:
    prefix = "tokenizer.chat_template"
    found = {}
    for key in metadata:
        if key == prefix or key.startswith(f"{prefix}."):
            name = key[len(prefix) + 1 :] or "default"
            found[name] = _get(file, metadata, key, str)
    return found
