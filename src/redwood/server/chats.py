"""A chat request in the terms of one model: what its template gets, how its answer is read.

What the model can do is told by its chat template: the form of its calls, the tags of its
reasoning, the variables that a request may set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from redwood.models.chat_template import chat_size
from redwood.server.conversation import Message
from redwood.server.errors import wrong
from redwood.server.schema import ChatRequest
from redwood.server.tools.formats import ToolFormat, format_of
from redwood.server.tools.generic import described
from redwood.server.tools.reading import OneCall, PlainReader, Reader, ThinkingReader, think_tags_of

_ROLES = {"developer": "system"}  # the newer name, which chat templates do not know
_OPTIONS: Mapping[str, type] = {
    "enable_thinking": bool,
    "thinking": bool,
    "preserve_thinking": bool,
    "reasoning_effort": str,
    "thinking_budget": int,
}
"""Variables of chat templates that a request may set, where the template has them."""
_TAIL = 24  # tokens at the end of a prompt that may open the reasoning


@dataclass(frozen=True)
class Conversation:
    """What a chat template gets.

    Args:
        messages, tools, options: see `redwood.models.chat_template.chat_text`.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    options: dict[str, Any]

    @property
    def size(self) -> int:
        """Characters, roughly."""
        return chat_size(self.messages, self.tools)


class Chats:
    """Chats with one model.

    Args:
        tokenizer: of Transformers, with a chat template or without.
        tool_parser: the form of calls; None: as the template says.

    Raises:
        ArgumentError: there is no form of this name.
    """

    def __init__(self, tokenizer: Any, tool_parser: str | None = None) -> None:
        self._tokenizer, self._wanted = tokenizer, tool_parser
        format_of("", tool_parser)

    @property
    def _template(self) -> Any:
        return getattr(self._tokenizer, "chat_template", None)

    def form(self, request: ChatRequest) -> ToolFormat | None:
        """Returns the form of the calls that an answer may hold, None where it may hold none.

        Raises:
            ApiError: 400: it may, and how this model writes them is not known.
        """
        if not request.callable_tools:
            return None
        form = format_of(self._template, self._wanted)
        if form is None:
            raise wrong(
                "this model's chat template shows no form of tool calls that is known here; "
                "the server's operator may choose one (--tool-parser)",
                "tools",
                "unsupported_parameter",
            )
        return form

    def conversation(self, request: ChatRequest) -> Conversation:
        """Returns what the template gets.

        Raises:
            ApiError: 400: tools or options that this model does not know.
        """
        form = self.form(request)
        messages = [_as_message(message) for message in request.messages]
        tools = [tool.model_dump(exclude={"function": {"strict"}}) for tool in request.tools]
        if form is None:
            tools = []
        generic = format_of(self._template, self._wanted) if self._wanted else form
        if generic is not None and generic.described:
            messages, tools = described(messages, tools), []
        return Conversation(messages, tools, self._options(request))

    def reader(self, request: ChatRequest, prompt: Sequence[int], *, eager: bool) -> Reader:
        """Returns what reads one answer.

        Args:
            prompt: its end may open the reasoning.
            eager: see `ToolParser`.
        """
        form = self.form(request)
        reader: Reader = PlainReader()
        if form is not None:
            tools = {t.function.name: t.function.parameters for t in request.callable_tools}
            reader = form.reader(tools, eager=eager)
            if not request.parallel_tool_calls:
                reader = OneCall(reader)
        if (tags := self.think_tags) is not None:
            reader = ThinkingReader(tags, reader, inside=self.thinks(prompt))
        return reader

    @property
    def think_tags(self) -> Any:
        """The tags of the model's reasoning, None if it has none."""
        return think_tags_of(self._template)

    def thinks(self, prompt: Sequence[int]) -> bool:
        """Whether a prompt ends inside reasoning."""
        tags = self.think_tags
        if tags is None:
            return False
        end = self._tokenizer.decode(list(prompt[-_TAIL:]), skip_special_tokens=False)
        return bool(end.rfind(tags.opening) > end.rfind(tags.closing))

    def token_of(self, tag: str) -> int | None:
        """The single token of a tag, None if it has none."""
        vocabulary = self._added
        return vocabulary.get(tag)

    @cached_property
    def _added(self) -> dict[str, int]:
        getter = getattr(self._tokenizer, "get_added_vocab", None)
        return dict(getter()) if getter is not None else {}

    def visible(self, request: ChatRequest) -> list[int]:
        """Special tokens that the reader of an answer must see as text."""
        form = self.form(request)
        tags = list(form.tags) if form is not None else []
        if (thinking := self.think_tags) is not None:
            tags += [thinking.opening, thinking.closing]
        found = {self.token_of(tag) for tag in tags}
        return sorted(token for token in found if token is not None)

    def _options(self, request: ChatRequest) -> dict[str, Any]:
        """Variables for the template, each of which it has."""
        options = dict(request.chat_template_kwargs)
        for name, value in options.items():
            if name not in _OPTIONS:
                allowed = ", ".join(_OPTIONS)
                raise wrong(
                    f"chat_template_kwargs: {name[:64]!r} cannot be set; these can: {allowed}",
                    "chat_template_kwargs",
                )
            if type(value) is not _OPTIONS[name]:
                kind = _OPTIONS[name].__name__
                raise wrong(
                    f"chat_template_kwargs: {name} must be of type {kind}", "chat_template_kwargs"
                )
            self._check_known(name, "chat_template_kwargs")
        effort = request.reasoning_effort
        if effort is not None and "reasoning_effort" not in options:
            options.update(self._effort(effort))
        return options

    def _effort(self, effort: str) -> dict[str, Any]:
        if "reasoning_effort" in self._variables:
            return {"reasoning_effort": effort}
        if effort == "none":  # nothing to switch off, or a switch
            return {"enable_thinking": False} if "enable_thinking" in self._variables else {}
        if "enable_thinking" in self._variables:
            return {"enable_thinking": True}
        raise wrong(
            "reasoning_effort: this model's chat template has no such setting",
            "reasoning_effort",
            "unsupported_parameter",
        )

    def _check_known(self, name: str, field: str) -> None:
        if name not in self._variables:
            raise wrong(
                f"{field}: this model's chat template has no variable {name}",
                field,
                "unsupported_parameter",
            )

    @property
    def template_options(self) -> list[str]:
        """Names of the variables that a request may set: those that this template has."""
        known = self._variables
        return [name for name in _OPTIONS if name in known]

    @property
    def _variables(self) -> frozenset[str]:
        """Names that the template reads and does not set itself."""
        return _variables_of(str(self._template or ""))


@lru_cache(8)
def _variables_of(template: str) -> frozenset[str]:
    from jinja2 import TemplateError
    from jinja2.meta import find_undeclared_variables
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        return frozenset(find_undeclared_variables(environment.parse(template)))
    except TemplateError:
        return frozenset(name for name in _OPTIONS if name in template)


def _as_message(message: Message) -> dict[str, Any]:
    made: dict[str, Any] = {
        "role": _ROLES.get(message.role, message.role),
        "content": message.content,
    }
    for name in ("name", "tool_call_id", "reasoning_content"):
        if (value := getattr(message, name)) is not None:
            made[name] = value
    if message.tool_calls:
        made["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": call.function.values},
            }
            for call in message.tool_calls
        ]
    return made
