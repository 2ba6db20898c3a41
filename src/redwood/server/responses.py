"""JSON responses, and errors as responses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Scope

from redwood.server.errors import ApiError, anthropic_body

ANTHROPIC = "/v1/messages"
"""Paths that begin so have Anthropic's errors."""
CODE_HEADER = "x-error-code"
"""Has the code of an error in Anthropic's shape, which has no field for it."""


def json_response(
    value: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Returns a value as a JSON response; raises ValueError for NaN and infinities."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return Response(text.encode(), status, headers, media_type="application/json")


def error_response(error: ApiError, scope: Scope) -> Response:
    """Returns an error as a response, in the shape of the API that was called."""
    body, headers = error.body, error.headers
    if scope["path"].startswith(ANTHROPIC):
        body = anthropic_body(error, scope["record"].request_id)
        headers = {**headers, CODE_HEADER: error.code}
    return json_response(body, error.status, headers)
