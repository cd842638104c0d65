"""permessage-deflate without context takeover (RFC 7692), without I/O.

Each message is compressed by itself: a frame can be made once for all clients, and none of them
costs a compressor's memory.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aiohttp import web

AGREED = b"permessage-deflate; server_no_context_takeover; client_no_context_takeover"
# Every flush ends with these, and they are not sent (section 7.2.1).
_TAIL = b"\x00\x00\xff\xff"
_RAW = -zlib.MAX_WBITS
# Go's name for it; zlib has a strategy instead.
HUFFMAN_ONLY = -2


class InflateError(Exception):
    """What the client sent is not compressed as agreed."""


def is_offered(request: web.Request) -> bool:
    """Whether the client offers it in a form that can be agreed to."""
    return any(
        _can_agree([part.strip().lower() for part in offer.split(";")])
        for value in request.headers.getall("Sec-WebSocket-Extensions", ())
        for offer in value.split(",")
    )


def _can_agree(parts: list[str]) -> bool:
    name, *parameters = parts
    # A client that asks for a smaller window could not read what is made for all.
    return name == "permessage-deflate" and not any(
        parameter.startswith("server_max_window_bits") for parameter in parameters
    )


def deflate(message: bytes, level: int) -> bytes:
    """`level` as zlib's, or HUFFMAN_ONLY."""
    if level == HUFFMAN_ONLY:
        made = zlib.compressobj(1, zlib.DEFLATED, _RAW, strategy=zlib.Z_HUFFMAN_ONLY)
    else:
        made = zlib.compressobj(level, zlib.DEFLATED, _RAW)
    return (made.compress(message) + made.flush(zlib.Z_SYNC_FLUSH)).removesuffix(_TAIL)


def inflate(data: bytes, max_bytes: int) -> bytes | None:
    """The message; None if it is longer. Never holds more."""
    made = zlib.decompressobj(_RAW)
    try:
        message = made.decompress(data + _TAIL, max_bytes + 1)
    except zlib.error:
        raise InflateError("not as permessage-deflate has it") from None
    return message if len(message) <= max_bytes else None
