"""Text in, text out: `load` makes an engine from names, `generate` and `stream` answer prompts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, overload

from redwood.backends.base import Backend
from redwood.drafting import Drafter, ModelDrafter, NgramDrafter, NoDrafter, UnionDrafter
from redwood.engine import RowEngine, Step
from redwood.errors import ArgumentError, ModelError, TokenizerMismatchError
from redwood.sampling import SamplingParams
from redwood.stats import Stats
from redwood.tree import TokenTree

Message = Mapping[str, str]
Prompt = str | Sequence[int] | Sequence[Message]
DEFAULT_BUDGETS = {"ngram": 12, "model": 6}


@dataclass(frozen=True)
class Output:
    """One answer.

    Args:
        text: without special tokens and without the stop string.
        token_ids: as generated; an end-of-sequence token is included.
        finish_reason: "stop" or "length".
        stats: what it cost.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    stats: Stats


class Piece(str):
    """New text of one step: a string that also knows where it came from.

    Attributes: `text` (the string itself), `token_ids` of the step, `num_accepted` of them that had
    been drafted, `finish_reason` (None until the last piece), `tree` and accepted `nodes`, and
    `stats` so far.
    """

    token_ids: list[int]
    num_accepted: int
    finish_reason: str | None
    tree: TokenTree
    nodes: list[int]
    stats: Stats

    @classmethod
    def of(cls, step: Step, stats: Stats) -> Self:
        """Returns the piece for a step."""
        piece = cls(step.text)
        piece.token_ids, piece.num_accepted = step.token_ids, step.num_accepted
        piece.finish_reason, piece.tree, piece.nodes = step.finish_reason, step.tree, step.nodes
        piece.stats = stats
        return piece

    @property
    def text(self) -> str:
        """The text as a plain string."""
        return str(self)


class Engine(RowEngine):
    """A `RowEngine` that takes and gives text; made by `load`.

    Prompts are a string, a list of token ids, a list of chat messages (`role`, `content`), or a
    list of any of these. Keywords are the fields of `SamplingParams`.
    """

    tokenizer: Any

    def encode(self, prompt: Prompt) -> list[int]:
        """Returns the token ids of a prompt; messages go through the model's chat template.

        Raises:
            ArgumentError: no tokenizer, no chat template, messages it refuses, or a prompt of the
                wrong kind.
        """
        if not isinstance(prompt, str):
            items: list[Any] = list(prompt)
            if all(isinstance(item, int) for item in items):
                return items
            if not all(isinstance(item, Mapping) for item in items):
                raise ArgumentError("a prompt is a string, token ids, or messages (role, content)")
        if self.tokenizer is None:
            raise ArgumentError("this engine has no tokenizer: give token ids")
        if isinstance(prompt, str):
            return list(self.tokenizer(prompt)["input_ids"])
        if not self.tokenizer.chat_template:
            raise ArgumentError("this model has no chat template: give a string")
        from jinja2 import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in items],
                tokenize=False,
                add_generation_prompt=True,
            )
        except TemplateError as error:
            raise ArgumentError(f"the chat template refuses these messages: {error}") from error
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @overload
    def generate(self, prompts: str, **params: Any) -> Output: ...
    @overload
    def generate(self, prompts: Sequence[Any], **params: Any) -> Output | list[Output]: ...
    def generate(self, prompts: Any, **params: Any) -> Output | list[Output]:
        """Returns the answer to a prompt, or the answers to a list of prompts, in order.

        Args:
            prompts: see the class.
            params: fields of `SamplingParams`: max_tokens, temperature, top_p, seed, stop, ...

        Raises:
            ArgumentError: an unknown or wrong parameter, an empty prompt.
            CapacityError: a prompt longer than the context.
        """
        settings = _settings(params)
        single = _is_single(prompts)
        encoded = [self.encode(prompt) for prompt in ([prompts] if single else prompts)]
        keys: list[int] = []
        texts: dict[int, list[str]] = {}
        tokens: dict[int, list[int]] = {}
        outputs: dict[int, Output] = {}
        try:
            for prompt in encoded:
                keys.append(self.add(prompt, settings))
                texts[keys[-1]], tokens[keys[-1]] = [], []
            while len(outputs) < len(keys):
                live = {key: self.stats(key) for key in keys if key not in outputs}
                for step in self.step():
                    if step.request not in live:
                        continue
                    texts[step.request].append(step.text)
                    tokens[step.request] += step.token_ids
                    if step.finish_reason is not None:
                        key = step.request
                        text = "".join(texts[key])
                        outputs[key] = Output(text, tokens[key], step.finish_reason, live[key])
        finally:
            for key in keys:
                self.cancel(key)
        return outputs[keys[0]] if single else [outputs[key] for key in keys]

    def stream(self, prompt: Prompt, **params: Any) -> Iterator[Piece]:
        """Yields the answer piece by piece, a step's tokens at a time; arguments as `generate`.

        Closing the iterator frees the row. Wrong arguments raise at once, not at the first piece.
        """
        key = self.add(self.encode(prompt), _settings(params))
        return self._pieces(key, self.stats(key))

    def _pieces(self, key: int, stats: Stats) -> Iterator[Piece]:
        try:
            while True:
                for step in self.step():
                    if step.request == key:
                        yield Piece.of(step, stats)
                        if step.finish_reason is not None:
                            return
        finally:
            self.cancel(key)


