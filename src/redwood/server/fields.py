"""Parses a request's body: which fields are read, refused or ignored, and why."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from redwood.server.errors import ApiError, wrong
from redwood.server.schema import ChatRequest, Request

R = TypeVar("R", bound=Request)
M = TypeVar("M", bound=BaseModel)
Refused = Mapping[str, tuple[tuple[Any, ...], str]]

IGNORED = frozenset(
    {
        "metadata",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
"""Accepted without effect: they label, store or schedule a request; no answer depends on them."""

_TOOLS = "functions are called tools today: use tools"
REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "add_generation_prompt": ((True,), "the answer is always the assistant's next message"),
    "add_special_tokens": ((), "the tokenizer decides"),
    "allowed_token_ids": ((), "use logit_bias or response_format"),
    "audio": ((), "only text is supported"),
    "bad_words": (([],), "use logit_bias"),
    "best_of": ((1,), "answers are not ranked: use n"),
    "chat_template": ((), "templates come from the model alone"),
    "continue_final_message": ((False,), "use /v1/completions to continue a text"),
    "documents": (([],), "put them into the messages"),
    "echo": ((False,), "the prompt is not sent back"),
    "function_call": (("none",), _TOOLS),
    "functions": (([],), _TOOLS),
    "guided_choice": (([],), "use response_format"),
    "guided_grammar": ((), "use response_format"),
    "guided_json": ((), "use response_format"),
    "guided_regex": ((), "use response_format"),
    "include_reasoning": ((True,), "reasoning always comes in reasoning_content"),
    "include_stop_str_in_output": ((False,), "stop strings are never part of the text"),
    "length_penalty": ((1, 1.0), "beam search is not supported"),
    "min_tokens": ((0,), "use logit_bias or ignore_eos"),
    "modalities": ((["text"],), "only text is supported"),
    "priority": ((0,), "requests take turns by key"),
    "prompt_logprobs": ((0,), "log-probabilities of prompts are not computed"),
    "skip_special_tokens": ((True,), "special tokens are never part of the text"),
    "spaces_between_special_tokens": ((True, False), "special tokens are never part of the text"),
    "stop_token_ids": (([],), "use stop"),
    "structured_outputs": ((), "use response_format"),
    "suffix": (("",), "text is only added at the end"),
    "truncate_prompt_tokens": ((), "prompts are never cut: shorten it"),
    "use_beam_search": ((False,), "beam search is not supported"),
    "verbosity": ((), "ask for it in a message"),
    "web_search_options": ((), "nothing is looked up"),
}
"""Field -> neutral values, which are accepted; why any other value is refused."""


OF_CHATS: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "chat_template_kwargs": (({},), "only chats have a template"),
    "parallel_tool_calls": ((True, False), "only chats have tools"),
    "reasoning_effort": (("none",), "only chats have a template"),
    "tool_choice": (("none", "auto"), "only chats have tools"),
    "tools": (([],), "only chats have tools"),
}
"""The same, of fields that chats have and completions have not."""


def read(body: bytes, kind: type[R]) -> R:
    """Parses the body of a chat or a completion.

    Raises:
        ApiError: 400, which names the field.
    """
    return read_as(body, kind, IGNORED, {**REFUSED, **OF_CHATS})


def read_as(body: bytes, kind: type[M], ignored: Collection[str], refused: Refused) -> M:
    """Parses a request's body.

    Args:
        ignored: fields that are accepted without effect.
        refused: field -> neutral values, why any other value is refused.

    Raises:
        ApiError: 400, which names the field.
    """
    try:
        data = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise wrong(f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(data, dict):
        raise wrong("the body must be a JSON object", code="invalid_json")
    return validated(_known(data, kind, ignored, refused), kind)


def validated(data: Mapping[str, Any], kind: type[M]) -> M:
    """Returns a request from its fields.

    Raises:
        ApiError: 400, which names the field.
    """
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise _explain(error) from None


def chat_of(body: Mapping[str, Any]) -> ChatRequest:
    """Returns the chat that a request of another API asks for; None stands for left out.

    Raises:
        ApiError: 400.
    """
    return validated({k: v for k, v in body.items() if v is not None}, ChatRequest)


def _known(
    data: Mapping[str, Any], kind: type[BaseModel], ignored: Collection[str], refused: Refused
) -> dict[str, Any]:
    """The fields that are read; null counts as a field left out, as OpenAI's clients send it."""
    kept = {}
    for name, value in data.items():
        if value is None or name in ignored:
            continue
        if name in kind.model_fields:
            kept[name] = value
        elif name not in refused:
            raise _unknown(name, kind)
        elif not any(type(value) is type(each) and value == each for each in refused[name][0]):
            message = f"{name} is not supported: {refused[name][1]}"
            raise wrong(message, name, "unsupported_parameter")
    return kept


def _unknown(name: str, kind: type[BaseModel]) -> ApiError:
    shown = name[:64]
    near = difflib.get_close_matches(shown, kind.model_fields, n=1)
    hint = f". Did you mean {near[0]}?" if near else ""
    return wrong(f"unrecognized request argument: {shown!r}{hint}", shown, code="unknown_parameter")


def _explain(error: ValidationError) -> ApiError:
    """The first validation error, without the value itself."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = [str(part) for part in first["loc"] if "[" not in str(part)]
    message = first["msg"][:1].lower() + first["msg"][1:]
    return wrong(
        f"{'.'.join(place)}: {message}" if place else message,
        place[0] if place else None,
        "missing_parameter" if first["type"] == "missing" else "invalid_value",
    )
