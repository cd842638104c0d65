"""HTTP status codes of relay's errors, and the error responses of Go's servers."""

from __future__ import annotations

from aiohttp import web

from relay.core.errors import (
    BadRequest,
    Forbidden,
    LimitExceeded,
    RelayError,
    Unauthorized,
    Unavailable,
)

_BY_ERROR: dict[type[RelayError], int] = {
    BadRequest: 400,
    Unauthorized: 401,
    Forbidden: 403,
    LimitExceeded: 429,
    Unavailable: 503,
}
# Go's http.StatusText, for rejected request bodies. Python 3.11 has an older name for 413.
GO_STATUS_TEXT = {
    400: "Bad Request",
    408: "Request Timeout",
    413: "Request Entity Too Large",
    415: "Unsupported Media Type",
    503: "Service Unavailable",
}


def status_of(error: RelayError) -> int:
    """Return the status of the response to a request that failed with this error."""
    return _BY_ERROR.get(type(error), 400)


def go_error(status: int, text: str) -> web.Response:
    """Return the response of Go's `http.Error`."""
    return web.Response(
        status=status,
        text=f"{text}\n",
        content_type="text/plain",
        charset="utf-8",
        headers={"X-Content-Type-Options": "nosniff"},
    )
