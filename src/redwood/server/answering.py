"""From a request for answers to its response, whole or as a stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import Request, Response
from starlette.requests import ClientDisconnect

from redwood.server import fields, schema
from redwood.server.answers import Answer, ChatAnswer, CompletionAnswer, usage_of
from redwood.server.errors import ApiError, unavailable, wrong
from redwood.server.generation import Event, Generation
from redwood.server.logs import Record
from redwood.server.responses import json_response
from redwood.server.service import Service
from redwood.server.streaming import DONE, ClientLeft, EventStream, event, until_left


async def answer(service: Service, request: Request, kind: type[schema.Request]) -> Response:
    """Answers one request.

    Raises:
        ApiError: the error that the client gets.
        ClientLeft: the client has closed the connection.
    """
    if service.draining:
        raise unavailable("the server is stopping", "shutting_down")
    record: Record = request.scope["record"]
    owner = record.owner or "open"
    service.admission.enter(owner)
    try:
        asked = fields.read(await _body(request), kind)
        model = _served_name(service, asked)
        made = service.preparer.prepare(asked, owner, record.started_s)
        generation = await until_left(request.receive, made)
    finally:
        service.admission.leave(owner)
    _note(service, record, asked, generation)
    frame = ChatAnswer if kind is schema.ChatRequest else CompletionAnswer
    head = frame(model, service.texts, service.fingerprint)
    reply = _Reply(service, record, asked, generation, head)
    return reply.stream() if asked.stream else await reply.whole(request)


async def _body(request: Request) -> bytes:
    try:
        return await request.body()
    except ClientDisconnect:
        raise ClientLeft("disconnect") from None


def _served_name(service: Service, asked: schema.Request) -> str:
    names = service.settings.model_names
    if asked.model is not None and asked.model not in names:
        raise model_not_found(asked.model)
    if asked.redwood.trace and not service.settings.trace:
        raise wrong("this server shows no traces", "redwood", "unsupported_parameter")
    return names[0] if asked.model is None else asked.model


def model_not_found(name: str) -> ApiError:
    """Returns the 404 for a model that is not served."""
    return ApiError(
        404,
        f"there is no model {name[:64]!r} here: /v1/models lists what there is",
        code="model_not_found",
        param="model",
    )


def _note(service: Service, record: Record, asked: schema.Request, generation: Generation) -> None:
    prompts = [choice.prompt for choice in generation.choices]
    record.details.update(
        stream=asked.stream, choices=len(prompts), prompt_tokens=sum(map(len, prompts[:: asked.n]))
    )
    if service.settings.log_prompts:
        record.details["prompt"] = service.engine.tokenizer.decode(prompts[0])


class _Reply:
    """The response to one request, whole or streamed."""

    def __init__(
        self,
        service: Service,
        record: Record,
        asked: schema.Request,
        generation: Generation,
        frame: Answer,
    ) -> None:
        self._service, self._record, self._asked = service, record, asked
        self._generation, self._frame = generation, frame

    async def whole(self, request: Request) -> Response:
        """Returns the complete answer; raises ClientLeft if the client leaves before that."""
        with self._service.serving(self._generation, self._record):
            made = await until_left(request.receive, self._collect())
        return json_response(self._frame.whole(made, self._usage()))

    def stream(self) -> Response:
        """Returns the answer as a stream of server-sent events."""
        settings, details = self._service.settings, self._record.details
        return EventStream(
            self._parts(),
            lifetime=self._service.serving(self._generation, self._record),
            ping_s=settings.ping_s,
            send_timeout_s=settings.send_timeout_s,
            failed=lambda error: details.update(error=error.code),
        )

    async def _collect(self) -> list[list[Event]]:
        made: list[list[Event]] = [[] for _ in self._generation.choices]
        async with aclosing(self._events()) as events:
            async for each in events:
                made[each.choice].append(each)
        return made

    async def _parts(self) -> AsyncGenerator[bytes]:
        """Encoded chunks, one part for each event of the engine."""
        frame, options = self._frame, self._asked.stream_options
        sent: dict[int, int] = {}  # choice -> characters sent so far
        async with aclosing(self._events()) as events:
            async for each in events:
                chunks = []
                if each.choice not in sent:
                    sent[each.choice] = 0
                    chunks.append(frame.opening(each.choice))
                if each.text or each.logprobs or each.finish_reason or each.trace:
                    chunk = frame.chunk(each, offset=sent[each.choice])
                    chunks.append(chunk if each.trace is None else {**chunk, "redwood": each.trace})
                sent[each.choice] += len(each.text)
                if part := b"".join(self._encoded(chunk) for chunk in chunks if chunk is not None):
                    yield part
        if options.include_usage:
            yield self._encoded(frame.closing(self._usage()))
        yield DONE

    def _encoded(self, chunk: dict[str, Any]) -> bytes:
        options = self._asked.stream_options
        if options.include_usage:
            chunk = {"usage": None, **chunk}
        return event(chunk, padded=options.include_obfuscation)

    async def _events(self) -> AsyncGenerator[Event]:
        settings = self._service.settings
        text = []
        followed = self._generation.follow(settings.queue_timeout_s, settings.request_timeout_s)
        async for each in followed:
            text.append(each.text)
            yield each
        if settings.log_prompts:
            self._record.details["answer"] = "".join(text)

    def _usage(self) -> dict[str, Any]:
        choices = self._generation.choices
        return usage_of(choices, len(choices) // self._asked.n)
