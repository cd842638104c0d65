"""Paces the requests of new clients, so that a reconnect storm does not delay connected clients.

A handshake costs a worker about 0.4 ms. If thousands of them were handled in one turn of the event
loop, connected clients would receive nothing for seconds. So each turn handles a few, and the
others wait unparsed. The number per turn follows the measured duration of the turns. It has a lower
limit, because new clients must not wait forever for a worker that is busy with deliveries.

The addresses of the clients take turns. The clients of a proxy that is not trusted share its turns
by the addresses that it reports. So inventing addresses gives a client no more turns.

A handshake is rejected at once if it would wait for more than `LONGEST_WAIT_S`, if those that wait
have too many bytes, or if memory is short. The answer contains the time after which the client
should try again. These times are consecutive, so that the clients return at the rate at which the
worker accepts them. If an address has fewer waiting handshakes than another one, the newest of the
other one is rejected instead, unless memory is short.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import re
import time
from collections.abc import Callable, Sequence
from typing import Protocol
from urllib.parse import unquote_to_bytes

from relay.core.client_address import TrustedProxies, network_of
from relay.core.free_memory import FreeMemory, free_memory
from relay.transports.socket.fair_queue import FairQueue

_log = logging.getLogger(__name__)

# Clients give up a handshake after 10 to 20 s. Half of this must be left before handshakes are
# accepted again, so that a worker does not change between both states with each client.
LONGEST_WAIT_S = 5.0
# Handshakes per turn of the event loop. The fewest take about 10 ms. With 8 instead of 32, a storm
# of 10,000 clients took a third more processor time, because fewer clients shared a read.
_FEWEST, _MOST = 32, 64
# A longer turn halves the number of handshakes.
_LONG_TURN_S = 0.05
# Handshakes per second, until the worker's own rate has been measured.
_FIRST_RATE = 1000.0
_AVERAGE_S = 1.0
# Limit for the requests that wait.
_MOST_BYTES = 64 * 1024 * 1024
_MIN_RETRY_S, _MAX_RETRY_S = 1.0, 60.0
_MEMORY_CHECK_S = 1.0
_MEMORY_AGAIN = 1.5

_ADDRESS_CHARS = 100
_HEAD_END = b"\r\n\r\n"
# The parser ignores line ends before a request, and accepts several spaces.
_TARGET = re.compile(rb"[\r\n]*GET +([^ \r\n]+)")
# Clients of Engine.IO append a slash to their path. Relay's own paths may have one, too.
_ENGINE_IO = re.compile(rb"(?<!/ws)(?<!/sse)/$")
_SESSION_ID = re.compile(rb"(?:^|&)sid=")
_FIELDS = re.compile(
    rb"\r\n(?:upgrade:[^\r\n]*websocket|accept:[^\r\n]*(text/event-stream))", re.IGNORECASE
)
_ORIGIN = re.compile(rb"\r\norigin:[ \t]*([!-~]+)", re.IGNORECASE)
_FORWARDED_FOR = re.compile(rb"\r\nx-forwarded-for:([^\r\n]*)", re.IGNORECASE)

# Where a client comes from: the network of the peer, and the one that a proxy reports.
Source = tuple[str, str]


class Waiting(Protocol):
    """A request that waits for its turn."""

    def source(self) -> Source:
        """Return where the request comes from."""

    def proceed(self) -> None:
        """Handle the request."""

    def turn_away(self, retry_s: float) -> None:
        """Reject the request. The client should try again after this time."""


class Handshakes:
    """The waiting handshakes of one worker, and its decision to reject further ones."""

    def __init__(
        self,
        *,
        count_rejected: Callable[[], None] = lambda: None,
        memory: Callable[[], FreeMemory | None] = free_memory,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`count_rejected` is called for each rejected handshake."""
        self._count_rejected = count_rejected
        self._memory = memory
        self._clock = clock
        self._waiting: dict[Waiting, tuple[Source, int]] = {}
        self._queue: FairQueue[Waiting] = FairQueue()
        self._held_bytes = 0
        self._per_turn = _FEWEST
        # Handshakes of this turn.
        self._handled = 0
        self._in_turns = False
        self._turn_began = 0.0
        self._rate = _FIRST_RATE
        self._too_many = self._memory_short = False
        self._memory_checked = -math.inf
        # The time at which the last rejected client was asked to return.
        self._booked_until = 0.0

    def __len__(self) -> int:
        return len(self._waiting)

    def enter(self, request: Waiting, size: int = 0) -> float | None:
        """Call `request.proceed` now or in a later turn of the event loop.

        `size` is the number of bytes that are held until then. Return None, or the seconds after
        which the client should try again if it is rejected.
        """
        if self._is_overloaded(size) and not self._make_room(request.source(), size):
            return self._reject()
        if not self._in_turns:
            self._begin_turn(self._clock())
        if self._handled < self._per_turn and not self._waiting:
            self._handle(request)
        else:
            source = request.source()
            self._waiting[request] = source, size
            self._queue.add(source, request)
            self._held_bytes += size
        return None

    def extend(self, request: Waiting, size: int) -> float | None:
        """Count further bytes of a request that waits. Return what `enter` returns."""
        found = self._waiting.get(request)
        if found is None:
            return None
        if self._held_bytes + size > _MOST_BYTES:
            self.leave(request)
            return self._reject()
        self._waiting[request] = found[0], found[1] + size
        self._held_bytes += size
        return None

    def leave(self, request: Waiting) -> None:
        """Remove a request whose client has disconnected."""
        found = self._waiting.pop(request, None)
        if found is not None:
            source, size = found
            self._queue.remove(source, request)
            self._held_bytes -= size

    @property
    def is_overloaded(self) -> bool:
        """Whether a new client may be rejected at the moment."""
        return self._is_overloaded(0)

    def _is_overloaded(self, size: int) -> bool:
        self._check_wait(size)
        self._check_memory()
        return self._too_many or self._memory_short

    def _make_room(self, source: Source, size: int) -> bool:
        """Reject a client of an address with more waiting handshakes. Return False if there is
        none, if `size` bytes would still be too many, or if memory is short."""
        other = None if self._memory_short else self._queue.displaced_by(source)
        if other is None or self._held_bytes - self._waiting[other][1] + size > _MOST_BYTES:
            return False
        self.leave(other)
        other.turn_away(self._reject())
        return True

    def _reject(self) -> float:
        """Count a rejected client. Return the seconds after which it should try again.

        The times of several clients are consecutive.
        """
        self._count_rejected()
        now = self._clock()
        wait_s = max(self._wait_s, _MIN_RETRY_S)
        booked = max(self._booked_until, now + wait_s) + 1 / self._rate
        if booked > now + _MAX_RETRY_S:
            return random.uniform(_MAX_RETRY_S / 2, _MAX_RETRY_S)  # noqa: S311
        self._booked_until = booked
        return booked - now

    @property
    def _wait_s(self) -> float:
        return len(self._waiting) / self._rate

    def _check_wait(self, size: int) -> None:
        wait_s, held = self._wait_s, self._held_bytes
        if self._too_many:
            self._too_many = wait_s > LONGEST_WAIT_S / 2 or held > _MOST_BYTES / 2
        elif wait_s > LONGEST_WAIT_S:
            self._too_many = True
            _log.warning(
                "This worker is overloaded: %d new clients of %d peer addresses wait, and further"
                " ones would wait longer than %g s. These are asked to try again later. Start more"
                " workers or hosts if this happens often",
                len(self._waiting),
                self._queue.groups,
                LONGEST_WAIT_S,
            )
        elif held + size > _MOST_BYTES:
            self._too_many = True
            _log.warning(
                "This worker is overloaded: the requests of %d new clients of %d peer addresses"
                " wait, and together with a further one they would hold more than %d MB. Further"
                " clients are asked to try again later. Find the clients that send large requests",
                len(self._waiting),
                self._queue.groups,
                _MOST_BYTES >> 20,
            )

    def _check_memory(self) -> None:
        now = self._clock()
        if now - self._memory_checked < _MEMORY_CHECK_S:
            return
        self._memory_checked = now
        found = self._memory()
        if found is None:
            return
        if self._memory_short:
            self._memory_short = found.free < _MEMORY_AGAIN * found.short_below
        elif found.free < found.short_below:
            self._memory_short = True
            _log.warning(
                "Memory is short: less than %d MB are available to this worker. New clients are"
                " asked to try again later. Free or add memory, or start relay on more hosts",
                found.short_below / (1 << 20),
            )

    def _begin_turn(self, now: float) -> None:
        self._in_turns = True
        self._turn_began = now
        self._handled = 0
        asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        """Handle the next requests. Runs in each turn of the event loop while there are any."""
        now = self._clock()
        took_s = max(now - self._turn_began, 1e-6)
        if took_s > _LONG_TURN_S:
            self._per_turn = max(_FEWEST, self._per_turn // 2)
        else:
            self._per_turn = min(_MOST, self._per_turn + 1)
        if self._waiting:
            share = 1 - math.exp(-took_s / _AVERAGE_S)
            self._rate += share * (self._handled / took_s - self._rate)
        elif not self._handled:
            self._in_turns = False
            return
        self._begin_turn(now)
        while self._waiting and self._handled < self._per_turn:
            request = self._queue.pop()
            self._held_bytes -= self._waiting.pop(request)[1]
            self._handle(request)

    def _handle(self, request: Waiting) -> None:
        self._handled += 1
        request.proceed()


def begins_client(head: bytes) -> bool:
    """Return whether this is the complete head of a request that opens a new client.

    These are WebSockets, event streams and Engine.IO sessions. Requests of an open session are
    not: those with a session ID (`sid`), and the event streams of SockJS.
    """
    request, end = _TARGET.match(head), _end_of(head)
    if request is None or end < 0:
        return False
    path, _, query = request[1].partition(b"#")[0].partition(b"?")
    if b"EIO=" in (unquote_to_bytes(query) if b"%" in query else query):
        if not _SESSION_ID.search(query):
            return True
        # Elsewhere, the parameters have no meaning.
        if _ENGINE_IO.search(path):
            return False
    found = _FIELDS.search(head, 0, end)
    if found is None:
        return path.endswith((b"/sse", b"/sse/"))
    return not (found[1] and path.endswith(b"/eventsource"))


def _end_of(head: bytes) -> int:
    """Return where the first request head ends, or -1."""
    return head.find(_HEAD_END, len(head) - len(head.lstrip(b"\r\n")))


def source_of(peer: str, forwarded_for: Sequence[str], proxies: TrustedProxies) -> Source:
    """Return where a client comes from, from the peer's address and all X-Forwarded-For headers."""
    if not forwarded_for:
        return network_of(peer), ""
    client = proxies.client(peer, forwarded_for)
    if client != peer:
        return network_of(client), ""
    # A proxy in front of relay has added the last address. A client can invent all of them.
    return network_of(peer), network_of(
        forwarded_for[-1].rpartition(",")[2].strip()[:_ADDRESS_CHARS]
    )


def forwarded_for(head: bytes) -> list[str]:
    """Return the values of all X-Forwarded-For headers."""
    found = _FORWARDED_FOR.findall(head, 0, _end_of(head))
    return [each.decode("latin-1") for each in found]


def rejection(head: bytes, retry_s: float) -> bytes:
    """Return the answer to a handshake that is rejected for a temporary reason.

    A browser's EventSource never connects again after a 503, but does so after the end of an empty
    stream, which may also set the time.
    """
    end = _end_of(head)
    origin = _ORIGIN.search(head, 0, end)
    # The answer contains nothing that another site must not see.
    cors = (
        b"Access-Control-Allow-Origin: %b\r\nAccess-Control-Allow-Credentials: true\r\n" % origin[1]
        if origin
        else b""
    )
    common = b"Cache-Control: no-store\r\nVary: Origin\r\n%bConnection: close\r\n\r\n" % cors
    found = _FIELDS.search(head, 0, end)
    if found is not None and found[1]:
        return (
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n%b"
            b"retry: %d\n: relay is overloaded\n\n" % (common, retry_s * 1000)
        )
    text = b"relay is overloaded; try again later\n"
    return (
        b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: %d\r\n"
        b"Content-Type: text/plain; charset=utf-8\r\nContent-Length: %d\r\n%b%b"
        % (math.ceil(retry_s), len(text), common, text)
    )
