"""Requests of OpenAI's API, with vLLM's additional sampling fields and our own field `redwood`.

Values are strict: no number from a string, no NaN, bounds on everything. An unknown field is
refused, since it may be meant to change the answer; so is a known field that is not supported,
unless it has its neutral value. The tables of those are in `fields`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from redwood.server.conversation import (
    MOST_TOOLS,
    Message,
    NamedTool,
    Tool,
    ToolChoice,
    check_tools,
)
from redwood.server.values import Strict, Text, Whole

_MAX_STOPS, _MAX_STOP_LENGTH = 4, 1024
_MAX_BIASES = 1024


class StreamOptions(Strict):
    """Options of a stream: usage in the last chunk; chunks padded to hide their lengths."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Prediction(Strict):
    """Text that the answer is expected to contain; drafts are taken from it."""

    type: Literal["content"]
    content: Text


class JsonSchema(Strict):
    """A schema that the answer must satisfy, whatever the value of `strict`."""

    name: str = Field(max_length=128)
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Strict):
    """Free text, any JSON object, or JSON that satisfies a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_what_it_names(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError(
                "response_format", "json_schema stands beside type json_schema, and only there"
            )
        return self


class Extensions(Strict):
    """Redwood's own fields.

    Args:
        speculate: False: plain decoding. The distribution is the same, and so is the text at
            temperature 0 or with a seed.
        trace: each streamed chunk contains the tree of its step; only with `stream`.
    """

    speculate: bool = True
    trace: bool = False


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Stop = Annotated[str, Field(min_length=1, max_length=_MAX_STOP_LENGTH)]
Salt = Annotated[str, Field(max_length=256)]
Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]


class Request(Strict):
    """Fields of both kinds of request."""

    model: str | None = None
    temperature: float = Field(1.0, ge=0.0, le=2.0)
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    top_k: Whole = Field(0, ge=-1)
    min_p: float = Field(0.0, ge=0.0, le=1.0)
    repetition_penalty: float = Field(1.0, gt=0.0, le=100.0)
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: dict[str, Annotated[float, Field(ge=-100.0, le=100.0)]] = Field(
        default_factory=dict, max_length=_MAX_BIASES
    )
    seed: Whole | None = Field(None, ge=-(2**63), lt=2**64)
    cache_salt: Salt = ""
    stop: Annotated[list[Stop], BeforeValidator(_as_list), Field(max_length=_MAX_STOPS)] = Field(
        default_factory=list
    )
    ignore_eos: bool = False
    n: Whole = Field(1, ge=1)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    response_format: ResponseFormat = ResponseFormat(type="text")
    prediction: Prediction | None = None
    redwood: Extensions = Extensions()

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.redwood.trace and not self.stream:
            raise PydanticCustomError("redwood", "redwood.trace needs stream: true")
        if self.ignore_eos and self.response_format.type != "text":
            raise PydanticCustomError(
                "ignore_eos", "ignore_eos cannot be used with response_format: JSON must end"
            )
        return self

    @property
    def biases(self) -> dict[int, float]:
        """`logit_bias` with token ids as numbers.

        Raises:
            ValueError: a key that is no number.
        """
        return {int(token): value for token, value in self.logit_bias.items()}

    @property
    def limit(self) -> int | None:
        """Most tokens of an answer; None: not given."""
        return None

    @property
    def num_logprobs(self) -> int | None:
        """Number of most probable tokens with log-probabilities; None: no log-probabilities."""
        return None


class ChatRequest(Request):
    """Body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    tools: list[Tool] = Field(default_factory=list, max_length=MOST_TOOLS)
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict, max_length=16)
    reasoning_effort: str | None = Field(None, max_length=32)
    max_tokens: Whole | None = Field(None, ge=1)
    max_completion_tokens: Whole | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: Whole = Field(0, ge=0, le=20)

    @model_validator(mode="after")
    def _logprobs_agree(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "top_logprobs needs logprobs: true")
        return self

    @model_validator(mode="after")
    def _tools_agree(self) -> Self:
        check_tools(self.tools, self.tool_choice)
        if self.must_call and self.response_format.type != "text":
            raise PydanticCustomError(
                "tool_choice", "a call that must be made leaves no room for response_format"
            )
        if self.ignore_eos and self.callable_tools:
            raise PydanticCustomError(
                "ignore_eos", "ignore_eos cannot be used with tools: a call must end"
            )
        return self

    @property
    def callable_tools(self) -> list[Tool]:
        """The tools that this answer may call."""
        choice = self.tool_choice
        if choice == "none":
            return []
        if isinstance(choice, NamedTool):
            return [tool for tool in self.tools if tool.function.name == choice.function.name]
        return self.tools

    @property
    def must_call(self) -> bool:
        """Whether the answer must be a call."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @property
    def limit(self) -> int | None:
        """As `Request.limit`; `max_completion_tokens` precedes the older `max_tokens`."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        """As `Request.num_logprobs`."""
        return self.top_logprobs if self.logprobs else None


class CompletionRequest(Request):
    """Body of /v1/completions."""

    prompt: str | list[str] | list[Whole] | list[list[Whole]]
    max_tokens: Whole = Field(16, ge=1)
    logprobs: Whole | None = Field(None, ge=0, le=5)

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each text or token ids."""
        given: Any = self.prompt
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            return [given]
        return list(given)

    @property
    def limit(self) -> int:
        """As `Request.limit`."""
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """As `Request.num_logprobs`."""
        return self.logprobs
