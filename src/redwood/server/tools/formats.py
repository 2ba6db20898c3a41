"""The forms of tool calls that are known, and which of them a model's chat template speaks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from redwood.errors import ArgumentError
from redwood.server.tools import bodies
from redwood.server.tools.bare import Bare, json_object, python_list
from redwood.server.tools.gemma import FunctionGemmaParser, Gemma4Parser
from redwood.server.tools.harmony import TAGS, HarmonyParser
from redwood.server.tools.hermes import HermesParser
from redwood.server.tools.leading import LlamaParser, PythonicParser
from redwood.server.tools.mistral import MistralParser
from redwood.server.tools.parser import Schemas, ToolParser
from redwood.server.tools.qwen3_coder import Qwen3CoderParser
from redwood.server.tools.rules import Rules


@dataclass(frozen=True)
class ToolFormat:
    """How a family of models writes calls.

    Args:
        name: for `--tool-parser`.
        parser: reads them.
        speaks: whether a chat template is of this family.
        tags: texts that the parser must see, also where they are special tokens.
        opening: the tag that begins a call; "": none.
        before: what stands between the opening tag and the arguments of a call of this tool: tags
            and other text.
        after: what stands behind the arguments.
        between: what stands between two calls; None: there is one call at most.
        around: what stands before the first call and behind the last.
        body: makes rules for the arguments of a tool by its schema; None: they are JSON.
        reasoning: makes rules for what may come before calls that must be made.
        bare: calls without the opening tag, where it is sure that one has begun; None: it is not.
        before_answer: what stands before an answer that is no call.
        described: the template knows no tools; `generic` describes them in a message.
    """

    name: str
    parser: type[ToolParser]
    speaks: Callable[[str], bool]
    before: Callable[[str], Sequence[str]]
    tags: tuple[str, ...] = ()
    opening: str = ""
    after: tuple[str, ...] = ()
    between: tuple[str, ...] | None = ("\n",)
    around: tuple[str, str] = ("", "")
    body: Callable[[Rules, str, Mapping[str, Any]], str] | None = None
    reasoning: Callable[[Rules], str] | None = None
    before_answer: tuple[str, ...] = ()
    bare: Bare | None = None
    described: bool = False

    def reader(self, tools: Schemas, *, eager: bool) -> ToolParser:
        """Returns a parser for one answer."""
        return self.parser(tools, eager=eager)


def _hermes(template: str) -> bool:
    others = ("<arg_key>", "<function=", "<|tool_call")
    return "<tool_call>" in template and not any(sign in template for sign in others)


def _never(template: str) -> bool:
    return False


_HERMES = ToolFormat(
    "hermes",
    HermesParser,
    _hermes,
    tags=("<tool_call>", "</tool_call>"),
    opening="<tool_call>",
    before=lambda name: (f'\n{{"name": "{name}", "arguments": ',),
    after=("}\n", "</tool_call>"),
    bare=json_object("arguments"),
)
_GENERIC = ToolFormat(
    "generic",
    HermesParser,
    _never,
    tags=_HERMES.tags,
    opening=_HERMES.opening,
    before=_HERMES.before,
    after=_HERMES.after,
    bare=_HERMES.bare,
    described=True,
)

_QWEN3_CODER = ToolFormat(
    "qwen3-coder",
    Qwen3CoderParser,
    lambda template: "<function=" in template and "<parameter=" in template,
    tags=("<tool_call>", "</tool_call>", "<function=", "</function>"),
    opening="<tool_call>",
    before=lambda name: ("\n", "<function=", f"{name}>\n"),
    after=("</function>", "\n", "</tool_call>"),
    body=bodies.tagged_parameters,
)
_MISTRAL_LIST = ToolFormat(
    "mistral-list",
    MistralParser,
    lambda template: "[TOOL_CALLS]" in template and "[ARGS]" not in template,
    tags=("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    opening="[TOOL_CALLS]",
    before=lambda name: (f' [{{"name": "{name}", "arguments": ',),
    after=("}]",),
    between=None,
)
_MISTRAL = ToolFormat(
    "mistral",
    MistralParser,
    lambda template: "[TOOL_CALLS]" in template and "[ARGS]" in template,
    tags=("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    opening="[TOOL_CALLS]",
    before=lambda name: (name, "[ARGS]"),
    between=(),
)
_GEMMA4 = ToolFormat(
    "gemma4",
    Gemma4Parser,
    lambda template: "<|tool_call>" in template,
    tags=("<|tool_call>", "<tool_call|>", '<|"|>'),
    opening="<|tool_call>",
    before=lambda name: (f"call:{name}",),
    after=("<tool_call|>",),
    between=(),
    body=bodies.gemma4_arguments,
)
_FUNCTION_GEMMA = ToolFormat(
    "functiongemma",
    FunctionGemmaParser,
    lambda template: "<start_function_call>" in template,
    tags=("<start_function_call>", "<end_function_call>", "<escape>"),
    opening="<start_function_call>",
    before=lambda name: (f"call:{name}",),
    after=("<end_function_call>",),
    between=(),
    body=bodies.function_gemma_arguments,
)
_HARMONY = ToolFormat(
    "harmony",
    HarmonyParser,
    lambda template: "<|channel|>" in template and "<|message|>" in template,
    tags=TAGS,
    before=lambda name: (
        "<|channel|>",
        f"commentary to=functions.{name} ",
        "<|constrain|>",
        "json",
        "<|message|>",
    ),
    between=None,  # a call ends the answer
    reasoning=bodies.harmony_reasoning,
    before_answer=("<|channel|>", "final", "<|message|>"),
    bare=Bare(
        r"to=(?:functions\.)?NAMES(?=[\s<])(?:(?!<\|(?:message|end|call|return)\|>).)*<\|message\|>\s*\Z",
        leads=False,
    ),
)
_LLAMA = ToolFormat(
    "llama3-json",
    LlamaParser,
    lambda template: "<|start_header_id|>" in template and '"parameters": ' in template,
    tags=LlamaParser.tags,
    before=lambda name: (f'{{"name": "{name}", "parameters": ',),
    after=("}",),
    between=None,
    bare=json_object("parameters", between=r"[ \t\n]{0,8};[ \t\n]{0,8}", tags=LlamaParser.explicit),
)
_PYTHONIC = ToolFormat(
    "pythonic",
    PythonicParser,
    lambda template: "func_name1(params_name1=" in template,
    tags=PythonicParser.tags,
    before=lambda name: (f"{name}(",),
    after=(")",),
    between=(", ",),
    around=("[", "]"),
    body=bodies.python_arguments,
    bare=python_list(("<|python_start|>",), ("<|python_end|>",)),
)

FORMATS: Mapping[str, ToolFormat] = {
    each.name: each
    for each in (
        _QWEN3_CODER,
        _HERMES,
        _HARMONY,
        _GEMMA4,
        _FUNCTION_GEMMA,
        _MISTRAL,
        _MISTRAL_LIST,
        _PYTHONIC,
        _LLAMA,
        _GENERIC,
    )
}


def format_of(template: Any, wanted: str | None = None) -> ToolFormat | None:
    """Returns the form of a model's calls, None if its template speaks none that is known.

    Args:
        template: of the model's chats; several: the default one counts.
        wanted: the name of a form, whatever the template says.

    Raises:
        ArgumentError: there is no form of this name.
    """
    if wanted is not None:
        if wanted not in FORMATS:
            known = ", ".join(FORMATS)
            raise ArgumentError(f"there is no tool parser {wanted!r}: known are {known}")
        return FORMATS[wanted]
    if isinstance(template, Mapping):
        template = template.get("tool_use", template.get("default"))
    text = str(template or "")
    return next((each for each in FORMATS.values() if each.speaks(text)), None)
