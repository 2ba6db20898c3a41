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
from redwood.server.encoding import Encoders
from redwood.server.errors import ApiError, as_api_error, unavailable, wrong
from redwood.server.generation import Generation
from redwood.server.schema import ChatRequest, CompletionRequest, Request, ResponseFormat
from redwood.server.settings import Settings

if TYPE_CHECKING:
    from redwood.engine.text import Engine
    from redwood.server.grammar import Grammars

_DEADLINE_S = 20.0
_CHARS_PER_TOKEN = 4  # of typical text: an estimate for texts that are not tokenised yet
_ROLES = {"developer": "system"}  # the newer name, which chat templates do not know
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
        self._grammars: Grammars | None = None

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
        given = self._given(request)
        base = self._params(request)
        prompts = await self._prompts(given)
        if request.prediction is not None and request.prediction.content:
            text = request.prediction.content
            base["prediction"] = await self._encoded(text, "prediction", self._engine.encode_part)
        grammar = await self._grammar(request.response_format)
        params = []
        for prompt in prompts:
            for index in range(request.n):
                params.append(self._params_of(base, prompt, request.seed, index, grammar))
        return Generation(
            [prompt for prompt in prompts for _ in range(request.n)],
            params,
            owner=owner,
            trace=request.redwood.trace,
            arrived_s=arrived_s,
        )

    def _given(self, request: Request) -> tuple[Sequence[Any], str]:
        """The prompts, not tokenised yet, and the field that holds them; checks their number."""
        most, field = self._settings.max_choices, "messages"
        given: Sequence[Any]
        if isinstance(request, ChatRequest):
            given = [[_as_message(m) for m in request.messages]]
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
        encode = partial(self._engine.encode, fitting=True)
        made = []
        for each in given:
            if _is_ids(each):
                self._check_length(len(each), field)
            prompt = await self._encoded(each, field, encode)
            self._check_prompt(prompt, field)
            made.append(prompt)
        return made

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
        )

    def _params_of(
        self,
        base: dict[str, Any],
        prompt: Sequence[int],
        seed: int | None,
        index: int,
        grammar: str | None,
    ) -> SamplingParams:
        """The parameters of one choice: with its own seed, token limit and grammar state."""
        changes: dict[str, Any] = {}
        left = self._max_length - len(prompt)
        limits = (left, base["max_tokens"], self._settings.max_output_tokens)
        changes["max_tokens"] = min(limit for limit in limits if limit is not None)
        if seed is not None:
            changes["seed"] = (seed + index) % 2**64
        if grammar is not None and self._grammars is not None:
            changes["logits_processor"] = self._grammars.processor(grammar, len(prompt))
        try:
            return SamplingParams(**{**base, **changes})
        except RedwoodError as error:
            raise as_api_error(error) from error

    async def _grammar(self, wanted: ResponseFormat) -> str | None:
        if wanted.type == "text":
            return None
        loop = asyncio.get_running_loop()
        made = loop.run_in_executor(self._compiler, self._compile, wanted)
        return await _within_deadline(made, "response_format")

    def _compile(self, wanted: ResponseFormat) -> str:
        if self._grammars is None:
            from redwood.server.grammar import Grammars

            engine = self._engine
            self._grammars = Grammars(engine.tokenizer, engine.target.vocab_size, engine.eos_ids)
        return self._grammars.compile(wanted)


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
    if isinstance(prompt, str):
        return len(prompt)
    if _is_ids(prompt):
        return 0
    return sum(len(value) for message in prompt for value in message.values())


def _as_message(message: Any) -> dict[str, str]:
    role = _ROLES.get(message.role, message.role)
    named = {} if message.name is None else {"name": message.name}
    return {"role": role, "content": message.content, **named}
