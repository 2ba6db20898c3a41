"""What an answer must look like: a grammar, and where in the answer it begins.

A format of the answer binds all of it. A call that must be made binds it, too. A call that may be
made is bound from its opening tag on. Reasoning is free, whatever comes behind it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from redwood.errors import ArgumentError
from redwood.server.chats import Chats
from redwood.server.delayed import BareCalls, DelayedGrammar
from redwood.server.grammar import Grammars
from redwood.server.schema import ChatRequest, Request
from redwood.server.tools.bare import Bare, bare_grammars
from redwood.server.tools.formats import ToolFormat
from redwood.server.tools.grammars import calls_grammar


@dataclass(frozen=True)
class Constraint:
    """A grammar, compiled, and where it begins.

    Args:
        grammar: from `Grammars.compile`, None: the answer is free.
        awaited: texts that come before it; the last is "" where nothing but a call without a tag
            begins one.
        bare: the grammars of calls without a tag, by tool, and what such a call begins with.
        eager: every call that an answer holds is right.
    """

    grammar: str | None = None
    awaited: tuple[str, ...] = ()
    eager: bool = False
    bare: tuple[Bare, Mapping[str, str]] | None = None


class Constraints:
    """Makes constraints for requests to one model; slow, so not for the event loop.

    Args:
        grammars: of the model.
        chats: likewise.
    """

    def __init__(self, grammars: Grammars, chats: Chats) -> None:
        self._grammars, self._chats = grammars, chats

    def of(self, request: Request) -> Constraint:
        """Returns what a request asks for.

        Raises:
            ArgumentError: a schema that is wrong, or has keywords that cannot be kept.
        """
        wanted = request.response_format
        thinking = self._chats.think_tags if isinstance(request, ChatRequest) else None
        awaited = () if thinking is None else (thinking.closing,)
        form = self._chats.form(request) if isinstance(request, ChatRequest) else None
        if form is None or not isinstance(request, ChatRequest):
            if wanted.type == "text":
                return Constraint()
            return Constraint(self._grammars.compile(wanted), awaited)
        if request.must_call:
            return Constraint(self._calls(request, form), awaited, eager=True)
        if wanted.type != "text":
            answer = (
                {"type": "object"} if wanted.json_schema is None else wanted.json_schema.schema_
            )
            return Constraint(self._calls(request, form, answer=answer), awaited, eager=True)
        try:
            return self._of_free(request, form, awaited)
        except ArgumentError:  # a schema that cannot be kept: calls are read as they come
            return Constraint()

    def _of_free(
        self, request: ChatRequest, form: ToolFormat, awaited: tuple[str, ...]
    ) -> Constraint:
        """Of calls that may be made: from the opening tag on, or from where one has begun."""
        tagged = self._chats.token_of(form.opening) is not None
        grammar = self._calls(request, form, opened=True) if tagged else ""
        bare = None
        if form.bare is not None:
            several = request.parallel_tool_calls
            made = bare_grammars(
                form.name,
                form.bare,
                form.body,
                tools_of(request),
                self._spelled,
                self._grammars.fits,
                several=several,
            )
            checked = {
                text: self._grammars.compile_lark(text, "tools") for text in set(made.values())
            }
            bare = form.bare, {name: checked[text] for name, text in made.items()}
        if not tagged and bare is None:
            return Constraint()
        opening = form.opening if tagged else ""
        return Constraint(grammar, (*awaited, opening), eager=tagged, bare=bare)

    def processor(self, constraint: Constraint, prompt: Sequence[int], request: Request) -> Any:
        """Returns a logits processor for one answer."""
        assert constraint.grammar is not None
        grammars, grammar = self._grammars, constraint.grammar
        if not constraint.awaited:
            return grammars.processor(grammar, len(prompt))
        unless = None
        tags = self._chats.think_tags
        if tags is not None and constraint.awaited[0] == tags.closing:
            if not self._chats.thinks(prompt):
                unless = self._chats.token_of(tags.opening)
                if unless is None or len(constraint.awaited) > 1:
                    # nobody knows whether it will reason; calls may begin at any time
                    rest = constraint.awaited[1:]
                    if not rest:
                        return grammars.processor(grammar, len(prompt))
                    return self._delayed(constraint, rest, prompt, None)
        return self._delayed(constraint, constraint.awaited, prompt, unless)

    def _delayed(
        self,
        constraint: Constraint,
        awaited: tuple[str, ...],
        prompt: Sequence[int],
        unless: int | None,
    ) -> DelayedGrammar:
        grammar = constraint.grammar
        assert grammar is not None
        ready = [self._grammars.processor(grammar, len(prompt))] if grammar else []

        def make(length: int) -> Any:
            if ready:
                return ready.pop().moved(length)
            return self._grammars.processor(grammar, length)

        calls = None
        if constraint.bare is not None:
            bare, made = constraint.bare

            def begun(tool: str, length: int) -> Any:
                return self._grammars.processor(made[tool], length)

            calls = BareCalls(bare.pattern(made), bare.leads, begun)
        bytes_of = self._grammars.bytes_of
        return DelayedGrammar(make, bytes_of, awaited, len(prompt), unless, calls)

    def _calls(
        self,
        request: ChatRequest,
        form: ToolFormat,
        *,
        opened: bool = False,
        answer: Mapping[str, Any] | None = None,
    ) -> str:
        text = calls_grammar(
            form,
            tools_of(request),
            self._spelled,
            self._grammars.fits,
            opened=opened,
            several=request.parallel_tool_calls,
            answer=answer,
        )
        return self._grammars.compile_lark(text, "tools")

    def _spelled(self, tag: str) -> str:
        token = self._chats.token_of(tag)
        if token is not None:
            return f"<[{token}]>"
        return json.dumps(tag)


def tools_of(request: ChatRequest) -> dict[str, dict[str, Any]]:
    """Returns the schemas of the tools that an answer may call, by name."""
    return {tool.function.name: tool.function.parameters for tool in request.callable_tools}
