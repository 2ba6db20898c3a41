"""From a request's fields to choices for the engine: tokens, parameters, grammar.

Texts are tokenised (`encoding`) and schemas compiled in threads of their own, with a deadline:
neither the event loop nor the engine waits for them, and a slow schema does not delay a prompt.
The cheap checks of the other fields come first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from redwood.errors import RedwoodError
from redwood.sampling import SamplingParams
from redwood.server.chats import Chats, Conversation
from redwood.server.encoding import Encoders
from redwood.server.errors import ApiError, as_api_error, unavailable, wrong
from redwood.server.generation import Generation
from redwood.server.schema import ChatRequest, CompletionRequest, Request
from redwood.server.settings import Settings
from redwood.server.tools.reading import PlainReader

if TYPE_CHECKING:
    from redwood.engine.text import Engine
    from redwood.server.constraining import Constraint, Constraints

_DEADLINE_S = 20.0
_CHARS_PER_TOKEN = 4  # of typical text: an estimate for texts that are not tokenised yet
T = TypeVar("T")


class Preparer:
    """Prepares requests for one engine.

    Args:
        engine: only its tokenizer and limits are used; `encode` is called in other threads.
    """

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine, self._settings = engine, settings
        self._encoders = Encoders(_CHARS_PER_TOKEN * settings.max_queue_tokens)
        self._compiler = ThreadPoolExecutor(1, "redwood-grammar")
        self._constraints: Constraints | None = None
        self._chats = Chats(engine.tokenizer, settings.tool_parser)

    @property
    def template_options(self) -> list[str]:
        """Names of the variables of the chat template that a request may set."""
        return self._chats.template_options

    def close(self) -> None:
        """Ends the threads."""
        self._encoders.close()
        self._compiler.shutdown(wait=False, cancel_futures=True)

    async def prepare(self, request: Request, owner: str, arrived_s: float) -> Generation:
        """Returns a generation that the worker can take.

        Raises:
            ApiError: 400: the engine would refuse it; 429: too much text is being tokenised;
                503: the deadline has passed.
        """
        base = self._params(request)
        prompts = await self.prompts(request)
        if request.prediction is not None and request.prediction.content:
            text = request.prediction.content
            base["prediction"] = await self._encoded(text, "prediction", self._engine.encode_part)
        constraint = await self._constraint(request)
        eager = constraint is not None and constraint.eager
        params, readers = [], []
        for prompt in prompts:
            processors = await self._processors(constraint, prompt, request)
            for index, processor in enumerate(processors):
                params.append(self._params_of(base, prompt, request.seed, index, processor))
                readers.append(
                    self._chats.reader(request, prompt, eager=eager)
                    if isinstance(request, ChatRequest)
                    else PlainReader()
                )
        return Generation(
            [prompt for prompt in prompts for _ in range(request.n)],
            params,
            readers=readers,
            owner=owner,
            trace=request.redwood.trace,
            arrived_s=arrived_s,
        )

    async def prompts(self, request: Request) -> list[list[int]]:
        """Returns the token ids of a request's prompts.

        Raises: as `prepare`.
        """
        return await self._prompts(self._given(request))

    def _given(self, request: Request) -> tuple[Sequence[Any], str]:
        """The prompts, not tokenised yet, and the field that holds them; checks their number."""
        most, field = self._settings.max_choices, "messages"
        given: Sequence[Any]
        if isinstance(request, ChatRequest):
            given = [self._chats.conversation(request)]
        else:
            assert isinstance(request, CompletionRequest)
            given, field = request.prompts, "prompt"
            if not given or len(given) > most:
                raise wrong(f"prompt must hold 1 to {most} prompts", field)
        count = len(given) * request.n
        if count > most:
            raise wrong(
                f"n times the number of prompts is {count}, at most {most} answers are made per "
                "request",
                "n",
            )
        return given, field

    async def _prompts(self, asked: tuple[Sequence[Any], str]) -> list[list[int]]:
        given, field = asked
        encode = self._encode
        made = []
        for each in given:
            if _is_ids(each):
                self._check_length(len(each), field)
            prompt = await self._encoded(each, field, encode)
            self._check_prompt(prompt, field)
            made.append(prompt)
        return made

    def _encode(self, prompt: Any) -> list[int]:
        if isinstance(prompt, Conversation):
            return self._engine.encode_chat(
                prompt.messages, tools=prompt.tools, options=prompt.options, fitting=True
            )
        return self._engine.encode(prompt, fitting=True)

    async def _encoded(self, text: Any, field: str, encode: Callable[[Any], list[int]]) -> Any:
        return await _within_deadline(self._encoders.run(_size(text), partial(encode, text)), field)

    @property
    def _max_length(self) -> int:
        """Most tokens of a prompt with its answer: the context, or all rows' KV if that is less."""
        engine = self._engine
        return min(engine.target.capacity, engine.kv_tokens or engine.target.capacity)

    def _check_prompt(self, prompt: list[int], field: str) -> None:
        vocab_size = self._engine.target.vocab_size
        if not prompt:
            raise wrong("the prompt is empty: give at least one token", field)
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise wrong(f"token ids must be 0 to {vocab_size - 1}", field)
        self._check_length(len(prompt), field)

    def _check_length(self, length: int, field: str) -> None:
        if length >= self._max_length:
            raise wrong(
                f"there is room for {self._max_length} tokens with the answer, and the prompt has "
                f"{length}: shorten it",
                field,
                "context_length_exceeded",
            )

    def _params(self, request: Request) -> dict[str, Any]:
        """Fields of `SamplingParams` that all choices share, but for the prediction."""
        vocab_size = self._engine.target.vocab_size
        try:
            biases = request.biases
        except ValueError:
            raise wrong("logit_bias must map token ids to numbers", "logit_bias") from None
        if any(not 0 <= token < vocab_size for token in biases):
            raise wrong(f"logit_bias: token ids must be 0 to {vocab_size - 1}", "logit_bias")
        visible = self._chats.visible(request) if isinstance(request, ChatRequest) else []
        return dict(
            temperature=request.temperature,
            top_k=max(0, request.top_k),
            top_p=request.top_p,
            min_p=request.min_p,
            repetition_penalty=request.repetition_penalty,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            logit_bias=biases,
            stop=request.stop,
            ignore_eos=request.ignore_eos,
            logprobs=request.num_logprobs,
            speculate=request.redwood.speculate,
            max_tokens=request.limit,
            cache_salt=request.cache_salt,
            visible_tokens=visible,
        )

    def _params_of(
        self,
        base: dict[str, Any],
        prompt: Sequence[int],
        seed: int | None,
        index: int,
        processor: Any,
    ) -> SamplingParams:
        """The parameters of one choice: with its own seed, token limit and grammar state."""
        changes: dict[str, Any] = {}
        left = self._max_length - len(prompt)
        limits = (left, base["max_tokens"], self._settings.max_output_tokens)
        changes["max_tokens"] = min(limit for limit in limits if limit is not None)
        if seed is not None:
            changes["seed"] = (seed + index) % 2**64
        changes["logits_processor"] = processor
        try:
            return SamplingParams(**{**base, **changes})
        except RedwoodError as error:
            raise as_api_error(error) from error

    async def _constraint(self, request: Request) -> Constraint | None:
        """The grammar of a request; None: its answers are free."""
        called = isinstance(request, ChatRequest) and bool(request.callable_tools)
        if request.response_format.type == "text" and not called:
            return None
        field = "response_format" if request.response_format.type != "text" else "tools"
        return await self._compiled(partial(self._constrain, request), field)

    async def _processors(
        self, constraint: Constraint | None, prompt: list[int], request: Request
    ) -> list[Any]:
        """A logits processor for each answer to a prompt; None where it is free."""
        constraints = self._constraints
        if constraint is None or constraint.grammar is None or constraints is None:
            return [None] * request.n
        make = partial(constraints.processor, constraint, prompt, request)
        return [await self._compiled(make, "response_format") for _ in range(request.n)]

    async def _compiled(self, call: Callable[[], T], field: str) -> T:
        loop = asyncio.get_running_loop()
        return await _within_deadline(loop.run_in_executor(self._compiler, call), field)

    def _constrain(self, request: Request) -> Constraint:
        if self._constraints is None:
            from redwood.server.constraining import Constraints
            from redwood.server.grammar import Grammars

            engine = self._engine
            grammars = Grammars(engine.tokenizer, engine.target.vocab_size, engine.eos_ids)
            self._constraints = Constraints(grammars, self._chats)
        return self._constraints.of(request)


async def _within_deadline(work: Awaitable[T], field: str) -> T:
    """What `work` returns; errors, the passed deadline among them, name the request's field."""
    try:
        async with asyncio.timeout(_DEADLINE_S):
            return await work
    except TimeoutError:
        raise unavailable(f"{field} took too long to read", "preparation_timeout") from None
    except RedwoodError as error:
        sent = as_api_error(error)
        raise ApiError(
            sent.status, sent.message, code=sent.code, param=field, headers=sent.headers
        ) from error


def _is_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], int)


def _size(prompt: Any) -> int:
    """Characters of a text or of messages; 0 for token ids, which need no tokenisation."""
    if isinstance(prompt, Conversation):
        return prompt.size
    return len(prompt) if isinstance(prompt, str) else 0
