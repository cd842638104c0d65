"""HTTP details of v1's Go handlers: form parsing and error pages."""

from __future__ import annotations

import binascii
import re
from email.message import Message

from aiohttp import web

from relay.core.slices import next_slice
from relay.doorkit.http_status import GO_STATUS_TEXT, go_error
from relay.transports.socket.bodies import BodyRejected, read_large_body

_MAX_FIELDS = 100
# Size of the pieces that are decoded at a time.
_PIECE_BYTES = 65536
_NAME = re.compile(rb'(?i)^content-disposition:[^\r\n]*[; ]name="([^"\r\n]*)"', re.MULTILINE)


async def form(request: web.Request, limit_bytes: int) -> dict[str, bytes | bytearray]:
    """Return the fields of a form. As in Go's FormValue, the body takes precedence over the query.

    Raise ValueError if the form is malformed, and BodyRejected as `read_large_body` does.
    """
    fields: dict[str, bytes | bytearray] = {
        name: value.encode() for name, value in reversed(list(request.query.items()))
    }
    kind = request.headers.get("Content-Type", "").lower()
    if kind.startswith("multipart/form-data"):
        body = await read_large_body(request, limit_bytes)
        fields |= await _multipart(body, _boundary(request))
    elif kind.startswith("application/x-www-form-urlencoded"):
        fields |= await _urlencoded(await read_large_body(request, limit_bytes))
    return fields


async def _urlencoded(body: bytearray) -> dict[str, bytearray]:
    if body.count(b"&") >= _MAX_FIELDS:
        raise ValueError("too many fields")
    fields: dict[str, bytearray] = {}
    start = 0
    while start < len(body):
        end = body.find(b"&", start)
        end = len(body) if end < 0 else end
        equals = body.find(b"=", start, end)
        if 0 <= equals < end - 1:
            name = (await _unquoted(body, start, equals)).decode("latin-1")
            value = await _unquoted(body, equals + 1, end)
            fields.setdefault(name, value)
        start = end + 1
    return fields


async def _unquoted(body: bytearray, start: int, end: int) -> bytearray:
    """Decode percent signs and plus signs, in short steps. urllib needs 3 s for 10 MB."""
    found = bytearray()
    while start < end:
        stop = min(start + _PIECE_BYTES, end)
        if stop < end:
            # Don't cut within an escape sequence, which then starts in the last two bytes.
            cut = body.find(b"%", stop - 2, stop)
            stop = stop if cut < 0 else cut
        piece = body[start:stop]
        start = stop
        # Quoted-printable uses the same escapes with "=", and its decoder is written in C.
        text = piece.replace(b"+", b" ").replace(b"=", b"=3D").replace(b"%", b"=")
        found += binascii.a2b_qp(text)
        await next_slice()
    return found


def _boundary(request: web.Request) -> bytes:
    header = Message()
    header["Content-Type"] = request.headers["Content-Type"]
    boundary = header.get_param("boundary")
    if not isinstance(boundary, str) or not boundary:
        raise ValueError("no boundary")
    return boundary.encode()


async def _multipart(body: bytearray, boundary: bytes) -> dict[str, bytearray]:
    """Return the fields of a multipart form (RFC 7578); uploaded files are fields too."""
    fields: dict[str, bytearray] = {}
    delimiter = b"\r\n--" + boundary
    body[:0] = b"\r\n"
    end = body.find(delimiter)
    for _ in range(_MAX_FIELDS):
        if end < 0:
            break
        start = end + len(delimiter)
        if body.startswith(b"--", start):
            return fields
        end = body.find(delimiter, start)
        stop = len(body) if end < 0 else end
        value = body.find(b"\r\n\r\n", start, stop)
        if value >= 0:
            name = _NAME.search(body[start : min(value, start + _PIECE_BYTES)])
            if name is not None:
                field = await _copied(body, value + 4, stop)
                fields.setdefault(name[1].decode("latin-1"), field)
        await next_slice()
    raise ValueError("too many fields, or no end")


async def _copied(body: bytearray, start: int, end: int) -> bytearray:
    found = bytearray()
    for at in range(start, end, _PIECE_BYTES):
        found += body[at : min(at + _PIECE_BYTES, end)]
        await next_slice()
    return found


def body_error(rejected: BodyRejected) -> web.Response:
    """Return the response to a request whose body was rejected, with net/http's status text."""
    return go_error(rejected.status, GO_STATUS_TEXT[rejected.status])
