"""The routes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from redwood import __version__
from redwood.server import apis, schema
from redwood.server.answering import answer, count_tokens, model_not_found
from redwood.server.document import ANTHROPIC_ERROR, body_of, complete, route_responses
from redwood.server.errors import CLIENT_LEFT, ApiError, as_api_error, internal_error, wrong
from redwood.server.messages_request import CountRequest, MessagesRequest
from redwood.server.metrics import CONTENT_TYPE
from redwood.server.middleware import OuterMiddleware
from redwood.server.responses import error_response, json_response
from redwood.server.responses_request import ResponsesRequest
from redwood.server.service import Service
from redwood.server.streaming import ClientLeft

JSON, EVENTS = "application/json", "text/event-stream"
STATIC = Path(__file__).parent / "static"
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def create_app(service: Service, static: Path = STATIC) -> ASGIApp:
    """Returns the ASGI application of a service; its lifespan runs the engine's thread.

    Args:
        static: folder of the web page; none is served without it.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.worker.start(asyncio.get_running_loop())
        try:
            yield
        finally:
            await asyncio.to_thread(service.worker.stop)
            service.preparer.close()

    app = FastAPI(
        title="Redwood",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # behind a TLS proxy it would redirect to http://, key included
    )
    _add_answers(app, service)
    _add_models(app, service)
    _add_state(app, service)
    if static.is_dir():
        _add_page(app, static)
    _add_errors(app)
    complete(app)
    return OuterMiddleware(app, service.settings, service.keys, service.metrics)


def _add_answers(app: FastAPI, service: Service) -> None:
    given = route_responses(404, 408, 415, 429, 503, 504, kinds=(JSON, EVENTS))

    @app.post("/v1/chat/completions", openapi_extra=body_of(schema.ChatRequest), responses=given)
    async def chat_completions(request: Request) -> Response:
        """Answers a chat."""
        return await answer(service, _of_json(request), apis.CHAT)

    @app.post("/v1/completions", openapi_extra=body_of(schema.CompletionRequest), responses=given)
    async def completions(request: Request) -> Response:
        """Continues texts."""
        return await answer(service, _of_json(request), apis.COMPLETIONS)

    @app.post("/v1/responses", openapi_extra=body_of(ResponsesRequest), responses=given)
    async def responses(request: Request) -> Response:
        """Answers a conversation; nothing is stored."""
        return await answer(service, _of_json(request), apis.RESPONSES)

    theirs = route_responses(
        404, 408, 415, 429, 503, 504, kinds=(JSON, EVENTS), error=ANTHROPIC_ERROR
    )

    @app.post("/v1/messages", openapi_extra=body_of(MessagesRequest), responses=theirs)
    async def messages(request: Request) -> Response:
        """Answers a chat, as Anthropic's API does."""
        return await answer(service, _of_json(request), apis.MESSAGES)

    counted = route_responses(404, 408, 415, 429, 503, error=ANTHROPIC_ERROR)

    @app.post("/v1/messages/count_tokens", openapi_extra=body_of(CountRequest), responses=counted)
    async def count(request: Request) -> Response:
        """Counts the tokens of a chat's prompt."""
        found = await count_tokens(service, _of_json(request), apis.COUNT)
        return json_response({"input_tokens": found})

    @app.post("/v1/embeddings", responses=route_responses())
    async def embeddings(request: Request) -> Response:
        """Refuses: this server only makes text."""
        raise wrong(
            "embeddings are not made here: Redwood serves one model that makes text; run an "
            "embedding server beside it",
            code="unsupported_endpoint",
        )


def _add_models(app: FastAPI, service: Service) -> None:
    def described(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": service.created,
            "owned_by": "redwood",
            "max_model_len": service.engine.target.capacity,
            "redwood": {"template_options": service.preparer.template_options},
        }

    @app.get("/v1/models", responses=route_responses())
    async def models() -> Response:
        """Lists the names of the model."""
        names = service.settings.model_names
        return json_response({"object": "list", "data": [described(name) for name in names]})

    @app.get("/v1/models/{name:path}", responses=route_responses(404))
    async def model(name: str) -> Response:
        """Describes one of them."""
        if name not in service.settings.model_names:
            raise model_not_found(name)
        return json_response(described(name))


def _add_state(app: FastAPI, service: Service) -> None:
    def state() -> dict[str, Any]:
        return {
            "heartbeat_age_s": round(service.worker.heartbeat_age_s, 3),
            "running": service.admission.num_running,
            "waiting": service.admission.num_waiting,
        }

    states = route_responses(key=False)
    states[503] = {"description": "`status` names the trouble.", "content": {JSON: {}}}

    @app.get("/health", responses=states)
    async def health() -> Response:
        """200 while the engine works; 503 when it is dead, stalled, or all its steps fail."""
        trouble = service.trouble()
        return json_response({"status": trouble or "ok", **state()}, 503 if trouble else 200)

    @app.get("/ready", responses=states)
    async def ready() -> Response:
        """200 while new requests are accepted."""
        trouble = "shutting_down" if service.draining else service.trouble()
        return json_response({"status": trouble or "ok", **state()}, 503 if trouble else 200)

    @app.get("/metrics", response_class=Response, responses=route_responses(kinds=("text/plain",)))
    async def metrics() -> Response:
        """All metrics in Prometheus's text format."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/version", responses=route_responses())
    async def version() -> Response:
        """The version of Redwood."""
        return json_response({"version": __version__})


def _add_page(app: FastAPI, static: Path) -> None:
    headers = {"content-security-policy": _PAGE_POLICY}

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return FileResponse(static / "index.html", headers=headers)

    app.mount("/static", StaticFiles(directory=static), name="static")


def _add_errors(app: FastAPI) -> None:
    async def api_error(request: Request, error: Exception) -> Response:
        sent = as_api_error(error)
        request.scope["record"].details["error"] = sent.code
        return error_response(sent, request.scope)

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path = request.scope["path"][:100]
        messages = {
            404: f"there is no {path!r} here",
            405: f"{request.method} is not possible on {path!r}",
        }
        message = messages.get(error.status_code, str(error.detail))
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        return await api_error(
            request, ApiError(error.status_code, message, code=code, headers=error.headers)
        )

    async def bug(request: Request, error: Exception) -> Response:
        if isinstance(error, ClientLeft):  # `OuterMiddleware` logs and counts it
            return Response(status_code=CLIENT_LEFT)
        return await api_error(request, internal_error())

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, bug)


def _of_json(request: Request) -> Request:
    """The request, if its content type is JSON, which a plain web form cannot send."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "send the header Content-Type: application/json", code="content_type")
    return request
