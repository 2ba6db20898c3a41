"""From a request's fields to choices for the engine: tokens, parameters, grammar.

Texts are tokenised and schemas compiled in a thread each, with a deadline: neither the event loop
nor the engine waits for them, and a slow schema stops no prompt.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from redwood.errors import RedwoodError
from redwood.sampling import SamplingParams
from redwood.server.errors import ApiError, as_api_error, unavailable, wrong
from redwood.server.generation import Generation
from redwood.server.schema import ChatRequest, CompletionRequest, Request, ResponseFormat
from redwood.server.settings import Settings

if TYPE_CHECKING:
    from redwood.generate import Engine
    from redwood.server.grammar import Grammars

_DEADLINE_S = 20.0
_ROLES = {"developer": "system"}  # a newer name, which chat templates do not know
T = TypeVar("T")


class Preparer:
    """Prepares requests for one engine.

    Args:
        engine: `encode` is used, from a thread of its own.
    """

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine, self._settings = engine, settings
        self._encoder = ThreadPoolExecutor(1, "redwood-encode")
        self._compiler = ThreadPoolExecutor(1, "redwood-grammar")
        self._grammars: Grammars | None = None

    def close(self) -> None:
        """Ends the threads."""
        for pool in (self._encoder, self._compiler):
            pool.shutdown(wait=False, cancel_futures=True)

    async def prepare(self, request: Request, owner: str, arrived_s: float) -> Generation:
        """Returns a generation that the worker can take.

        Raises:
            ApiError: 400 for what the engine would refuse, 503 past the deadline.
        """
        prompts = await self._prompts(request)
        count = len(prompts) * request.n
        if count > self._settings.max_choices:
            raise wrong(
                f"n times the number of prompts is {count}, at most {self._settings.max_choices} "
                "answers are made per request",
                "n",
            )
        base = await self._params(request)
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

    async def _prompts(self, request: Request) -> list[list[int]]:
        given: Sequence[Any]
        field = "messages"
        if isinstance(request, ChatRequest):
            given = [[_as_message(m) for m in request.messages]]
        else:
            assert isinstance(request, CompletionRequest)
            given, field = request.prompts, "prompt"
            if not given or len(given) > self._settings.max_choices:
                raise wrong(f"prompt must hold 1 to {self._settings.max_choices} prompts", field)
        made = [await self._run(self._encoder, field, self._engine.encode, each) for each in given]
        for prompt in made:
            self._check_prompt(prompt, field)
        return made

    def _check_prompt(self, prompt: list[int], field: str) -> None:
        vocab_size, capacity = self._engine.target.vocab_size, self._engine.target.capacity
        if not prompt:
            raise wrong("the prompt is empty: give at least one token", field)
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise wrong(f"token ids must be 0 to {vocab_size - 1}", field)
        if len(prompt) >= capacity:
            raise wrong(
                f"this model's context holds {capacity} tokens with the answer, and the prompt has "
                f"{len(prompt)}: shorten it",
                field,
                "context_length_exceeded",
            )

    async def _params(self, request: Request) -> dict[str, Any]:
        """Fields of `SamplingParams` that all choices share."""
        vocab_size = self._engine.target.vocab_size
        try:
            biases = request.biases
        except ValueError:
            raise wrong("logit_bias must map token ids to numbers", "logit_bias") from None
        if any(not 0 <= token < vocab_size for token in biases):
            raise wrong(f"logit_bias: token ids must be 0 to {vocab_size - 1}", "logit_bias")
        expected: Sequence[int] = ()
        if request.prediction is not None and request.prediction.content:
            text = request.prediction.content
            expected = await self._run(self._encoder, "prediction", self._engine.encode_part, text)
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
            prediction=expected,
            max_tokens=request.limit,
        )

    def _params_of(
        self,
        base: dict[str, Any],
        prompt: Sequence[int],
        seed: int | None,
        index: int,
        grammar: str | None,
    ) -> SamplingParams:
        """The parameters of one choice: its seed, its room, its own grammar."""
        changes: dict[str, Any] = {}
        room = self._engine.target.capacity - len(prompt)
        limits = (room, base["max_tokens"], self._settings.max_output_tokens)
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
        return await self._run(self._compiler, "response_format", self._compile, wanted)

    def _compile(self, wanted: ResponseFormat) -> str:
        if self._grammars is None:
            from redwood.server.grammar import Grammars

            engine = self._engine
            self._grammars = Grammars(engine.tokenizer, engine.target.vocab_size, engine.eos_ids)
        return self._grammars.compile(wanted)

    async def _run(
        self, pool: ThreadPoolExecutor, field: str, function: Callable[..., T], argument: Any
    ) -> T:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_DEADLINE_S):
                return await loop.run_in_executor(pool, function, argument)
        except TimeoutError:
            raise unavailable(f"{field} took too long to read", "preparation_timeout") from None
        except RedwoodError as error:
            told = as_api_error(error)
            raise ApiError(told.status, told.message, code=told.code, param=field) from error


def _as_message(message: Any) -> dict[str, str]:
    role = _ROLES.get(message.role, message.role)
    named = {} if message.name is None else {"name": message.name}
    return {"role": role, "content": message.content, **named}
