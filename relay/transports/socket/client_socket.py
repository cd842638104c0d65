"""One client's connection after it has been taken over from aiohttp.

There is no task per client: the event loop calls the methods here, and these call the owner. The
state per client is small, because the memory of idle clients limits how many a host can serve.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from typing_extensions import override

if TYPE_CHECKING:
    from relay.core.connection import ConnectionInfo
    from relay.core.reasons import Reason
    from relay.transports.socket.bodies import Bodies
    from relay.transports.socket.heartbeat import Heartbeat
    from relay.transports.socket.reaper import Reaper


def _ignore() -> None:
    """Default callback."""


class ClientSocket(asyncio.Protocol):
    """Writes to one client.

    The owner sets the callbacks and passes the object to `take_over`:

    - `on_full` is called during the write that fills the buffer beyond `buffer_bytes`. Writes are
      still accepted then; the owner has to stop.
    - `on_drained` is called when the buffer has shrunk to a quarter of that.
    - `on_closed` is called exactly once, even if the client disconnected before the take-over.
      After `close` or `abort` it is the only callback.
    """

    __slots__ = (
        "_buffer_bytes",
        "_heartbeat",
        "_reading_paused",
        "_reaper",
        "_silent_since",
        "_transport",
        "beat_age",
        "beat_slot",
        "bodies",
        "close_code",
        "closing",
        "ending",
        "full",
        "info",
        "on_closed",
        "on_drained",
        "on_full",
        "pinged",
        "quiet",
    )

    def __init__(
        self, *, buffer_bytes: int, reaper: Reaper, heartbeat: Heartbeat | None = None
    ) -> None:
        self._transport: asyncio.Transport | None = None
        self._buffer_bytes = buffer_bytes
        self._reaper = reaper
        self._heartbeat = heartbeat
        self.full = False
        # Describes the connection. None before the take-over.
        self.info: ConnectionInfo | None = None
        # The code of the client's close frame, and why this side has closed the connection.
        self.close_code: int | None = None
        self.ending: Reason | None = None
        # Also True before the take-over, while there is no transport to write to.
        self.closing = True
        self.on_full: Callable[[], None] = _ignore
        self.on_drained: Callable[[], None] = _ignore
        self.on_closed: Callable[[], None] = _ignore
        # State of the heartbeat. It is stored here to avoid another object per client.
        self.beat_slot = -1
        self.beat_age = 0
        self.quiet = True
        self.pinged = False
        self._silent_since = 0
        self._reading_paused = False
        # The worker's limit for incomplete messages; None before the take-over.
        self.bodies: Bodies | None = None

    # ---- for the owner ---------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """Send `data` as soon as possible. Do nothing if the connection is closing."""
        if not self.closing:
            self.quiet = False
            self._transport.write(data)  # type: ignore[union-attr]  # set unless closing

    def close(self, last: bytes = b"") -> None:
        """Send pending data and `last`, then close. Abort if the client does not receive it."""
        if self.closing:
            return
        self.closing = True
        transport = cast("asyncio.Transport", self._transport)
        if last:
            transport.write(last)
        self._reaper.watch(self)
        self._finish_closing(transport, close_frame_sent=bool(last))

    def abort(self) -> None:
        """Close immediately and drop pending data."""
        self.closing = True
        if self._transport is not None:
            self._transport.abort()

    def pause_reading(self) -> None:
        """Stop reading from the client, including its responses to heartbeats."""
        self._reading_paused = True
        self._silent_since = 0
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Continue reading from the client."""
        self._reading_paused = False
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    @property
    def silent_since(self) -> int:
        """The heartbeat tick since which a response is due, or 0 if no response is expected."""
        return self._silent_since

    @silent_since.setter
    def silent_since(self, tick: int) -> None:
        # While reading is paused, a client counts as silent only if it receives nothing either.
        self._silent_since = 0 if self._reading_paused and not self.full else tick

    def peer(self) -> str:
        """Return the client's address, or '' if it is unknown (Unix socket, or disconnected)."""
        address = self._transport.get_extra_info("peername") if self._transport else None
        return str(address[0]) if isinstance(address, tuple) else ""

    def waiting_bytes(self) -> int:
        """Return the number of bytes in the send buffer, without the kernel's buffer."""
        return self._transport.get_write_buffer_size() if self._transport else 0

    @property
    def transport_name(self) -> str:
        """The way in which the client is connected, for operators."""
        return "http"

    @property
    def carrier(self) -> asyncio.Transport | None:
        """The connection to the client, or None if it is not open."""
        return self._transport

    # -- for the event loop ----------------------------------------------------------------------

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # aiohttp has set TCP_NODELAY and SO_KEEPALIVE when it accepted the connection.
        self._transport = cast("asyncio.Transport", transport)
        self.closing = False
        self._transport.set_write_buffer_limits(
            high=self._buffer_bytes, low=self._buffer_bytes // 4
        )
        if self._heartbeat is not None:
            self._heartbeat.add(self)

    @override
    def pause_writing(self) -> None:
        self.full = True
        if not self.closing:
            self.on_full()

    @override
    def resume_writing(self) -> None:
        self.full = False
        # The client is receiving, if slowly.
        self.silent_since = 0
        if not self.closing:
            self.on_drained()

    @override
    def eof_received(self) -> None:
        # No protocol has half-open connections.
        if self.closing:
            if self._transport is not None:
                self._transport.close()
        else:
            self.close()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self.closing = True
        self._transport = None
        self._reaper.forget(self)
        if self._heartbeat is not None:
            self._heartbeat.remove(self)
        on_closed = self.on_closed
        self._clear_callbacks()
        on_closed()

    # -- for subclasses --------------------------------------------------------------------------

    def _finish_closing(self, transport: asyncio.Transport, *, close_frame_sent: bool) -> None:
        """Close once the buffer is flushed."""
        del close_frame_sent
        transport.close()

    def _clear_callbacks(self) -> None:
        """Break the reference cycle with the owner, which only the garbage collector would free."""
        self.on_full = self.on_drained = self.on_closed = _ignore
