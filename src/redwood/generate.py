"""Text in, text out: `load` makes an engine from names, `generate` and `stream` answer prompts."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any, Self, TypeGuard, overload

import torch

from redwood.drafting import Drafter, ModelDrafter, NgramDrafter, join_drafters
from redwood.engine import RowEngine, Step, token_list
from redwood.errors import ArgumentError, RedwoodError
from redwood.planning import open_planner
from redwood.sampling import SamplingParams
from redwood.stats import Stats
from redwood.tokenizers import check_same_tokens, eos_ids, load_tokenizer
from redwood.tree import TokenTree

Message = Mapping[str, str]
Prompt = str | Sequence[int] | Sequence[Message]
DEFAULT_BUDGETS = {"eager": {"ngram": 12, "model": 6}, "native": {"ngram": 4, "model": 4}}
"""Nodes per step by backend and drafter: where a pass becomes dear (docs/status.md)."""
DRAFT_VOCAB = 49152
"""Tokens that a model drafter proposes: of 152k, these make nearly all (docs/status.md)."""

DRAFT_WEIGHTS = "draft"
"""Weights of a model drafter: 4 bits, since the target decides what is said."""


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
        if not isinstance(prompt, str) and not _is_chat(prompt):
            try:
                return token_list(prompt)
            except ArgumentError as error:
                raise ArgumentError(
                    "a prompt is a string, token ids, or messages with a role and a content"
                ) from error
        if self.tokenizer is None:
            raise ArgumentError("this engine has no tokenizer: give token ids")
        if isinstance(prompt, str):
            return list(self.tokenizer(_unicode(prompt))["input_ids"])
        if not self.tokenizer.chat_template:
            raise ArgumentError("this model has no chat template: give a string")
        from jinja2 import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in prompt],
                tokenize=False,
                add_generation_prompt=True,
            )
        except TemplateError as error:
            raise ArgumentError(f"the chat template refuses these messages: {error}") from error
        return list(self.tokenizer(_unicode(text), add_special_tokens=False)["input_ids"])

    def add(self, prompt: Prompt, params: SamplingParams | None = None) -> int:
        """Queues a request for `step`, for callers who own the loop; see `RowEngine.add`."""
        return super().add(self.encode(prompt), params)

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
        outputs: dict[int, Output] = {}
        with self._serving(encoded, settings) as served:
            steps: dict[int, list[Step]] = {key: [] for key in served.stats}
            for step in self._steps(served):
                steps[step.request].append(step)
        for key, made in steps.items():
            text = "".join(step.text for step in made)
            tokens = [token for step in made for token in step.token_ids]
            outputs[key] = Output(text, tokens, str(made[-1].finish_reason), served.stats[key])
        answers = list(outputs.values())
        return answers[0] if single else answers

    def stream(self, prompt: Prompt, **params: Any) -> Iterator[Piece]:
        """Yields the answer piece by piece, a step's tokens at a time; arguments as `generate`.

        Closing the iterator frees the row. Wrong arguments raise at once, not at the first piece.
        """
        pieces = self._pieces(self.encode(prompt), _settings(params))
        next(pieces)
        return pieces

    def _pieces(self, prompt: list[int], settings: SamplingParams) -> Iterator[Piece]:
        with self._serving([prompt], settings) as served:
            yield Piece()  # taken by `stream`: a generator that never began could not clean up
            for step in self._steps(served):
                yield Piece.of(step, served.stats[step.request])

    @contextmanager
    def _serving(self, prompts: Sequence[list[int]], settings: SamplingParams) -> Iterator[_Served]:
        """Adds these requests, with an inbox of their own; drops at the end what has not ended."""
        served = _Served()
        try:
            for prompt in prompts:
                key = self.add(prompt, settings)
                served.stats[key] = self.stats(key)
                self._requests[key].inbox = served.inbox
            yield served
        finally:
            for key in served.stats:
                self.cancel(key)

    def _steps(self, served: _Served) -> Iterator[Step]:
        """Yields the steps of these requests until all have ended, whoever makes them."""
        left = set(served.stats)
        while left:
            if not served.inbox:
                if not left <= self._requests.keys():
                    raise RedwoodError("a request was dropped: cancelled, or its step failed")
                self._unclaimed = self.step()
                continue
            step = served.inbox.popleft()
            if step.finish_reason is not None:
                left.remove(step.request)
            yield step


@dataclass
class _Served:
    """Requests of one caller: their statistics by number, and the steps that wait for it."""

    stats: dict[int, Stats] = field(default_factory=dict)
    inbox: deque[Step] = field(default_factory=deque)


def _settings(params: Mapping[str, Any]) -> SamplingParams:
    unknown = sorted(set(params) - set(SamplingParams.names()))
    if unknown:
        raise ArgumentError(
            f"unknown parameter {unknown[0]!r}: known are {', '.join(SamplingParams.names())}"
        )
    return SamplingParams(**params)


def _is_single(prompts: Any) -> bool:
    """A string, token ids (also none) or a list of messages is one prompt."""
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        return getattr(prompts, "ndim", 1) < 2  # a table of token ids is a batch
    return all(isinstance(p, Integral | Mapping) for p in prompts)


def _is_chat(prompt: Any) -> TypeGuard[Sequence[Message]]:
    """Whether this is a list of messages, each with a role and a content that are text."""
    return (
        isinstance(prompt, Sequence)
        and len(prompt) > 0
        and all(
            isinstance(message, Mapping)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
            for message in prompt
        )
    )


def _unicode(text: str) -> str:
    """The text, unless it holds half a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ArgumentError(
            f"the prompt has a lone surrogate at character {error.start}: remove it"
        ) from error
    return text


