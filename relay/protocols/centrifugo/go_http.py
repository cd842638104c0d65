"""HTTP details of v1's Go handlers: form parsing and error pages."""

from __future__ import annotations

import binascii
import re
from email.message import Message

from aiohttp import web

from relay.core.slices import next_slice
from relay.transports.socket.bodies import BodyRejected, read_body

_MAX_FIELDS = 100
# Size of the pieces that are decoded at a time.
_PIECE_BYTES = 65536
_NAME = re.compile(rb'(?i)^content-disposition:[^\r\n]*[; ]name="([^"\r\n]*)"', re.MULTILINE)


async def form(request: web.Request, limit_bytes: int) -> dict[str, bytes]:
    """Return the fields of a form. As in Go's FormValue, the body takes precedence over the query.

    Raise ValueError if the form is malformed, and BodyRejected as `read_body` does.
    """
    fields = {name: value.encode() for name, value in reversed(list(request.query.items()))}
    kind = request.headers.get("Content-Type", "").lower()
    if kind.startswith("multipart/form-data"):
        fields |= _multipart(await read_body(request, limit_bytes), _boundary(request))
    elif kind.startswith("application/x-www-form-urlencoded"):
        fields |= await _urlencoded(await read_body(request, limit_bytes))
    return fields


async def _urlencoded(body: bytes) -> dict[str, bytes]:
    pairs = body.split(b"&", _MAX_FIELDS)
    if len(pairs) > _MAX_FIELDS:
        raise ValueError("too many fields")
    fields: dict[str, bytes] = {}
    for pair in pairs:
        name, _, value = pair.partition(b"=")
        if value:
            fields.setdefault((await _unquoted(name)).decode("latin-1"), await _unquoted(value))
    return fields


async def _unquoted(quoted: bytes) -> bytes:
    """Decode percent signs and plus signs, in short steps. urllib needs 3 s for 10 MB."""
    parts = []
    start = 0
    while start < len(quoted):
        end = start + _PIECE_BYTES
        # Don't cut within an escape sequence, which then starts in the last two bytes.
        cut = quoted.find(b"%", end - 2, end)
        piece = quoted[start : end if cut < 0 else cut]
        start += len(piece)
        # Quoted-printable uses the same escapes with "=", and its decoder is written in C.
        text = piece.replace(b"+", b" ").replace(b"=", b"=3D").replace(b"%", b"=")
        parts.append(binascii.a2b_qp(text))
        await next_slice()
    return b"".join(parts)


def _boundary(request: web.Request) -> bytes:
    header = Message()
    header["Content-Type"] = request.headers["Content-Type"]
    boundary = header.get_param("boundary")
    if not isinstance(boundary, str) or not boundary:
        raise ValueError("no boundary")
    return boundary.encode()


def _multipart(body: bytes, boundary: bytes) -> dict[str, bytes]:
    """Return the fields of a multipart form (RFC 7578); uploaded files are fields too."""
    parts = (b"\r\n" + body).split(b"\r\n--" + boundary, _MAX_FIELDS)
    fields: dict[str, bytes] = {}
    for part in parts[1:]:
        if part.startswith(b"--"):
            return fields
        head, _, value = part.partition(b"\r\n\r\n")
        name = _NAME.search(head[:_PIECE_BYTES])
        if name is not None:
            fields.setdefault(name[1].decode("latin-1"), value)
    raise ValueError("too many fields, or no end")


def error(status: int, text: str) -> web.Response:
    """Return the response of Go's http.Error."""
    return web.Response(
        status=status,
        text=f"{text}\n",
        content_type="text/plain",
        charset="utf-8",
        headers={"X-Content-Type-Options": "nosniff"},
    )


def body_error(rejected: BodyRejected) -> web.Response:
    """Return the response to a request whose body was rejected, with net/http's status text."""
    return error(rejected.status, _GO_STATUS_TEXT[rejected.status])


# From net/http. Python 3.11 has an older name for 413.
_GO_STATUS_TEXT = {
    400: "Bad Request",
    408: "Request Timeout",
    413: "Request Entity Too Large",
    415: "Unsupported Media Type",
    503: "Service Unavailable",
}
