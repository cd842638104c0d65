"""Server-sent events: response head and connection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from typing_extensions import override

from relay.core.client_libraries import EVENT_STREAM, STREAMED
from relay.transports.socket.client_socket import ClientSocket

if TYPE_CHECKING:
    from relay.transports.socket.heartbeat import Heartbeat
    from relay.transports.socket.reaper import Reaper

# Clients send nothing after their request. Up to this much is tolerated.
_INPUT_LIMIT_BYTES = 65536


HEADERS = {
    "Content-Type": EVENT_STREAM,
    "Cache-Control": STREAMED,
    # Otherwise nginx would buffer events.
    "X-Accel-Buffering": "no",
}


def head(extra: Mapping[str, str] | None = None) -> bytes:
    """Return the response head.

    The body is not chunked and ends with the connection, so that all clients get the same bytes.
    """
    lines = [
        "HTTP/1.1 200 OK",
        "Connection: close",
    ]
    for name, value in {**HEADERS, **(extra or {})}.items():
        if any(char in name + value for char in "\r\n\0"):
            raise ValueError(f"header {name!r} has a line break")
        lines.append(f"{name}: {value}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


class SseConnection(ClientSocket):
    """A client of an event stream. It is aborted if it sends too much data."""

    __slots__ = ("_input_bytes",)

    def __init__(
        self, *, buffer_bytes: int, reaper: Reaper, heartbeat: Heartbeat | None = None
    ) -> None:
        super().__init__(buffer_bytes=buffer_bytes, reaper=reaper, heartbeat=heartbeat)
        self._input_bytes = 0

    @property
    @override
    def transport_name(self) -> str:
        return "sse"

    def data_received(self, data: bytes) -> None:
        """Ignore the data, and abort if it exceeds the limit."""
        self._input_bytes += len(data)
        if self._input_bytes > _INPUT_LIMIT_BYTES:
            self.abort()