def load(
    target: str | Path,
    drafter: str | Drafter | Sequence[str | Drafter] | None = None,
    *,
    backend: str = "auto",
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    capacity: int | None = None,
    budget: int | None = None,
    tree: Sequence[int] | None = None,
    law: str = "without_replacement",
    max_rows: int = 64,
    progress: bool = False,
    weights: str | None = None,
    kv: str | None = None,
    threads: int | None = None,
    cpus: Sequence[int] | None = None,
    draft_vocab: int | None = DRAFT_VOCAB,
    draft_weights: str = DRAFT_WEIGHTS,
) -> Engine:
    """Returns an engine for a model, with what drafts for it.

    Args:
        target: a packaged name (`redwood models list`), a folder, a .gguf file or a hub id.
        drafter: None or "none"; "ngram"; a model, named as `target`; several joined with "+", or a
            list: one tree from all of them. Objects with the `Drafter` protocol are taken as they
            are.
        backend, dtype, device: see `redwood.backends.load.open_model`.
        capacity: slots per row, at most the context length, the default.
        budget: nodes scored per step, the root included; None: chosen step by step from measured
            times and what was accepted, and so is which of the drafters works; see `Planner`.
        tree: parents of a static tree for model drafters; see `ModelDrafter`.
        law: how a model drafter draws; see `ModelDrafter`.
        max_rows: requests decoded at once.
        progress: show progress of fetching and converting on stderr.
        weights: of the target on the native backend.
        kv, threads, cpus: of the native backend, for target and drafters; these four as for
            `redwood.backends._native_load.load_native`.
        draft_vocab: tokens that a model drafter proposes on the native backend, the first ones of
            the vocabulary, which are the common ones; None: all. The target's are not touched.
        draft_weights: as `weights`, of model drafters on the native backend: "draft" is 4 bits
            whatever the file holds.
            Other values of these two than the defaults are refused where nothing takes them.

    Raises:
        ModelError: a model that is missing or damaged.
        TokenizerMismatchError: a drafter that speaks other tokens.
        ArgumentError, CapacityError, UnsupportedError: see `open_model`.
    """
    from redwood.backends.load import open_model

    if not isinstance(target, str | Path):
        raise ArgumentError(f"target {target!r} must be the name or the folder of a model")
    options: dict[str, Any] = dict(
        backend=backend,
        dtype=dtype,
        device=device,
        progress=progress,
        weights=weights,
        kv=kv,
        threads=threads,
        cpus=cpus,
    )
    folder, model = open_model(str(target), capacity=capacity, **options)
    tokenizer = load_tokenizer(folder)

    how: dict[str, Any] = dict(
        draft_vocab=draft_vocab, draft_weights=draft_weights, tree=tree, law=law
    )
    parts = _parts(drafter)
    drafters = [
        open_drafter(part, tokenizer, **how, **options) if isinstance(part, str) else part
        for part in parts
    ]
    if tree is not None and not any(isinstance(d, ModelDrafter) for d in drafters):
        raise ArgumentError("tree gives the shape for a model drafter, and there is none")
    joined, planner = join_drafters(drafters), None
    if drafters and budget is None and tree is None:
        named = {p: d for p, d in zip(parts, drafters, strict=True) if isinstance(p, str)}
        planner = open_planner(model, str(target), joined, named, weights=weights, kv=kv, cpus=cpus)
    if not any(isinstance(d, ModelDrafter) for d in drafters):
        _refuse_draft_options(draft_vocab, draft_weights, "no model drafts")
    if budget is None:
        budget = len(tree) if tree is not None else default_budget(drafters, model.name)
    return Engine(
        model,
        joined,
        tokenizer=tokenizer,
        eos_ids=eos_ids(folder, tokenizer),
        budget=budget,
        planner=planner,
        max_rows=max_rows,
    )


