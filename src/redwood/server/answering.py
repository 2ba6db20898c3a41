"""From a request for answers to its response, whole or as a stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from time import perf_counter
from typing import Any

from fastapi import Request, Response
from starlette.requests import ClientDisconnect

from redwood.server import schema
from redwood.server.admission import Place
from redwood.server.answers import usage_of
from redwood.server.apis import Api
from redwood.server.errors import ApiError, unavailable, wrong
from redwood.server.framing import Frame, Stream
from redwood.server.generation import Event, Generation
from redwood.server.logs import Record
from redwood.server.responses import json_response
from redwood.server.served import Lease, Served
from redwood.server.streaming import ClientLeft, EventStream, until_left
from redwood.server.tools.parts import Part


async def answer(served: Served, request: Request, api: Api) -> Response:
    """Answers one request.

    Raises:
        ApiError: the error that the client gets.
        ClientLeft: the client has closed the connection.
    """
    if served.draining:
        raise unavailable("the server is stopping", "shutting_down")
    record: Record = request.scope["record"]
    owner = record.owner or "open"
    with served.admission.place(owner) as place:
        asked, wire = api.read(await _body(request))
        call = _Call(served, record, owner, api, asked, wire)
        if asked.stream and not served.has(call.model):
            return call.stream_once_loaded()
        try:
            reply = await until_left(request.receive, call.begin(place))
        except BaseException:
            call.release()
            raise
    return reply.stream() if asked.stream else await reply.whole(request)


async def count_tokens(served: Served, request: Request, api: Api) -> int:
    """Returns how many tokens the prompt of a request has.

    Raises: as `answer`.
    """
    record: Record = request.scope["record"]
    owner = record.owner or "open"
    with served.admission.place(owner) as place:
        asked, wire = api.read(await _body(request))
        call = _Call(served, record, owner, api, asked, wire)
        try:
            (prompt,) = await until_left(request.receive, call.prompts(place))
        finally:
            call.release()
    return len(prompt)


async def _body(request: Request) -> bytes:
    try:
        return await request.body()
    except ClientDisconnect:
        raise ClientLeft("disconnect") from None


def _served_name(served: Served, asked: schema.Request) -> str:
    names = served.settings.model_names
    if asked.model is not None and asked.model not in names:
        raise model_not_found(asked.model)
    if asked.redwood.trace and not served.settings.trace:
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


class _Call:
    """A request that has been read: from its model to the reply that has begun.

    Attributes: `model`: its name.

    Raises:
        ApiError: 404: there is no such model; 400: traces are not shown here.
    """

    def __init__(
        self, served: Served, record: Record, owner: str, api: Api, asked: schema.Request, wire: Any
    ) -> None:
        self._served, self._record, self._owner = served, record, owner
        self._api, self._asked, self._wire = api, asked, wire
        self.model = _served_name(served, asked)
        self._lease: Lease | None = None

    def release(self) -> None:
        """Gives the model back; for a reply that has not begun."""
        if self._lease is not None:
            self._lease.release()

    async def prompts(self, place: Place) -> list[list[int]]:
        """Returns the token ids of the request's prompts; as `begin`."""
        lease = await self._acquired(place)
        return await lease.service.preparer.prompts(self._asked)

    async def begin(self, place: Place) -> _Reply:
        """Returns the reply, once the model is loaded and the prompts are tokens.

        Args:
            place: of the request, which is counted with those that wait for the model if it does.

        Raises:
            ApiError: the model cannot be loaded, too many wait for it, the request is wrong.
        """
        waits = not self._served.has(self.model)
        lease = await self._acquired(place)
        service, asked = lease.service, self._asked
        loaded_s = perf_counter()
        generation = await service.preparer.prepare(asked, self._owner, self._record.started_s)
        if waits:
            generation.queued_s = loaded_s
        self._note(lease, generation)
        frame = self._api.frame(service, self._wire, self.model, generation)
        return _Reply(lease, self._record, asked, generation, frame)

    async def _acquired(self, place: Place) -> Lease:
        if not self._served.has(self.model):
            place.move(self._served.waiting_for(self.model))
        self._lease = await self._served.acquire(self.model, self._record.started_s)
        return self._lease

    def _note(self, lease: Lease, generation: Generation) -> None:
        prompts, asked = [choice.prompt for choice in generation.choices], self._asked
        self._record.details.update(
            stream=asked.stream,
            choices=len(prompts),
            prompt_tokens=sum(map(len, prompts[:: asked.n])),
        )
        if lease.service is not self._served:  # one of several
            self._record.details["model"] = self.model
        if self._served.settings.log_prompts:
            self._record.details["prompt"] = lease.service.engine.tokenizer.decode(prompts[0])

    def stream_once_loaded(self) -> Response:
        """Returns a stream that is kept alive by comments while the model is being loaded; what
        fails before the first of them has a status of its own, as elsewhere."""
        settings = self._served.settings
        begun: list[Stream] = []
        places: list[Place] = []

        @contextmanager
        def entering() -> Iterator[None]:
            with self._served.waiting_for(self.model).place(self._owner) as place:
                places.append(place)
                try:
                    yield
                finally:
                    self.release()

        async def parts() -> AsyncGenerator[bytes]:
            (place,) = places
            reply = await self.begin(place)
            place.leave()
            begun.append(stream := reply.events())
            with reply.lifetime():
                async with aclosing(reply.parts(stream)) as made:
                    async for part in made:
                        yield part

        def failed(error: ApiError) -> bytes:
            self._record.details.update(error=error.code)
            return begun[0].failed(error) if begun else self._api.failed(error)

        return EventStream(
            parts(),
            lifetime=entering(),
            ping_s=settings.ping_s,
            send_timeout_s=settings.send_timeout_s,
            failed=failed,
        )


class _Reply:
    """The response to one request, whole or streamed."""

    def __init__(
        self,
        lease: Lease,
        record: Record,
        asked: schema.Request,
        generation: Generation,
        frame: Frame,
    ) -> None:
        self._lease, self._service = lease, lease.service
        self._record, self._asked = record, asked
        self._generation, self._frame = generation, frame

    @contextmanager
    def lifetime(self) -> Iterator[None]:
        """Submits the request to the engine; on leaving, ends it there and gives the model back."""
        try:
            with self._service.serving(self._generation, self._record):
                yield
        finally:
            self._lease.release()

    async def whole(self, request: Request) -> Response:
        """Returns the complete answer; raises ClientLeft if the client leaves before that."""
        with self.lifetime():
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
        settings, stream = self._service.settings, self.events()

        def failed(error: ApiError) -> bytes:
            self._record.details.update(error=error.code)
            return stream.failed(error)

        return EventStream(
            self.parts(stream),
            lifetime=self.lifetime(),
            ping_s=settings.ping_s,
            send_timeout_s=settings.send_timeout_s,
            failed=failed,
        )

    def events(self) -> Stream:
        """Returns what makes server-sent events of the answer."""
        return self._frame.stream()

    async def _collect(self) -> list[list[Event]]:
        made: list[list[Event]] = [[] for _ in self._generation.choices]
        async with aclosing(self._events()) as events:
            async for each in events:
                made[each.choice].append(each)
        return made

    async def parts(self, stream: Stream) -> AsyncGenerator[bytes]:
        """Yields encoded events, one part for each event of the engine; within `lifetime`."""
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
