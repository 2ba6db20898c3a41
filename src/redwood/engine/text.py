"""`Engine`: prompts in, text out, by `generate` and `stream`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import Any, Self, TypeGuard, overload

from redwood.engine.engine import RowEngine, Step
from redwood.engine.request import Caller, TokenLogprobs, token_list
from redwood.engine.stats import Stats
from redwood.errors import ArgumentError, CapacityError, RedwoodError, check_process
from redwood.models.chat_template import chat_text
from redwood.models.token_bound import TokenBound
from redwood.sampling import SamplingParams
from redwood.table.keeping import KeptTable
from redwood.tree import TokenTree

Message = Mapping[str, str]
Prompt = str | Sequence[int] | Sequence[Message]


@dataclass(frozen=True)
class Output:
    """One answer.

    Args:
        text: without special tokens and without the stop string.
        token_ids: as generated; an end-of-sequence token is included.
        finish_reason: "stop" or "length".
        stats: of the request.
        logprobs: one entry per token, if asked for.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    stats: Stats
    logprobs: list[TokenLogprobs] | None = None


class Piece(str):
    """New text of one step: a string with the details of its step.

    Attributes: `text` (the string itself), `token_ids` of the step, `num_accepted` of them that had
    been drafted, `finish_reason` (None until the last piece), `tree` and accepted `nodes`, `stats`
    so far, and `logprobs` of the tokens, if asked for.
    """

    token_ids: list[int]
    num_accepted: int
    finish_reason: str | None
    tree: TokenTree
    nodes: list[int]
    stats: Stats
    logprobs: list[TokenLogprobs] | None

    @classmethod
    def of(cls, step: Step, stats: Stats) -> Self:
        """Returns the piece for a step."""
        piece = cls(step.text)
        piece.token_ids, piece.num_accepted = step.token_ids, step.num_accepted
        piece.finish_reason, piece.tree, piece.nodes = step.finish_reason, step.tree, step.nodes
        piece.stats, piece.logprobs = stats, step.logprobs
        return piece

    @property
    def text(self) -> str:
        """The text as a plain string."""
        return str(self)