def _parts(drafter: str | Drafter | Sequence[str | Drafter] | None) -> list[str | Drafter]:
    if drafter is None:
        return []
    if isinstance(drafter, str):
        drafter = drafter.split("+")
    parts = list(drafter) if isinstance(drafter, Sequence) else [drafter]
    odd = [part for part in parts if not isinstance(part, str) and not hasattr(part, "propose")]
    if odd:
        raise ArgumentError(f"drafter {odd[0]!r} is neither a name nor an object with propose()")
    if "" in parts:
        raise ArgumentError("an empty drafter name: use none, ngram or a model, joined with +")
    return [part for part in parts if part != "none"]


def open_drafter(
    name: str,
    tokenizer: Any,
    *,
    draft_vocab: int | None = DRAFT_VOCAB,
    draft_weights: str = DRAFT_WEIGHTS,
    tree: Sequence[int] | None = None,
    law: str = "without_replacement",
    **options: Any,
) -> NgramDrafter | ModelDrafter:
    """Returns a drafter by its name; arguments as of `load`, `options` those of `open_model`.

    Args:
        tokenizer: of the target.

    Raises: as `load`.
    """
    from redwood.backends.load import open_model

    if name == "ngram":
        return NgramDrafter()
    folder, backend = open_model(name, outputs=draft_vocab, draft_weights=draft_weights, **options)
    if backend.name != "native":
        _refuse_draft_options(draft_vocab, draft_weights, f"the {backend.name} backend runs {name}")
    check_same_tokens(tokenizer, load_tokenizer(folder))
    return ModelDrafter(backend, tree, law=law)


def _refuse_draft_options(draft_vocab: int | None, draft_weights: str, why: str) -> None:
    if draft_vocab not in (None, DRAFT_VOCAB) or draft_weights != DRAFT_WEIGHTS:
        raise ArgumentError(
            f"draft_vocab and draft_weights are for models that draft on the native backend: {why}"
        )


def default_budget(drafters: Sequence[Drafter], backend: str = "eager") -> int:
    """Returns the nodes per step, the root included, that suit these drafters together."""
    budgets = DEFAULT_BUDGETS.get(backend, DEFAULT_BUDGETS["eager"])
    return 1 + sum(budgets.get(d.name, budgets["ngram"]) - 1 for d in drafters)
