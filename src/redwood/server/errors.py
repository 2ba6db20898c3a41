"""HTTP errors in OpenAI's shape, and which error of Redwood becomes which.

Codes: 400 invalid request, 401 API key, 403 Host header, 404 model or route, 405 method, 408 body
too slow, 413 body too large, 415 content type, 429 queue full (with Retry-After), 500 internal
error, 503 stopping or engine down, 504 deadline. 499 is used in logs and metrics only: the client
closed the connection.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from redwood.errors import (
    ArgumentError,
    CapacityError,
    NumericalError,
    RedwoodError,
    UnsupportedError,
)

CLIENT_LEFT = 499
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_NO_RETRY = {"x-should-retry": "false"}  # OpenAI's client would repeat what must fail again


class ApiError(RedwoodError):
    """An error to be sent to the client.

    Args:
        status: HTTP status code.
        message: for people; never contains prompt text or secrets.
        code: for programs, such as "model_not_found".
        param: the request's field that was wrong.
        headers: additional response headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body: OpenAI's four fields."""
        kind = _TYPES.get(self.status)
        if kind is None:
            kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def event(self) -> bytes:
        """The same as a server-sent event, for a stream that has begun."""
        return b"data: " + json.dumps(self.body).encode() + b"\n\n"


def wrong(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """Returns a 400."""
    return ApiError(400, message, code=code, param=param)


def full(message: str, code: str = "queue_full", *, retry_after_s: int = 1) -> ApiError:
    """Returns a 429 with a Retry-After header."""
    return ApiError(429, message, code=code, headers={"retry-after": str(retry_after_s)})


def unavailable(message: str, code: str, *, retry_after_s: int = 5) -> ApiError:
    """Returns a 503 with a Retry-After header."""
    return ApiError(503, message, code=code, headers={"retry-after": str(retry_after_s)})


def too_long(timeout_s: float) -> ApiError:
    """Returns the 504 of a request that was not answered within its time."""
    message = f"the request took longer than {timeout_s:g} seconds"
    return ApiError(504, message, code="timeout", headers=_NO_RETRY)


def as_api_error(error: BaseException) -> ApiError:
    """Returns the error that the client gets for an error of the engine."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, CapacityError):
        return wrong(str(error), code="context_length_exceeded")
    if isinstance(error, ArgumentError):
        return wrong(str(error))
    if isinstance(error, UnsupportedError):
        return wrong(str(error), code="unsupported_parameter")
    if _out_of_memory(error):
        return unavailable("the engine ran out of memory for this request", "out_of_memory")
    if isinstance(error, NumericalError):
        return ApiError(500, str(error), code="engine_numerics", headers=_NO_RETRY)
    if isinstance(error, RedwoodError):
        return ApiError(500, str(error), code="engine_error", headers=_NO_RETRY)
    return ApiError(
        500,
        f"the engine failed ({type(error).__name__}); the server's log says where",
        code="engine_error",
        headers=_NO_RETRY,
    )


def internal_error() -> ApiError:
    """Returns the 500 for an unexpected error, whose traceback is in the log."""
    message = "the server failed; its log says where"
    return ApiError(500, message, code="internal_error", headers=_NO_RETRY)


def _out_of_memory(error: BaseException) -> bool:
    return (
        isinstance(error, MemoryError)
        or "OutOfMemory" in type(error).__name__
        or "DefaultCPUAllocator" in str(error)  # PyTorch's message for host memory
    )


_ANTHROPIC = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def anthropic_body(error: ApiError, request_id: str | None = None) -> dict[str, Any]:
    """Returns an error in Anthropic's shape."""
    kind = _ANTHROPIC.get(error.status, "api_error" if error.status >= 500 else _ANTHROPIC[400])
    body: dict[str, Any] = {"type": "error", "error": {"type": kind, "message": error.message}}
    return body if request_id is None else {**body, "request_id": request_id}


def responses_event(error: ApiError, number: int) -> dict[str, Any]:
    """Returns an error as the event that ends a stream of /v1/responses.

    Args:
        number: of the event in the stream, from 0.
    """
    said = error.body["error"]
    told = {"type": "error", "code": said["code"], "message": said["message"]}
    return {**told, "param": said["param"], "sequence_number": number}
