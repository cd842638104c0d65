"""Request bodies: the only place that reads them.

Compressed bodies are rejected: no client or producer of the supported protocols compresses its
requests, and a compressed megabyte can expand to a gigabyte. `http_connection` disables aiohttp's
decompression too.

    body = await read_body(request, limit_bytes=65536)

Check the path, the credentials and the content type before reading the body. A handler whose
protocol defines error responses catches `BodyRejected`; otherwise a plain response is sent. If the
response is sent before the whole body has arrived, the connection is closed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, cast

from aiohttp.web_protocol import RequestPayloadError

if TYPE_CHECKING:
    from aiohttp import web
    from aiohttp.streams import StreamReader

    from relay.transports.socket.http_connection import HttpConnection

_log = logging.getLogger(__name__)

BODY_TIMEOUT_S = 30.0
# Limit for all bodies that one worker reads or handles at a time.
TOTAL_BYTES = 64 * 1024 * 1024

_REASONS = {
    400: "the body is malformed",
    408: f"the body did not arrive within {BODY_TIMEOUT_S:.0f} s",
    413: "the body is larger than {limit}",
    415: "compressed bodies are not accepted",
    503: "too many request bodies at the same time; try again",
}


class BodyRejected(Exception):
    """A request body was rejected.

    `status` is one of 400 (malformed), 408 (too slow), 413 (too large), 415 (compressed) and 503
    (the worker holds too many bodies). The text can be sent to the client.
    """

    def __init__(self, status: int, limit: str = "") -> None:
        super().__init__(_REASONS[status].format(limit=limit))
        self.status = status


class Bodies:
    """The request bodies in a worker's memory, each from its first byte to the end of its request,
    and the large WebSocket messages of which a part has arrived.

    When all together exceed `total_bytes`, the largest one that is still incomplete is rejected. A
    peer that sends many large bodies therefore rejects its own, and the small bodies of others
    still arrive.
    """

    def __init__(self, total_bytes: int = TOTAL_BYTES) -> None:
        self._total_bytes = total_bytes
        self._sizes: dict[asyncio.BaseProtocol, int] = {}
        # Callbacks that reject incomplete bodies.
        self._arriving: dict[asyncio.BaseProtocol, Callable[[], None]] = {}
        self._sum = 0

    @property
    def held_bytes(self) -> int:
        """The size of all bodies in memory."""
        return self._sum

    async def read(
        self, owner: HttpConnection, content: StreamReader, limit_bytes: int
    ) -> bytearray | None:
        """Return the body, or None if it is larger than `limit_bytes`.

        Raise BodyRejected, or ConnectionError if the client disconnects.
        """
        # Joining the parts of 10 MB in one step would take 10 ms.
        body = bytearray()
        complete = False
        self._arriving[owner] = partial(content.set_exception, BodyRejected(503))
        try:
            while True:
                # aiohttp does not report a disconnect that preceded the handler's start.
                if not owner.connected and not content.is_eof():
                    raise ConnectionResetError("the client disconnected")
                if not (part := await content.readany()):
                    break
                body += part
                if len(body) > limit_bytes:
                    return None
                self._set(owner, self._sizes.get(owner, 0) + len(part))
                if owner not in self._arriving:
                    raise BodyRejected(503)
            complete = True
            return body
        finally:
            self._arriving.pop(owner, None)
            if not complete:
                # The exception's traceback would keep the data until the garbage collector runs.
                body.clear()
                part = b""

    def hold(
        self, owner: asyncio.BaseProtocol, size_bytes: int, reject: Callable[[], None]
    ) -> None:
        """Count an incomplete message of which `size_bytes` have arrived, until `release`.

        `reject` is called, perhaps immediately, if the message exceeds the total.
        """
        self._arriving[owner] = reject
        self._set(owner, size_bytes)

    def release(self, owner: asyncio.BaseProtocol) -> None:
        """Stop counting the body or message of this connection."""
        self._sum -= self._sizes.pop(owner, 0)
        self._arriving.pop(owner, None)

    def _set(self, owner: asyncio.BaseProtocol, size: int) -> None:
        self._sum += size - self._sizes.get(owner, 0)
        self._sizes[owner] = size
        # A single body may exceed the total if its protocol's limit is higher.
        while self._sum > self._total_bytes and len(self._sizes) > 1 and self._arriving:
            largest = max(self._arriving, key=lambda each: self._sizes.get(each, 0))
            reject = self._arriving[largest]
            self.release(largest)
            reject()


async def read_body(request: web.Request, limit_bytes: int, setting: str = "") -> bytes:
    """Return the request's body, of at most `limit_bytes`; `setting` is the name of that limit.

    Raise BodyRejected if it is compressed, too large, too slow or malformed, or if the worker holds
    too many bodies. Raise ConnectionError if the client disconnects.
    """
    return bytes(await read_large_body(request, limit_bytes, setting))


async def read_large_body(request: web.Request, limit_bytes: int, setting: str = "") -> bytearray:
    """Do the same as `read_body`, for bodies that are too large to be copied in one step."""
    try:
        return await _read(request, limit_bytes, f"{setting or 'the limit'} ({limit_bytes} bytes)")
    except BodyRejected as exc:
        info = cast("HttpConnection", request.protocol).info(request)
        address = info.address or "a client that has disconnected"
        _log.warning("Rejected a request of %s with status %d: %s", address, exc.status, exc)
        raise


async def _read(request: web.Request, limit_bytes: int, limit: str) -> bytearray:
    encoding = request.headers.get("Content-Encoding", "").strip().lower()
    if encoding not in ("", "identity"):
        raise BodyRejected(415)
    if (request.content_length or 0) > limit_bytes:
        raise BodyRejected(413, limit)
    if not request.can_read_body:
        return bytearray()
    connection = cast("HttpConnection", request.protocol)
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            body = await connection.limits.bodies.read(connection, request.content, limit_bytes)
    except TimeoutError:
        raise BodyRejected(408) from None
    except RequestPayloadError:
        raise BodyRejected(400) from None
    if body is None:
        raise BodyRejected(413, limit)
    return body
