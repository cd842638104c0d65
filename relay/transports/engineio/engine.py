"""One Engine.IO session: over polling, over WebSocket, and during the upgrade between the two.

The hub uses the session as an outbox and writes WebSocket frames, which all clients of the same
protocol version share. During polling, frames wait for the client's next request and are converted
to one body. After the upgrade, waiting frames are written to the WebSocket unchanged.

The session does no I/O of its own. `endpoint.py` supplies its sockets.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from relay.core.reasons import Reason
from relay.transports.engineio.packets import (
    CLOSE,
    MESSAGE,
    NOOP,
    PING,
    PONG,
    UPGRADE,
    Malformed,
    Packet,
    frame,
    from_binary,
    from_text,
)
from relay.transports.socket.websocket import frame_close

if TYPE_CHECKING:
    import asyncio

    from relay.core.connection import ConnectionInfo
    from relay.transports.socket.heartbeat import Heartbeat
    from relay.transports.socket.reaper import Reaper
    from relay.transports.socket.websocket import WebSocketConnection

_NOOP = frame(Packet(NOOP), 4)
_CLOSE = frame(Packet(CLOSE), 4)
_PROBE, _PROBED = b"2probe", frame(Packet(PONG, b"probe"), 4)
_GOODBYE = frame_close(1000)
# Limits for clients that have not presented a credential. A Socket.IO client needs two packets to
# connect, and a token fits into a few kilobytes.
_STRANGER_PACKETS = 100
_STRANGER_BYTES = 65_536


def _ignore() -> None:
    """Default callback."""


def _ignore_message(data: bytes, binary: bool) -> None:
    """Default callback for messages."""


class Engine:
    """A session. Its owner sets the callbacks.

    Clients distinguish two ends. After `close` or a lost connection they reconnect: the WebSocket
    closes, or a poll is rejected because the session does not exist. After `dismiss` they stay
    away: they receive the packet CLOSE, over either transport. Python's clients take a poll's CLOSE
    as final even if the server only restarts.

    `on_closed` is called exactly once. No callback follows it. `full` is True
    while more than `buffer_bytes` wait; writes are still accepted then.

    `max_message_bytes` limits one message or request body. Until the owner calls `authorize`, this
    limit and the total that the client may send are small.
    """

    __slots__ = (
        "_authorized_bytes",
        "_buffer_bytes",
        "_carrier",
        "_dismissed",
        "_heartbeat",
        "_on_gone",
        "_poll",
        "_probe",
        "_probe_timer",
        "_reaper",
        "_socket",
        "_stamp",
        "_stamps_differ",
        "_stranger_bytes",
        "_stranger_packets",
        "_waiting",
        "_waiting_bytes",
        "base64_only",
        "beat_age",
        "beat_slot",
        "close_code",
        "closing",
        "ending",
        "full",
        "info",
        "max_message_bytes",
        "on_closed",
        "on_drained",
        "on_full",
        "on_message",
        "pinged",
        "probed",
        "quiet",
        "sid",
        "silent_since",
        "version",
    )

    def __init__(
        self,
        *,
        sid: str,
        version: int,
        buffer_bytes: int,
        max_message_bytes: int,
        reaper: Reaper,
        heartbeat: Heartbeat,
        on_gone: Callable[[Engine], None],
        base64_only: bool = False,
        info: ConnectionInfo | None = None,
    ) -> None:
        """`base64_only`: the client of protocol 3 cannot read binary answers (b64=1). `info`
        describes the connection of the handshake."""
        self.info = info
        self.close_code: int | None = None
        self.ending: Reason | None = None
        self.sid = sid
        self.base64_only = base64_only
        self.version = version
        self._buffer_bytes = buffer_bytes
        self._reaper = reaper
        self._heartbeat = heartbeat
        self._on_gone: Callable[[Engine], None] | None = on_gone
        self._socket: WebSocketConnection | None = None
        self._probe: WebSocketConnection | None = None
        self._probe_timer: asyncio.TimerHandle | None = None
        self.probed = False
        self._poll: Callable[[bytes | None], None] | None = None
        self._stamp: str | None = None
        self._stamps_differ = False
        # The connection of the latest polling request. Its answer may still be on its way.
        self._carrier: asyncio.Transport | None = None
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self._stranger_packets = _STRANGER_PACKETS
        self._stranger_bytes: float = _STRANGER_BYTES
        self._authorized_bytes = max_message_bytes
        self.max_message_bytes = min(max_message_bytes, _STRANGER_BYTES)
        self.full = False
        self.closing = False
        self._dismissed = False
        self.on_message: Callable[[bytes, bool], None] = _ignore_message
        self.on_closed: Callable[[], None] | None = None
        self.on_full: Callable[[], None] = _ignore
        self.on_drained: Callable[[], None] = _ignore
        # State of the heartbeat (`HeartbeatClient`).
        self.beat_slot = -1
        self.beat_age = 0
        self.quiet = True
        self.pinged = False
        self.silent_since = 0
        heartbeat.add(self)

    def authorize(self) -> None:
        """Remove the limits for clients without a credential."""
        self._stranger_bytes = math.inf
        self.max_message_bytes = self._authorized_bytes
        if self._socket is not None:
            self._socket.limit_messages(self.max_message_bytes)

    # ---- to the client ----------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """Send WebSocket frames of this protocol version. Do nothing if the session is closing."""
        # The heartbeat of protocol 3 is empty, because its clients send the pings.
        if self.closing or not data:
            return
        self.quiet = False
        if self._socket is not None:
            self._socket.write(data)
            return
        self._waiting.append(data)
        self._waiting_bytes += len(data)
        if self._poll is not None and not self.probed:
            self._answer_poll()
        elif self._waiting_bytes > self._buffer_bytes and not self.full:
            self.full = True
            self.on_full()

    def close(self, last: bytes = b"") -> None:
        """Send `last`, then close. The client reconnects. Abort if it does not receive `last`."""
        if self.closing:
            return
        if last:
            self.write(last)
        self._finish()

    def dismiss(self) -> None:
        """Close for good: the client does not reconnect, as far as its library allows that."""
        if self.closing:
            return
        if self._socket is not None:
            self._socket.write(_CLOSE)
        self._dismissed = True
        self._finish()

    def _finish(self) -> None:
        self.closing = True
        if self.probed:
            # A JavaScript client that has stopped polling would not poll again if this WebSocket
            # failed: it would wait for a ping for 45 s. The session ends after the upgrade.
            self._reaper.watch(self)
            return
        self._drop_probe()
        if self._socket is not None:
            self._socket.close(_GOODBYE)
            return
        self._reaper.watch(self)
        if self._poll is not None:
            self._answer_poll()

    def abort(self) -> None:
        """Close immediately and drop waiting frames. The client reconnects."""
        self._gone()

    def violated(self) -> None:
        """Close immediately, because the client broke the protocol."""
        self._dismissed = True
        self.ending = Reason.BAD_MESSAGE
        self._gone()

    @property
    def transport_name(self) -> str:
        """The way in which the client is connected, for operators."""
        carried = "websocket" if self._socket is not None else "polling"
        return f"engine.io {self.version} {carried}"

    def waiting_bytes(self) -> int:
        """Return the number of bytes that have not been sent."""
        return self._socket.waiting_bytes() if self._socket is not None else self._waiting_bytes

    @property
    def carrier(self) -> asyncio.Transport | None:
        """The connection that carries the latest data to the client."""
        return self._socket.carrier if self._socket is not None else self._carrier

    # ---- polling ----------------------------------------------------------------------------

    def poll(
        self,
        answer: Callable[[bytes | None], None],
        stamp: str = "",
        carrier: asyncio.Transport | None = None,
    ) -> bool:
        """Handle a polling request.

        `answer` is called once, now or later: with frames, or with None if the session has ended.
        Return False for a request after the upgrade, which a proxy may have repeated, and for a
        second request at the same time, which ends the session (captured: code 400).

        `carrier` is the connection that the answer will be sent on.

        A repeated request ends it too. `stamp` is the request's `t`, which most clients change with
        each request. Proxies and browsers repeat a GET request if its connection was lost, for
        instance to a worker that has died. The lost answer may have contained events.

        A `t` of digits only proves nothing: C# and C++ clients send the time in seconds.
        """
        if self._socket is not None:
            return False
        self.silent_since = 0
        if self._on_gone is None:
            answer(None)
            return True
        if stamp.isdigit():
            stamp = ""
        is_repeated = self._stamps_differ and stamp != "" and stamp == self._stamp
        # The first request is the handshake. Some clients have no stamp, or always the same one.
        self._stamps_differ = self._stamps_differ or self._stamp not in (None, stamp)
        self._stamp = stamp
        if is_repeated:
            self._gone()
            return False
        if self._poll is not None:
            self.violated()
            return False
        self._carrier = carrier
        if self.probed:
            # The client finishes its polling request before it sends `5` over the WebSocket.
            answer(_NOOP)
        elif self._waiting or self.closing:
            self._poll = answer
            self._answer_poll()
        else:
            self._poll = answer
        return True

    def poll_lost(self) -> None:
        """End the session: the client disconnected while its polling request was waiting."""
        self._poll = None
        self._gone()

    @property
    def is_polling(self) -> bool:
        """Return False after the upgrade to a WebSocket."""
        return self._socket is None

    def receive(self, packets: list[Packet]) -> None:
        """Handle the packets of a POST request."""
        self.silent_since = 0
        for packet in packets:
            if self.closing:
                break
            self._on_packet(packet)

    def _answer_poll(self) -> None:
        # The end is the answer to a poll of its own: socket.io-client 4.8 delivers the events of an
        # answer after it has processed its CLOSE, without their offsets, and would receive them
        # again.
        is_last = self.closing and not self._waiting
        if is_last:
            self._gone()
            return
        answer, self._poll = self._poll, None
        if answer is not None:
            answer(self._take())

    def _take(self) -> bytes:
        data = b"".join(self._waiting)
        self._waiting.clear()
        self._waiting_bytes = 0
        if self.full:
            self.full = False
            self.on_drained()
        return data

    # ---- websocket --------------------------------------------------------------------------

    def attach(self, socket: WebSocketConnection) -> None:
        """Use this WebSocket for the session from now on."""
        self._socket, self._carrier = socket, None
        socket.limit_messages(self.max_message_bytes)
        socket.on_text = self._on_text
        socket.on_binary = self._on_binary
        socket.on_full = self._socket_full
        socket.on_drained = self._socket_drained
        socket.on_closed = self._socket_closed

    def probe(self, socket: WebSocketConnection, timer: asyncio.TimerHandle) -> bool:
        """Add a WebSocket that may replace polling. Return False if there already is one.

        `timer` closes the WebSocket if the upgrade takes too long.
        """
        if self._socket is not None or self._probe is not None or self.closing:
            return False
        self._probe, self._probe_timer = socket, timer
        socket.on_text = self._on_probe
        socket.on_closed = self._probe_lost
        return True

    def _on_probe(self, text: bytes) -> None:
        self.silent_since = 0
        probe = self._probe
        if probe is None:
            return
        if text == _PROBE and not self.probed:
            self.probed = True
            probe.write(_PROBED)
            poll, self._poll = self._poll, None
            if poll is not None:
                poll(_NOOP)
        elif text == b"%d" % UPGRADE and self.probed:
            self._upgrade(probe)
        else:
            probe.close_with(1002)

    def _upgrade(self, socket: WebSocketConnection) -> None:
        self._probe = None
        self._end_probing()
        poll, self._poll = self._poll, None
        if poll is not None:
            poll(_NOOP)
        self.attach(socket)
        waiting = b"".join(self._waiting)
        self._waiting.clear()
        self._waiting_bytes = 0
        was_full, self.full = self.full, False
        if waiting:
            socket.write(waiting)
        if self.closing:
            if self._dismissed:
                socket.write(_CLOSE)
            socket.close(_GOODBYE)
        elif was_full and not self.full:
            self.on_drained()

    def _probe_lost(self) -> None:
        if self._probe is not None:
            self._drop_probe()
            if self.closing and self._poll is not None:
                self._answer_poll()

    def _drop_probe(self) -> None:
        probe, self._probe = self._probe, None
        self._end_probing()
        if probe is not None:
            probe.abort()
            if self._waiting and self._poll is not None:
                self._answer_poll()

    def _end_probing(self) -> None:
        self.probed = False
        if self._probe_timer is not None:
            self._probe_timer.cancel()
            self._probe_timer = None

    def _socket_full(self) -> None:
        self.full = True
        self.on_full()

    def _socket_drained(self) -> None:
        self.full = False
        self.silent_since = 0
        self.on_drained()

    def _socket_closed(self) -> None:
        self._gone()

    def _on_text(self, text: bytes) -> None:
        self.silent_since = 0
        try:
            packet = from_text(text)
        except Malformed:
            self.violated()
            return
        self._on_packet(packet)

    def _on_binary(self, data: bytes) -> None:
        self.silent_since = 0
        try:
            packet = from_binary(data, self.version)
        except Malformed:
            self.violated()
            return
        self._on_packet(packet)

    # ---- both -------------------------------------------------------------------------------

    def _on_packet(self, packet: Packet) -> None:
        if self._stranger_bytes < math.inf:
            self._stranger_packets -= 1
            self._stranger_bytes -= len(packet.data)
            if self._stranger_packets < 0 or self._stranger_bytes < 0:
                self.violated()
                return
        if packet.kind == MESSAGE:
            try:
                self.on_message(packet.data, packet.binary)
            except Malformed:
                self.violated()
        elif packet.kind == PING and self.version == 3:
            # During polling, too, the pong is sent in order with the other packets.
            self.write(frame(Packet(PONG, packet.data), 3))
        elif packet.kind in (PING, PONG):
            # Heartbeats have one direction per protocol version ("invalid heartbeat direction").
            if packet.kind == PING or self.version == 3:
                self.violated()
        elif packet.kind == CLOSE:
            poll, self._poll = self._poll, None
            if poll is not None:
                poll(_NOOP)
            self._gone()

    def _gone(self) -> None:
        on_gone, self._on_gone = self._on_gone, None
        if on_gone is None:
            return
        self.closing = True
        self._heartbeat.remove(self)
        self._reaper.forget(self)
        self._drop_probe()
        poll, self._poll = self._poll, None
        self._waiting.clear()
        self._carrier = None
        if poll is not None:
            poll(_CLOSE if self._dismissed else None)
        socket, self._socket = self._socket, None
        if socket is not None:
            self.close_code, self.ending = socket.close_code, self.ending or socket.ending
        if socket is not None and not socket.closing:
            socket.close(_GOODBYE)
        on_gone(self)
        on_closed, self.on_closed = self.on_closed, None
        self.on_message, self.on_full, self.on_drained = _ignore_message, _ignore, _ignore
        if on_closed is not None:
            on_closed()
