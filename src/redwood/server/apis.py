"""The APIs: how each reads a body as the one kind of request there is, and frames its answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from redwood.server import fields, messages_request, responses_request
from redwood.server.answers import ChatAnswer, CompletionAnswer
from redwood.server.errors import ApiError, anthropic_body
from redwood.server.framing import Frame, named_event
from redwood.server.generation import Event, Generation
from redwood.server.messages_answer import MessagesAnswer
from redwood.server.messages_request import CountRequest, MessagesRequest
from redwood.server.responses_answer import ResponsesAnswer
from redwood.server.responses_request import ResponsesRequest
from redwood.server.schema import ChatRequest, CompletionRequest, Request

if TYPE_CHECKING:
    from redwood.server.service import Service


@dataclass(frozen=True)
class Api:
    """One API.

    Args:
        read: returns the request of a body, and what the API itself has read; raises ApiError.
        frame: returns what stands around the answer to a request.
        failed: returns the event of an error in a stream whose answer has not begun.
    """

    read: Callable[[bytes], tuple[Request, Any]]
    frame: Callable[[Service, Any, str, Generation], Frame]
    failed: Callable[[ApiError], bytes]


def _openai(kind: type[Request], answer: type[ChatAnswer] | type[CompletionAnswer]) -> Api:
    def read(body: bytes) -> tuple[Request, Request]:
        asked = fields.read(body, kind)
        return asked, asked

    def frame(service: Service, asked: Request, model: str, generation: Generation) -> Frame:
        return answer(model, service.texts, service.fingerprint, asked.stream_options)

    return Api(read, frame, lambda error: error.event)


def _as_chat(kind: type[Any], module: ModuleType) -> Callable[[bytes], tuple[Request, Any]]:
    """What reads a body of `kind`, whose module says what is ignored and refused, as a chat."""

    def read(body: bytes) -> tuple[Request, Any]:
        asked = fields.read_as(body, kind, module.IGNORED, module.REFUSED)
        return fields.chat_of(asked.chat()), asked

    return read


def _frame_response(
    service: Service, asked: ResponsesRequest, model: str, generation: Generation
) -> Frame:
    return ResponsesAnswer(asked, model)


def _frame_message(
    service: Service, asked: MessagesRequest, model: str, generation: Generation
) -> Frame:
    choice = generation.choices[0]

    def stopped_by(last: Event) -> str | None:
        """The stop sequence that ended an answer: the one in its last tokens' text."""
        ids = last.token_ids
        if not asked.stop_sequences or not ids or ids[-1] in service.engine.eos_ids:
            return None
        end = "".join(service.texts.text(token) for token in choice.tokens[-64:])
        found = [stop for stop in asked.stop_sequences if stop in end]
        return found[-1] if found else None

    return MessagesAnswer(asked, model, len(choice.prompt), stopped_by)


def _fail_response(error: ApiError) -> bytes:
    said = error.body["error"]
    told = {name: said[name] for name in ("code", "message", "param")}
    return named_event("error", {"type": "error", **told, "sequence_number": 0})


def _fail_message(error: ApiError) -> bytes:
    return named_event("error", anthropic_body(error))


CHAT = _openai(ChatRequest, ChatAnswer)
COMPLETIONS = _openai(CompletionRequest, CompletionAnswer)
RESPONSES = Api(_as_chat(ResponsesRequest, responses_request), _frame_response, _fail_response)
MESSAGES = Api(_as_chat(MessagesRequest, messages_request), _frame_message, _fail_message)
COUNT = Api(_as_chat(CountRequest, messages_request), _frame_message, _fail_message)
