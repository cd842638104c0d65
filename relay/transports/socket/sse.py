"""text/event-stream: a connection that is only written to, and the blocks that it is sent.

The syntax is that of the WHATWG HTML standard, "Server-sent events", section 9.2.6.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from relay.transports.socket.client_socket import ClientSocket

if TYPE_CHECKING:
    from relay.transports.socket.heartbeat import Heartbeat
    from relay.transports.socket.reaper import Reaper

HEARTBEAT = b":\n\n"
# A client has nothing to say after its request; this much is forgiven.
_INPUT_LIMIT_BYTES = 65536


def head(extra: Mapping[str, str] | None = None) -> bytes:
    """The answer's head. Neither length nor chunks: the body ends with the connection, so that the
    same bytes serve every client."""
    lines = [
        "HTTP/1.1 200 OK",
        "Content-Type: text/event-stream",
        "Cache-Control: no-store",
        # nginx would otherwise hold events back until its buffer is full.
        "X-Accel-Buffering: no",
        "Connection: close",
    ]
    for name, value in (extra or {}).items():
        if any(char in name + value for char in "\r\n\0"):
            raise ValueError(f"header {name!r} has a line break")
        lines.append(f"{name}: {value}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def block(data: bytes, *, id: bytes | None = None, event: bytes | None = None) -> bytes:
    """One event. Its data arrives as it is, but with every line break as LF."""
    # CR, LF and CRLF each end a line for the client, which joins the data lines with LF.
    if b"\r" in data:
        data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    body = b"data: " + data.replace(b"\n", b"\ndata: ") + b"\n\n"
    if event is not None:
        if b"\n" in event or b"\r" in event:
            raise ValueError("an event's name has a line break")
        body = b"event: " + event + b"\n" + body
    if id is not None:
        body = b"id: " + _checked_id(id) + b"\n" + body
    return body


def id_only(id: bytes) -> bytes:
    """A block that moves the client's last event ID and dispatches nothing."""
    return b"id: " + _checked_id(id) + b"\n\n"


def retry(retry_ms: int) -> bytes:
    """A block that sets how long the client waits before it connects again."""
    return b"retry: %d\n\n" % retry_ms


def _checked_id(event_id: bytes) -> bytes:
    # The standard has clients ignore an ID with NUL in it: they would resume from the wrong place.
    if b"\n" in event_id or b"\r" in event_id or b"\0" in event_id:
        raise ValueError("an event's ID has a line break or NUL")
    return event_id


class SseConnection(ClientSocket):
    """A client of an event stream. What it sends is ignored, and too much of it cuts it off."""

    __slots__ = ("_input_bytes",)

    def __init__(
        self, *, buffer_bytes: int, reaper: Reaper, heartbeat: Heartbeat | None = None
    ) -> None:
        super().__init__(buffer_bytes=buffer_bytes, reaper=reaper, heartbeat=heartbeat)
        self._input_bytes = 0

    def data_received(self, data: bytes) -> None:
        """Count and drop."""
        self._input_bytes += len(data)
        if self._input_bytes > _INPUT_LIMIT_BYTES:
            self.abort()
