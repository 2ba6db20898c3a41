"""Parses a request's body: which fields are read, refused or ignored, and why."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import from_json

from redwood.server.errors import ApiError, wrong
from redwood.server.schema import Request

R = TypeVar("R", bound=Request)

IGNORED = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
"""Accepted without effect: they label, store or schedule a request; no answer depends on them."""

_TOOLS = "tools are not supported"
REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "add_generation_prompt": ((True,), "the answer is always the assistant's next message"),
    "add_special_tokens": ((), "the tokenizer decides"),
    "allowed_token_ids": ((), "use logit_bias or response_format"),
    "audio": ((), "only text is supported"),
    "bad_words": (([],), "use logit_bias"),
    "best_of": ((1,), "answers are not ranked: use n"),
    "chat_template": ((), "templates come from the model alone"),
    "chat_template_kwargs": (({},), "templates get the messages alone"),
    "continue_final_message": ((False,), "use /v1/completions to continue a text"),
    "documents": (([],), "put them into the messages"),
    "echo": ((False,), "the prompt is not sent back"),
    "function_call": (("none",), _TOOLS),
    "functions": (([],), _TOOLS),
    "guided_choice": (([],), "use response_format"),
    "guided_grammar": ((), "use response_format"),
    "guided_json": ((), "use response_format"),
    "guided_regex": ((), "use response_format"),
    "include_reasoning": ((True,), "reasoning is not told apart"),
    "include_stop_str_in_output": ((False,), "stop strings are never part of the text"),
    "length_penalty": ((1, 1.0), "beam search is not supported"),
    "min_tokens": ((0,), "use logit_bias or ignore_eos"),
    "modalities": ((["text"],), "only text is supported"),
    "priority": ((0,), "requests take turns by key"),
    "prompt_logprobs": ((0,), "log-probabilities of prompts are not computed"),
    "reasoning_effort": (("none",), "how much a model reasons cannot be set"),
    "skip_special_tokens": ((True,), "special tokens are never part of the text"),
    "spaces_between_special_tokens": ((True, False), "special tokens are never part of the text"),
    "stop_token_ids": (([],), "use stop"),
    "structured_outputs": ((), "use response_format"),
    "suffix": (("",), "text is only added at the end"),
    "tool_choice": (("none", "auto"), _TOOLS),
    "tools": (([],), _TOOLS),
    "truncate_prompt_tokens": ((), "prompts are never cut: shorten it"),
    "use_beam_search": ((False,), "beam search is not supported"),
    "verbosity": ((), "ask for it in a message"),
    "web_search_options": ((), "nothing is looked up"),
}
"""Field -> neutral values, which are accepted; why any other value is refused."""


def read(body: bytes, kind: type[R]) -> R:
    """Parses a request's body.

    Raises:
        ApiError: 400, which names the field.
    """
    try:
        data = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise wrong(f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(data, dict):
        raise wrong("the body must be a JSON object", code="invalid_json")
    try:
        return kind.model_validate(_known(data, kind))
    except ValidationError as error:
        raise _explain(error) from None


def _known(data: Mapping[str, Any], kind: type[Request]) -> dict[str, Any]:
    """The fields that are read; null counts as a field left out, as OpenAI's clients send it."""
    kept = {}
    for name, value in data.items():
        if value is None or name in IGNORED:
            continue
        if name in kind.model_fields:
            kept[name] = value
        elif name not in REFUSED:
            raise _unknown(name, kind)
        elif not any(type(value) is type(each) and value == each for each in REFUSED[name][0]):
            message = f"{name} is not supported: {REFUSED[name][1]}"
            raise wrong(message, name, "unsupported_parameter")
    return kept


def _unknown(name: str, kind: type[Request]) -> ApiError:
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
