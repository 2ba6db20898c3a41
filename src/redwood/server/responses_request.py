"""Bodies of /v1/responses, and the chat that each asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from redwood.server.schema import Extensions, Salt
from redwood.server.values import Strict, Whole

IGNORED = frozenset(
    {
        "include",  # of what there is nothing here, such as encrypted reasoning
        "max_tool_calls",
        "metadata",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "stream_options",
        "user",
    }
)
"""Accepted without effect, as in chats; nothing is ever stored."""
_STATE = "answers are not stored: send the whole conversation as input"
REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "background": ((False,), _STATE),
    "context_management": (([],), "the conversation is never shortened"),
    "conversation": ((), _STATE),
    "previous_response_id": ((), _STATE),
    "prompt": ((), "there are no stored prompts"),
    "truncation": (("disabled",), "prompts are never cut: shorten the input"),
}
"""Field -> neutral values; why any other value is refused."""
_HOSTED: tuple[str, ...] = (
    "code_interpreter",
    "computer",
    "file_search",
    "image_generation",
    "local_shell",
    "mcp",
)
_HOSTED += ("shell", "tool_search", "web_search")
_TEXTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")


def _text_of(content: Any) -> Any:
    """A string, or a list of text parts joined to one."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in _TEXTS or not isinstance(part.get("text"), str):
            raise PydanticCustomError(
                "content_part", "only text is supported, not {kind}", {"kind": repr(kind)[:64]}
            )
        texts.append(part["text"])
    return "\n".join(texts)


ItemText = Annotated[str, BeforeValidator(_text_of)]
Status = Literal["in_progress", "completed", "incomplete"]


class MessageItem(Strict):
    """A message, of the user or of an earlier answer."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: ItemText
    id: str | None = None
    status: Status | None = None
    phase: str | None = None


class CallItem(Strict):
    """A call of an earlier answer."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: Status | None = None
    namespace: None = None


class ResultItem(Strict):
    """What a call returned."""

    type: Literal["function_call_output"]
    call_id: str
    output: ItemText
    id: str | None = None
    status: Status | None = None


class ReasoningItem(Strict):
    """Reasoning of an earlier answer."""

    type: Literal["reasoning"]
    summary: ItemText = ""
    content: ItemText | None = None
    id: str | None = None
    status: Status | None = None
    encrypted_content: str | None = None


Item = MessageItem | CallItem | ResultItem | ReasoningItem
_KINDS: Mapping[str, type[Strict]] = {
    "message": MessageItem,
    "function_call": CallItem,
    "function_call_output": ResultItem,
    "reasoning": ReasoningItem,
}


def _item(value: Any) -> Any:
    """An item of the kind that it names; one without a kind is a message."""
    if not isinstance(value, dict):
        return value
    kind = value.get("type", "message")
    model = _KINDS.get(kind) if isinstance(kind, str) else None
    if model is None:
        raise PydanticCustomError(
            "item", "items of type {kind} are not supported", {"kind": repr(kind)[:64]}
        )
    kept = {k: v for k, v in value.items() if v is not None and k not in _ADDED}
    return model.model_validate(kept)


_ADDED = ("parsed_arguments", "parsed")  # by OpenAI's client to what it hands out


def _items(value: Any) -> Any:
    """A text is a message of the user's."""
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


class FunctionTool(Strict):
    """A tool that the client runs."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedChoice(Strict):
    """A tool that must be called."""

    type: Literal["function"]
    name: str


class TextFormat(Strict):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = Field(None, max_length=128)
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    description: str | None = None
    strict: bool | None = None


class TextSettings(Strict):
    """How the text of the answer is."""

    format: TextFormat = Field(default_factory=lambda: TextFormat.model_validate({}))
    verbosity: None = None


class ReasoningSettings(Strict):
    """How much is thought; summaries are not made, the reasoning itself is given."""

    effort: str | None = Field(None, max_length=32)
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    context: str | None = None


def _functions(tools: Any) -> Any:
    """Without tools that run at OpenAI: the answer's `tools` shows that they are not there."""
    if not isinstance(tools, list):
        return tools

    def hosted(tool: Any) -> bool:
        kind = tool.get("type") if isinstance(tool, dict) else None
        return isinstance(kind, str) and kind.startswith(_HOSTED)

    return [tool for tool in tools if not hosted(tool)]