def _settings(params: Mapping[str, Any]) -> SamplingParams:
    unknown = sorted(set(params) - set(SamplingParams.names()))
    if unknown:
        raise ArgumentError(
            f"unknown parameter {unknown[0]!r}: known are {', '.join(SamplingParams.names())}"
        )
    return SamplingParams(**params)


def _is_single(prompts: Any) -> bool:
    """A string, a list of token ids (also an empty one) or a list of messages is one prompt."""
    return isinstance(prompts, str) or all(isinstance(p, int | Mapping) for p in prompts)


def load(
    target: str,
    drafter: str | Drafter | Sequence[str | Drafter] | None = None,
    *,
    backend: str = "auto",
    dtype: str = "auto",
    device: str = "auto",
    capacity: int | None = None,
    budget: int | None = None,
    tree: Sequence[int] | None = None,
    law: str = "without_replacement",
    max_rows: int = 64,
    progress: bool = False,
) -> Engine:
    """Returns an engine for a model, with what drafts for it.

    Args:
        target: a packaged name (`redwood models list`), a folder, a .gguf file or a hub id.
        drafter: None or "none"; "ngram"; a model, named as `target`; several joined with "+", or a
            list: one tree from all of them. Objects with the `Drafter` protocol are taken as they
            are.
        backend: "auto" or "eager".
        dtype, device: see `redwood.backends.load.load_backend`.
        capacity: slots per row, at most the context length, the default.
        budget: nodes scored per step, the root included; None: a size that suits the drafters.
        tree: parents of a static tree for model drafters; see `ModelDrafter`.
        law: how a model drafter draws; see `ModelDrafter`.
        max_rows: requests decoded at once.
        progress: show progress of fetching and converting on stderr.

    Raises:
        ModelError: a model that is missing or damaged.
        TokenizerMismatchError: a drafter that speaks other tokens.
        ArgumentError, CapacityError, UnsupportedError: see `load_backend`.
    """
    from redwood.backends.load import load_backend
    from redwood.models import resolve

    folder = resolve(target, progress=progress)
    model = load_backend(folder, backend=backend, dtype=dtype, device=device, capacity=capacity)
    tokenizer = load_tokenizer(folder)

    def draft_model(name: str) -> Backend:
        draft_folder = resolve(name, progress=progress)
        check_same_tokens(tokenizer, load_tokenizer(draft_folder))
        return load_backend(draft_folder, backend=backend, dtype=dtype, device=device)

    drafters = [
        _drafter(part, draft_model, tree, law) if isinstance(part, str) else part
        for part in _parts(drafter)
    ]
    if tree is not None and not any(isinstance(d, ModelDrafter) for d in drafters):
        raise ArgumentError("tree gives the shape for a model drafter, and there is none")
    if budget is None:
        budget = len(tree) if tree is not None else _default_budget(drafters)
    return Engine(
        model,
        _joined(drafters),
        tokenizer=tokenizer,
        eos_ids=eos_ids(folder, tokenizer),
        budget=budget,
        max_rows=max_rows,
    )


def _parts(drafter: str | Drafter | Sequence[str | Drafter] | None) -> list[str | Drafter]:
    if drafter is None:
        return []
    if isinstance(drafter, str):
        drafter = drafter.split("+")
    parts = list(drafter) if isinstance(drafter, Sequence) else [drafter]
    if "" in parts:
        raise ArgumentError("an empty drafter name: use none, ngram or a model, joined with +")
    return [part for part in parts if part != "none"]


def _drafter(name: str, model: Any, tree: Sequence[int] | None, law: str) -> Drafter:
    if name == "ngram":
        return NgramDrafter()
    return ModelDrafter(model(name), tree, law=law)


def _joined(drafters: Sequence[Drafter]) -> Drafter:
    if not drafters:
        return NoDrafter()
    return drafters[0] if len(drafters) == 1 else UnionDrafter(drafters)


def _default_budget(drafters: Sequence[Drafter]) -> int:
    sizes = [DEFAULT_BUDGETS.get(d.name, DEFAULT_BUDGETS["ngram"]) - 1 for d in drafters]
    return 1 + sum(sizes)


def load_tokenizer(folder: Path) -> Any:
    """Returns the Transformers tokenizer of a model folder; no remote code runs.

    Raises:
        ModelError: a folder without a usable tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder} has no usable tokenizer: {error}") from error


def eos_ids(folder: Path, tokenizer: Any) -> list[int]:
    """Returns the tokens that end a text, from tokenizer and generation config."""
    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        with suppress(OSError, ValueError):
            given = json.loads((folder / name).read_text()).get("eos_token_id")
            ids.update([given] if isinstance(given, int) else given or ())
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return sorted(ids)


def check_same_tokens(target: Any, drafter: Any) -> None:
    """Raises TokenizerMismatchError unless equal ids mean equal tokens; the sizes may differ."""
    ours = {index: token for token, index in target.get_vocab().items()}
    theirs = {index: token for token, index in drafter.get_vocab().items()}
    for index in sorted(ours.keys() & theirs.keys()):
        if ours[index] != theirs[index]:
            raise TokenizerMismatchError(
                f"drafter and target use different tokenizers: token {index} is {ours[index]!r} "
                f"for the target and {theirs[index]!r} for the drafter"
            )
    if len(ours.keys() & theirs.keys()) < 0.9 * max(len(ours), len(theirs)):
        raise TokenizerMismatchError(
            f"drafter and target use different tokenizers: {len(theirs)} tokens against {len(ours)}"
        )
