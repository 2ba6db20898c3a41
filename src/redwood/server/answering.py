"""From a request for answers to its response, whole or as a stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import Request, Response
from starlette.requests import ClientDisconnect

from redwood.server import schema
from redwood.server.answers import usage_of
from redwood.server.apis import Api
from redwood.server.errors import ApiError, unavailable, wrong
from redwood.server.framing import Frame, Stream
from redwood.server.generation import Event, Generation
from redwood.server.logs import Record
from redwood.server.responses import json_response
from redwood.server.service import Service
from redwood.server.streaming import ClientLeft, EventStream, until_left
from redwood.server.tools.parts import Part


async def answer(service: Service, request: Request, api: Api) -> Response:
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
        asked, wire = api.read(await _body(request))
        model = _served_name(service, asked)
        made = service.preparer.prepare(asked, owner, record.started_s)
        generation = await until_left(request.receive, made)
    finally:
        service.admission.leave(owner)
    _note(service, record, asked, generation)
    reply = _Reply(service, record, asked, generation, api.frame(service, wire, model, generation))
    return reply.stream() if asked.stream else await reply.whole(request)


async def count_tokens(service: Service, request: Request, api: Api) -> int:
    """Returns how many tokens the prompt of a request has.

    Raises: as `answer`.
    """
    record: Record = request.scope["record"]
    owner = record.owner or "open"
    service.admission.enter(owner)
    try:
        asked, _ = api.read(await _body(request))
        _served_name(service, asked)
        made = service.preparer.prompts(asked)
        (prompt,) = await until_left(request.receive, made)
    finally:
        service.admission.leave(owner)
    return len(prompt)


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
        frame: Frame,
    ) -> None:
        self._service, self._record, self._asked = service, record, asked
        self._generation, self._frame = generation, frame

    async def whole(self, request: Request) -> Response:
        """Returns the complete answer; raises ClientLeft if the client leaves before that."""
        with self._service.serving(self._generation, self._record):
            made = await until_left(request.receive, self._collect())
        parts = [self._read_whole(each) for each in made]
        return json_response(self._frame.whole(made, parts, self._usage()))

    def _read_whole(self, events: list[Event]) -> list[Part]:
        return [part for each in events for part in self._read(each)]

    def _read(self, event: Event) -> list[Part]:
        """The parts of one event's text, and the rest of the answer's with the last."""
        reader = self._generation.readers[event.choice]
        parts = reader.feed(event.text)
        if event.finish_reason is not None:
            parts += reader.finish(complete=event.finish_reason == "stop")
        return parts

    def stream(self) -> Response:
        """Returns the answer as a stream of server-sent events."""
        settings, stream = self._service.settings, self._frame.stream()

        def failed(error: ApiError) -> bytes:
            self._record.details.update(error=error.code)
            return stream.failed(error)

        return EventStream(
            self._parts(stream),
            lifetime=self._service.serving(self._generation, self._record),
            ping_s=settings.ping_s,
            send_timeout_s=settings.send_timeout_s,
            failed=failed,
        )

    async def _collect(self) -> list[list[Event]]:
        made: list[list[Event]] = [[] for _ in self._generation.choices]
        async with aclosing(self._events()) as events:
            async for each in events:
                made[each.choice].append(each)
        return made

    async def _parts(self, stream: Stream) -> AsyncGenerator[bytes]:
        """Encoded events, one part for each event of the engine."""
        async with aclosing(self._events()) as events:
            async for each in events:
                if part := b"".join(stream.step(each, self._read(each))):
                    yield part
        yield b"".join(stream.end(self._usage()))

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
