"""JSON responses, and errors as responses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from redwood.server.errors import ApiError


def json_response(
    value: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Returns a value as a JSON response; raises ValueError for NaN and infinities."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return Response(text.encode(), status, headers, media_type="application/json")


def error_response(error: ApiError) -> Response:
    """Returns an error as a response."""
    return json_response(error.body, error.status, error.headers)
