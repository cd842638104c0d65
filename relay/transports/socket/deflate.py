"""permessage-deflate without context takeover (RFC 7692). Pure functions.

Each message is compressed independently. A frame can be encoded once for all clients, and clients
need no memory for a compressor.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aiohttp import web

AGREED = b"permessage-deflate; server_no_context_takeover; client_no_context_takeover"
# The end of every flush, which is not sent (section 7.2.1).
_TAIL = b"\x00\x00\xff\xff"
_RAW = -zlib.MAX_WBITS
# The name in Go. In zlib it is a strategy and not a level.
HUFFMAN_ONLY = -2


class InflateError(Exception):
    """The client's message is not valid permessage-deflate data."""


def is_offered(request: web.Request) -> bool:
    """Return True if the client offers permessage-deflate with acceptable parameters."""
    return any(
        _can_agree([part.strip().lower() for part in offer.split(";")])
        for value in request.headers.getall("Sec-WebSocket-Extensions", ())
        for offer in value.split(",")
    )


def _can_agree(parts: list[str]) -> bool:
    name, *parameters = parts
    # Frames are shared by all clients, so a smaller window cannot be used for one of them.
    return name == "permessage-deflate" and not any(
        parameter.startswith("server_max_window_bits") for parameter in parameters
    )


def deflate(message: bytes, level: int) -> bytes:
    """Compress a message. `level` is zlib's level or HUFFMAN_ONLY."""
    if level == HUFFMAN_ONLY:
        made = zlib.compressobj(1, zlib.DEFLATED, _RAW, strategy=zlib.Z_HUFFMAN_ONLY)
    else:
        made = zlib.compressobj(level, zlib.DEFLATED, _RAW)
    return (made.compress(message) + made.flush(zlib.Z_SYNC_FLUSH)).removesuffix(_TAIL)


def inflate(data: bytes, max_bytes: int) -> bytes | None:
    """Decompress a message. Return None if it is longer than `max_bytes`.

    At most `max_bytes` + 1 bytes are decompressed. Raise InflateError if the data is invalid.
    """
    made = zlib.decompressobj(_RAW)
    try:
        message = made.decompress(data + _TAIL, max_bytes + 1)
    except zlib.error:
        raise InflateError("invalid permessage-deflate data") from None
    return message if len(message) <= max_bytes else None
