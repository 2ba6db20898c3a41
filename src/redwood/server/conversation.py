"""Messages, tools and calls of a chat, as OpenAI's API has them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from redwood.server.values import Strict, Text

MOST_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_MOST_VALUES, _MOST_LEVELS, _MOST_CHARS = 8192, 64, 2**18  # of a tool's schema


_SPARE = frozenset(
    {
        "annotations",
        "audio",
        "function_call",
        "reasoning_content",
        "refusal",
        "tool_call_id",
        "tool_calls",
    }
)


def _refused(message: str) -> PydanticCustomError:
    return PydanticCustomError("tools", "{message}", {"message": message})


def _name(value: Any) -> Any:
    if isinstance(value, str) and not _NAME.fullmatch(value):
        raise _refused("a tool's name has 1 to 128 letters, digits or _.:-")
    return value


Name = Annotated[str, BeforeValidator(_name)]


class CalledFunction(Strict):
    """What was called: a name, and arguments as JSON text. No text at all stands for {}."""

    name: Name
    arguments: str = "{}"

    @property
    def values(self) -> dict[str, Any]:
        """The arguments.

        Raises:
            ValueError: they are no JSON object.
        """
        read = json.loads(self.arguments.strip() or "{}")
        if not isinstance(read, dict):
            raise ValueError("no object")
        return read

    @model_validator(mode="after")
    def _is_object(self) -> Self:
        try:
            size = self.values
        except (ValueError, RecursionError):
            raise _refused("arguments of a call must be the text of a JSON object") from None
        _check_size(size, "arguments of a call")
        return self


class ToolCall(Strict):
    """A call in an assistant's message of the history."""

    id: str = Field("", max_length=256)
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None  # left by clients that join streams


class Message(Strict):
    """One message of a chat. `name` goes to the model's chat template, which may use it."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text = ""
    name: str | None = None
    tool_calls: list[ToolCall] = Field(default_factory=list, max_length=MOST_TOOLS)
    tool_call_id: str | None = Field(None, max_length=256)
    reasoning_content: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, data: Any) -> Any:
        """Drops empty fields: clients send answers back with fields that were not used."""
        if not isinstance(data, dict):
            return data
        kept = {key: value for key, value in data.items() if key not in _SPARE or value}
        kept.pop("redwood", None)  # what this server says of its own answers
        if kept.get("content") is None and kept.get("tool_calls"):
            kept["content"] = ""
        if "content" not in kept:
            raise PydanticCustomError("missing", "Field required")
        return kept

    @model_validator(mode="after")
    def _of_its_role(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise _refused("only messages of the assistant have tool_calls")
        if (self.tool_call_id is not None) and self.role != "tool":
            raise _refused("only messages of the role tool have a tool_call_id")
        if self.reasoning_content is not None and self.role != "assistant":
            raise _refused("only messages of the assistant have reasoning_content")
        return self


class Function(Strict):
    """A tool's name, what it is for, and the JSON schema of its arguments."""

    name: Name
    description: str = ""
    parameters: dict[str, Any] = Field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool = False

    @model_validator(mode="before")
    @classmethod
    def _drop_null(cls, data: Any) -> Any:
        if isinstance(data, dict):
            return {key: value for key, value in data.items() if value is not None}
        return data

    @model_validator(mode="after")
    def _is_bounded(self) -> Self:
        _check_size(self.parameters, f"the schema of tool {self.name!r}")
        if self.parameters.get("type", "object") != "object":
            raise _refused(f"the schema of tool {self.name!r} must be of type object")
        return self


class Tool(Strict):
    """A tool that may be called; the client runs it."""

    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    """The name of a tool."""

    name: Name


class NamedTool(Strict):
    """A tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool


def check_tools(tools: list[Tool], choice: ToolChoice) -> None:
    """Raises PydanticCustomError for tools of one name, and for a choice of a tool there is not."""
    names = [tool.function.name for tool in tools]
    for name in names:
        if names.count(name) > 1:
            raise _refused(f"there are several tools {name!r}")
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise _refused(f"tool_choice names {choice.function.name!r}, which is none of the tools")
    if choice == "required" and not names:
        raise _refused("tool_choice is required, and there are no tools")


def _check_size(value: Any, what: str) -> None:
    """Bounds a JSON value from a client before anything else reads it."""
    count, level = 0, [value]
    for _ in range(_MOST_LEVELS):
        count += len(level)
        if count > _MOST_VALUES:
            raise _refused(f"{what} has more than {_MOST_VALUES} values")
        level = [inner for each in level for inner in _inside(each)]
        if not level:
            break
    else:
        raise _refused(f"{what} has more than {_MOST_LEVELS} levels")
    if len(json.dumps(value, ensure_ascii=False)) > _MOST_CHARS:
        raise _refused(f"{what} has more than {_MOST_CHARS} characters")


def _inside(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    return value if isinstance(value, list) else []
