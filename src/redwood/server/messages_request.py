"""Bodies of /v1/messages, Anthropic's API, and the chat that each asks for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from redwood.server.schema import Extensions, Salt, Stop
from redwood.server.values import Strict, Whole

IGNORED = frozenset({"metadata", "service_tier", "inference_geo", "cache_control", "speed"})
"""Accepted without effect: no answer depends on them; prompts are cached as it is."""
REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "container": ((), "there are no containers"),
    "context_management": (({"edits": []}, {}), "the conversation is never shortened"),
    "mcp_servers": (([],), "the client runs all tools"),
    "output_format": ((), "use output_config"),
}
"""Field -> neutral values; why any other value is refused."""


def _drop_cache(value: Any) -> Any:
    """Blocks may ask to be cached, which needs no asking here."""
    if isinstance(value, dict):
        return {key: each for key, each in value.items() if key not in _SPARE and each is not None}
    return value


_SPARE = ("cache_control", "citations", "caller")


class TextBlock(Strict):
    """Text."""

    type: Literal["text"]
    text: str


class ThinkingBlock(Strict):
    """Reasoning of an earlier answer."""

    type: Literal["thinking"]
    thinking: str
    signature: str = ""


class HiddenBlock(Strict):
    """Reasoning that nobody can read."""

    type: Literal["redacted_thinking"]
    data: str = ""


class CallBlock(Strict):
    """A call of an earlier answer."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


def _texts(content: Any) -> Any:
    """A string, or a list of text blocks joined to one."""
    if content is None:
        return ""
    if not isinstance(content, list):
        return content
    texts = []
    for block in content:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind != "text" or not isinstance(block.get("text"), str):
            raise PydanticCustomError(
                "content_part", "only text is supported, not {kind}", {"kind": repr(kind)[:64]}
            )
        texts.append(block["text"])
    return "\n".join(texts)


Texts = Annotated[str, BeforeValidator(_texts)]


class ResultBlock(Strict):
    """What a call returned."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: Texts = ""
    is_error: bool = False


Block = TextBlock | ThinkingBlock | HiddenBlock | CallBlock | ResultBlock
_KINDS: Mapping[str, type[Strict]] = {
    "text": TextBlock,
    "thinking": ThinkingBlock,
    "redacted_thinking": HiddenBlock,
    "tool_use": CallBlock,
    "tool_result": ResultBlock,
}


def _block(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    kind = value.get("type")
    model = _KINDS.get(kind) if isinstance(kind, str) else None
    if model is None:
        raise PydanticCustomError(
            "content_part", "blocks of type {kind} are not supported", {"kind": repr(kind)[:64]}
        )
    return model.model_validate(_drop_cache(value))


class AnthropicMessage(Strict):
    """One message; results of calls are blocks of the user's."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Annotated[Block, BeforeValidator(_block)]]


class AnthropicTool(Strict):
    """A tool that the client runs."""

    name: str
    type: Literal["custom"] = "custom"
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    eager_input_streaming: bool | None = None  # arguments always come as they are made
    defer_loading: Literal[False] | None = None
    input_examples: list[Any] | None = None


class Choice(Strict):
    """Which tools are called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class Thinking(Strict):
    """Whether there is reasoning, where the model can be told."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Whole | None = Field(None, ge=1)
    display: str | None = None


class OutputFormat(Strict):
    """A schema that the answer must satisfy."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Strict):
    """The form of the answer."""

    effort: str | None = Field(None, max_length=32)
    format: OutputFormat | None = None


class CountRequest(Strict):
    """Body of /v1/messages/count_tokens."""

    model: str | None = None
    messages: list[AnthropicMessage] = Field(min_length=1)
    system: Texts = ""
    tools: list[Annotated[AnthropicTool, BeforeValidator(_drop_cache)]] = Field(
        default_factory=list
    )
    tool_choice: Choice = Choice(type="auto")
    thinking: Thinking | None = None
    output_config: OutputConfig = Field(default_factory=lambda: OutputConfig.model_validate({}))

    def chat(self) -> dict[str, Any]:
        """Returns the body of the chat that this asks for."""
        choice: Any = {"auto": "auto", "any": "required", "none": "none"}.get(
            self.tool_choice.type,
            {"type": "function", "function": {"name": self.tool_choice.name or ""}},
        )
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for message in self.messages:
            messages += _converted(message)
        effort = self.output_config.effort
        if self.thinking is not None and self.thinking.type == "disabled":
            effort = "none"
        wanted = self.output_config.format
        return {
            "model": self.model,
            "messages": messages,
            "tools": [_tool(tool) for tool in self.tools],
            "tool_choice": choice,
            "parallel_tool_calls": not self.tool_choice.disable_parallel_tool_use,
            "reasoning_effort": effort,
            "response_format": {"type": "text"}
            if wanted is None
            else {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": wanted.schema_},
            },
        }


class MessagesRequest(CountRequest):
    """Body of /v1/messages."""

    max_tokens: Whole = Field(ge=1)
    temperature: float = Field(1.0, ge=0.0, le=1.0)
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    top_k: Whole = Field(0, ge=-1)
    stop_sequences: list[Stop] = Field(default_factory=list, max_length=4)
    seed: Whole | None = Field(None, ge=-(2**63), lt=2**64)
    cache_salt: Salt = ""
    stream: bool = False
    redwood: Extensions = Extensions()

    def chat(self) -> dict[str, Any]:
        """As `CountRequest.chat`."""
        return {
            **super().chat(),
            "max_completion_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "stop": self.stop_sequences,
            "seed": self.seed,
            "cache_salt": self.cache_salt,
            "stream": self.stream,
            "redwood": self.redwood.model_dump(),
        }


def _tool(tool: AnthropicTool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "strict": tool.strict}
    return {"type": "function", "function": {**function, "parameters": tool.input_schema}}


def _converted(message: AnthropicMessage) -> list[dict[str, Any]]:
    """One message as a chat's: results of calls become messages of their own, before the text."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    results: list[dict[str, Any]] = []
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    thoughts: list[str] = []
    for block in message.content:
        match block:
            case TextBlock():
                texts.append(block.text)
            case ThinkingBlock():
                thoughts.append(block.thinking)
            case CallBlock():
                function = {"name": block.name, "arguments": json.dumps(block.input)}
                calls.append({"id": block.id, "type": "function", "function": function})
            case ResultBlock():
                text = f"Error: {block.content}" if block.is_error else block.content
                result = {"role": "tool", "content": text, "tool_call_id": block.tool_use_id}
                results.append(result)
    made: dict[str, Any] = {"role": message.role, "content": "\n".join(texts)}
    if calls:
        made["tool_calls"] = calls
    if thoughts:
        made["reasoning_content"] = "\n".join(thoughts)
    return results if results and not texts else [*results, made]