class Engine(RowEngine):
    """A `RowEngine` that takes and gives text; made by `load`.

    Prompts are a string, a list of token ids, a list of chat messages (`role`, `content`), or a
    list of any of these. Keywords are the fields of `SamplingParams`.

    Attributes:
        kept_tables: of its drafters, that are kept in files.
        closing: what `close` calls.
    """

    tokenizer: Any
    kept_tables: tuple[KeptTable, ...] = ()
    closing: tuple[Callable[[], object], ...] = ()

    def close(self) -> None:
        """Saves what is kept on disk, such as a table, for the last time; may be called twice.

        Happens by itself when the engine is collected and at the end of the process.
        """
        closing, self.closing = self.closing, ()
        for action in closing:
            action()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def encode(self, prompt: Prompt, *, fitting: bool = False) -> list[int]:
        """Returns the token ids of a prompt; messages go through the model's chat template.

        Args:
            fitting: refuse a text that is certainly too long for the context before it is
                tokenised: that takes seconds for megabytes.

        Raises:
            ArgumentError: no tokenizer, no chat template, messages it refuses or leaves out, a
                token that the model lacks, or a prompt of the wrong kind.
            CapacityError: with `fitting`, a text that leaves no room for one token.
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
            self._check_fits(prompt, fitting)
            return self._known_tokens(self._without_end(self._ids(prompt), prompt))
        return self.encode_chat(prompt, fitting=fitting)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        options: Mapping[str, Any] | None = None,
        fitting: bool = False,
    ) -> list[int]:
        """Returns the token ids of a chat, with tools and calls, up to where its answer begins.

        Args:
            messages, tools, options: see `redwood.models.chat_template.chat_text`.
            fitting: as in `encode`.

        Raises: as `encode`.
        """
        if self.tokenizer is None:
            raise ArgumentError("this engine has no tokenizer: give token ids")
        if not self.tokenizer.chat_template:
            raise ArgumentError("this model has no chat template: give a string")
        text = chat_text(
            self.tokenizer, messages, add_generation_prompt=True, tools=tools, options=options
        )
        self._check_fits(text, fitting)
        return self._known_tokens(self._ids(text, add_special_tokens=False))

    def _without_end(self, ids: list[int], prompt: str) -> list[int]:
        """Takes off an end of text that the tokenizer put behind a prompt: an answer follows."""
        end = getattr(self.tokenizer, "eos_token_id", None)
        if end is not None and ids[-1:] == [end] and self.encode_part(prompt)[-1:] != [end]:
            return ids[:-1]
        return ids

    @cached_property
    def _bound(self) -> TokenBound:
        return TokenBound(self.tokenizer)

    def _check_fits(self, text: str, fitting: bool) -> None:
        capacity = self.target.capacity
        if not fitting or len(text) < capacity // 4:  # at most 4 bytes and tokens a character
            return
        least = self._bound.least(_unicode(text))
        if least >= capacity:
            raise CapacityError(
                f"the prompt has at least {least} tokens, the context holds {capacity} with the "
                "answer: shorten the prompt"
            )

    def encode_part(self, text: str) -> list[int]:
        """Returns the token ids of a text that an answer may hold, without special tokens.

        Tokens that the tokenizer has and the model has not are left out: no answer holds them.

        Raises:
            ArgumentError: no tokenizer, or half a surrogate pair.
        """
        if self.tokenizer is None:
            raise ArgumentError("this engine has no tokenizer: give token ids")
        ids = self._ids(text, add_special_tokens=False)
        return [token for token in ids if token < self.target.vocab_size]

    def _ids(self, text: str, **how: Any) -> list[int]:
        return list(self.tokenizer(_unicode(text), **how)["input_ids"])

    def _known_tokens(self, token_ids: list[int]) -> list[int]:
        """The tokens of a text, if the model has all of them: its tokenizer may know more."""
        if max(token_ids, default=0) >= self.target.vocab_size:
            token = self.tokenizer.convert_ids_to_tokens(max(token_ids))
            raise ArgumentError(f"the prompt holds {token}, a token that this model does not have")
        return token_ids

    def add(self, prompt: Prompt, params: SamplingParams | None = None) -> int:
        """Queues a request for `step`, for callers who own the loop; see `RowEngine.add`."""
        return super().add(self.encode(prompt, fitting=True), params)

    @overload
    def generate(self, prompts: str, **params: Any) -> Output: ...
    @overload
    def generate(self, prompts: Sequence[Any], **params: Any) -> Output | list[Output]: ...
    def generate(self, prompts: Any, **params: Any) -> Output | list[Output]:
        """Returns the answer to a prompt, or the answers to a list of prompts, in order.

        Args:
            prompts: see the class.
            params: fields of `SamplingParams`: max_tokens, temperature, top_p, seed, stop, ...; the
                prediction may be text.

        Raises:
            ArgumentError: an unknown or wrong parameter, an empty prompt.
            CapacityError: a prompt longer than the context.
            UnsupportedError: a process forked from the one that made this engine.
        """
        check_process(self._pid)
        settings = self._settings(params)
        single = _is_single(prompts)
        encoded = [
            self.encode(prompt, fitting=True) for prompt in ([prompts] if single else prompts)
        ]
        outputs: dict[int, Output] = {}
        with self._serving(encoded, settings) as served:
            steps: dict[int, list[Step]] = {key: [] for key in served.stats}
            for step in self._steps(served):
                steps[step.request].append(step)
        for key, made in steps.items():
            text = "".join(step.text for step in made)
            tokens = [token for step in made for token in step.token_ids]
            found = [entry for step in made for entry in step.logprobs or ()]
            outputs[key] = Output(
                text,
                tokens,
                str(made[-1].finish_reason),
                served.stats[key],
                None if settings.logprobs is None else found,
            )
        answers = list(outputs.values())
        return answers[0] if single else answers

    def stream(self, prompt: Prompt, **params: Any) -> Iterator[Piece]:
        """Yields the answer piece by piece, a step's tokens at a time; arguments as `generate`.

        Closing the iterator frees the row. Wrong arguments raise at once, not at the first piece.
        """
        check_process(self._pid)
        pieces = self._pieces(self.encode(prompt, fitting=True), self._settings(params))
        next(pieces)
        return pieces

    def _pieces(self, prompt: list[int], settings: SamplingParams) -> Iterator[Piece]:
        with self._serving([prompt], settings) as served:
            yield Piece()  # taken by `stream`: a generator that never began could not clean up
            for step in self._steps(served):
                yield Piece.of(step, served.stats[step.request])

    def _settings(self, params: dict[str, Any]) -> SamplingParams:
        if isinstance(params.get("prediction"), str):
            params = {**params, "prediction": self.encode_part(params["prediction"])}
        return _known(params)

    @contextmanager
    def _serving(self, prompts: Sequence[list[int]], settings: SamplingParams) -> Iterator[Caller]:
        """Adds these requests, with an inbox of their own; drops at the end what has not ended."""
        served = Caller()
        try:
            for prompt in prompts:
                with self._called_by(served):
                    self.add(prompt, settings)
            yield served
        finally:
            for key in served.stats:
                self.cancel(key)

    def _steps(self, served: Caller) -> Iterator[Step]:
        """Yields the steps of these requests until all have ended, from whatever thread."""
        served.unfinished.update(served.stats)
        while served.unfinished:
            dropped = not served.unfinished <= self._requests.keys()  # after its last step
            if not served.inbox:
                if dropped:
                    raise RedwoodError("a request was dropped: cancelled, or its step failed")
                with self._called_by(served):
                    self.step()
                continue
            step = served.inbox.popleft()
            if step.error is not None:
                raise step.error
            if step.finish_reason is not None:
                served.unfinished.remove(step.request)
            yield step


def _known(params: Mapping[str, Any]) -> SamplingParams:
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
