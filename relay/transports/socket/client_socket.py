"""One client's socket after aiohttp has answered its request: the only owner of the transport.

No task waits for a client: the event loop calls the methods here, and these call the owner. What
is kept per client is a handful of slots, because an idle client's memory is what limits a node.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from relay.transports.socket.heartbeat import Heartbeat
    from relay.transports.socket.reaper import Reaper


def _nothing() -> None:
    """The callback of an owner who does not care, or does not care any more."""


class ClientSocket(asyncio.Protocol):
    """Writes to one client and tells its owner how that goes.

    The owner sets the callbacks, then hands the object to `take_over`. `on_full` is called inside
    the write that fills the buffer beyond `buffer_bytes`; writes are still accepted then, and it is
    for the owner to stop. `on_drained` follows once three quarters are gone. `on_closed` is called
    exactly once, even if the client was gone before the take-over; after `close` or `abort` it is
    the only callback that still comes.
    """

    __slots__ = (
        "_buffer_bytes",
        "_heartbeat",
        "_reaper",
        "_silent_since",
        "_transport",
        "_unheard",
        "beat_slot",
        "closing",
        "full",
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
        # True before the take-over too: until then a write has nowhere to go.
        self.closing = True
        self.on_full: Callable[[], None] = _nothing
        self.on_drained: Callable[[], None] = _nothing
        self.on_closed: Callable[[], None] = _nothing
        # The heartbeat's notes, kept here so that it needs no object of its own per client.
        self.beat_slot = -1
        self.quiet = True
        self.pinged = False
        self._silent_since = 0
        self._unheard = False

    # -- for the owner ---------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """Send `data` as soon as the socket takes it; swallowed if the socket is closing."""
        if not self.closing:
            self.quiet = False
            self._transport.write(data)  # type: ignore[union-attr]  # not closing: it is there

    def close(self, last: bytes = b"") -> None:
        """Send what waits and then `last`, and close; aborted if the client does not take it."""
        if self.closing:
            return
        self.closing = True
        transport = cast("asyncio.Transport", self._transport)
        if last:
            transport.write(last)
        self._reaper.watch(self)
        self._hang_up(transport, said_goodbye=bool(last))

    def abort(self) -> None:
        """Close now; what waits is lost."""
        self.closing = True
        if self._transport is not None:
            self._transport.abort()

    def leave(self) -> None:
        """The worker that has the client's socket stops, and it is not this one: end it, so that
        the client comes again elsewhere. Those that can spare the client more do so."""
        self.close()

    def pause_reading(self) -> None:
        """Nothing more from the client for now; what it sends on waits in the kernel, an answer to
        the heartbeat too."""
        self._unheard = True
        self._silent_since = 0
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Go on with it."""
        self._unheard = False
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    @property
    def silent_since(self) -> int:
        """The heartbeat's note of when the client should have begun to answer; 0: it need not."""
        return self._silent_since

    @silent_since.setter
    def silent_since(self, tick: int) -> None:
        # Who is not read cannot be silent; but one that is full and takes nothing is.
        self._silent_since = 0 if self._unheard and not self.full else tick

    def peer(self) -> str:
        """The client's address as text, or '' where there is none (a Unix socket, or gone)."""
        address = self._transport.get_extra_info("peername") if self._transport else None
        return str(address[0]) if isinstance(address, tuple) else ""

    def waiting_bytes(self) -> int:
        """What this process still holds for the client, the kernel's own buffer not counted."""
        return self._transport.get_write_buffer_size() if self._transport else 0

    # -- for the event loop ----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by `take_over` with the transport that aiohttp had opened."""
        # TCP_NODELAY and SO_KEEPALIVE are on already: aiohttp sets both when it accepts.
        self._transport = cast("asyncio.Transport", transport)
        self.closing = False
        self._transport.set_write_buffer_limits(
            high=self._buffer_bytes, low=self._buffer_bytes // 4
        )
        if self._heartbeat is not None:
            self._heartbeat.add(self)

    def pause_writing(self) -> None:
        """More than `buffer_bytes` wait."""
        self.full = True
        if not self.closing:
            self.on_full()

    def resume_writing(self) -> None:
        """Less than a quarter of `buffer_bytes` waits: the client is alive, if slow."""
        self.full = False
        self.silent_since = 0
        if not self.closing:
            self.on_drained()

    def eof_received(self) -> None:
        """The client has finished: no door has a use for one that only listens half open."""
        if self.closing:
            if self._transport is not None:
                self._transport.close()
        else:
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the loop's signature
        """The transport has closed, whoever wanted it."""
        self.closing = True
        self._transport = None
        self._reaper.forget(self)
        if self._heartbeat is not None:
            self._heartbeat.remove(self)
        on_closed = self.on_closed
        self._let_go()
        on_closed()

    # -- for subclasses --------------------------------------------------------------------------

    def _hang_up(self, transport: asyncio.Transport, *, said_goodbye: bool) -> None:
        """Close once the buffer is flushed."""
        del said_goodbye
        transport.close()

    def _let_go(self) -> None:
        """Drop the owner's callbacks: they close a cycle that only the collector would free."""
        self.on_full = self.on_drained = self.on_closed = _nothing