class ResponsesRequest(Strict):
    """Body of /v1/responses."""

    model: str | None = None
    input: Annotated[
        list[Annotated[Item, BeforeValidator(_item)]],
        BeforeValidator(_items, json_schema_input_type=str | list[Item]),
    ]
    instructions: str | None = None
    tools: Annotated[list[FunctionTool], BeforeValidator(_functions)] = Field(default_factory=list)
    tool_choice: Literal["none", "auto", "required"] | NamedChoice = "auto"
    parallel_tool_calls: bool = True
    max_output_tokens: Whole | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0.0, le=2.0)
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    top_logprobs: Whole = Field(0, ge=0, le=0)
    text: TextSettings = TextSettings()
    reasoning: ReasoningSettings = Field(
        default_factory=lambda: ReasoningSettings.model_validate({})
    )
    seed: Whole | None = Field(None, ge=-(2**63), lt=2**64)
    cache_salt: Salt = ""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    stream: bool = False
    redwood: Extensions = Extensions()

    def chat(self) -> dict[str, Any]:
        """Returns the body of the chat that this asks for."""
        choice: Any = self.tool_choice
        if isinstance(choice, NamedChoice):
            choice = {"type": "function", "function": {"name": choice.name}}
        return {
            "model": self.model,
            "messages": self._messages(),
            "tools": [
                {"type": "function", "function": tool.model_dump(exclude={"type"})}
                for tool in self.tools
            ],
            "tool_choice": choice,
            "parallel_tool_calls": self.parallel_tool_calls,
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
            "cache_salt": self.cache_salt,
            "response_format": self._format(),
            "reasoning_effort": self.reasoning.effort,
            "chat_template_kwargs": self.chat_template_kwargs,
            "stream": self.stream,
            "redwood": self.redwood.model_dump(),
        }

    def _format(self) -> dict[str, Any]:
        wanted = self.text.format
        if wanted.type != "json_schema":
            return {"type": wanted.type}
        schema = {"name": wanted.name or "answer", "schema": wanted.schema_ or {}}
        return {"type": "json_schema", "json_schema": {**schema, "strict": wanted.strict}}

    def _messages(self) -> list[dict[str, Any]]:
        """Messages; reasoning and calls of one answer become one message of the assistant."""
        made: list[dict[str, Any]] = []
        if self.instructions:
            made.append({"role": "system", "content": self.instructions})
        for item in self.input:
            match item:
                case ResultItem():
                    result = {"role": "tool", "content": item.output, "tool_call_id": item.call_id}
                    made.append(result)
                case MessageItem() if item.role != "assistant":
                    made.append({"role": item.role, "content": item.content})
                case _:
                    _add(made, item)
        for message in made:
            message.setdefault("content", "")
        return made


def _add(made: list[dict[str, Any]], item: Any) -> None:
    """Adds to the assistant's message that is open, or to a new one."""
    last = made[-1] if made and made[-1]["role"] == "assistant" else None
    if last is None or (isinstance(item, MessageItem | ReasoningItem) and "tool_calls" in last):
        last = {"role": "assistant"}
        made.append(last)
    if isinstance(item, MessageItem):
        before = last.get("content")
        last["content"] = item.content if before is None else f"{before}\n{item.content}"
    elif isinstance(item, CallItem):
        function = {"name": item.name, "arguments": item.arguments}
        call = {"id": item.call_id, "type": "function", "function": function}
        last.setdefault("tool_calls", []).append(call)
    elif text := item.summary if item.content is None else item.content:
        last["reasoning_content"] = text
