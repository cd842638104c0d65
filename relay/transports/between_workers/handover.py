"""Requests that reached another worker than their session's are handed to it, over the bus.

The worker that read the request (the *asker*) keeps the client's socket and passes bytes on; the
session's worker (the *owner*) handles the request as if it had read it. Both may run on different
hosts: the bus goes over Redis. A request of an unknown session, or for a worker that is no more,
is answered to the asker as such, so that its door can say so in its protocol's words.

What is lost on the bus is noticed, and costs the connection concerned: each link counts its
messages, and each side tells the other every few seconds which links it holds and how many
messages it has sent on them. A worker that died is noticed by that too.

    handover = Handover(topic="sockjs", bus=context.bus, handle=handle, ...)
    asked = http_request(request, await read_body(request, limit_bytes))
    if owner == context.bus.address:
        response = handover.here(request, asked)       # None: no such session
    else:
        response = await handover.forward(request, asked, owner)   # NotThere
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import struct
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Protocol

from aiohttp import web

from relay.transports.between_workers.link import Kind, Link, NearEnd, RemoteTransport, give_back
from relay.transports.socket.exchange import (
    Exchange,
    HeldRequest,
    HttpAnswer,
    HttpRequest,
    LocalExchange,
    as_response,
    hold,
)
from relay.transports.socket.take_over import take_over

if TYPE_CHECKING:
    from relay.transports.socket.client_socket import ClientSocket
    from relay.transports.socket.reaper import Reaper

_log = logging.getLogger(__name__)

_PROBE_S = 5.0
# An owner answers in the turn in which it gets the request; this is for a bus that lost one.
_ANSWER_S = 10.0
_LEAVE_S = 1.0
# Kind, the link's number (the asker's) and the message's, from 1.
_HEAD = struct.Struct("!BQI")
_ENTRY = struct.Struct("!QI")


class Bus(Protocol):
    """Bytes to one worker of the site; see `relay.doorkit.contract.Bus`."""

    @property
    def address(self) -> str:
        """This worker's address."""

    def send(self, address: str, topic: str, payload: bytes) -> asyncio.Future[bool]:
        """Send a message. The result is False if there is no such worker."""

    def listen(self, topic: str, on_payload: Callable[[str, bytes], None]) -> None:
        """Call `on_payload` with the sender's address and the payload."""


class NotThere(Exception):
    """The owner does not know the session (any more), or there is no such owner.

    `gone`: the latter, or it does not answer.
    """

    def __init__(self, *, gone: bool) -> None:
        super().__init__("the owner is gone" if gone else "the owner has no such session")
        self.gone = gone


Handle = Callable[[Exchange], bool]
# See `relay.doorkit.contract.DoorContext`.
PassOn = Callable[[web.Request, str], web.StreamResponse | None]


class Handover:
    """One door's, on one worker. `topic` is the same on all workers, and no other door's.

    `handle` answers the exchange, or returns False: no such session here, and nothing was done.
    `buffer_bytes` is what this worker may hold for one client whose session is elsewhere. With
    `pass_on` a websocket goes to a worker of this host with its socket, and not over the bus.
    """

    def __init__(
        self,
        *,
        topic: str,
        bus: Bus,
        handle: Handle,
        buffer_bytes: int,
        reaper: Reaper,
        pass_on: PassOn | None = None,
    ) -> None:
        self._topic = f"handover:{topic}"
        self._bus = bus
        self._handle = handle
        self._buffer_bytes = buffer_bytes
        self._reaper = reaper
        self._pass_on = pass_on
        self._numbers = itertools.count(1)
        # Links whose client is here, and links whose session is here.
        self._near: dict[int, NearEnd] = {}
        self._far: dict[tuple[str, int], RemoteTransport] = {}
        # Set once the last of the clients has gone, after the order to stop.
        self._leaving: asyncio.Event | None = None
        # Workers that were not there at the last probe.
        self._absent: set[str] = set()
        self._probe_timer: asyncio.TimerHandle | None = None
        bus.listen(self._topic, self._on_payload)

    def __len__(self) -> int:
        return len(self._near) + len(self._far)

    # ---- for the door ---------------------------------------------------------------------------

    def here(self, request: web.Request, asked: HttpRequest) -> web.StreamResponse | None:
        """Handle the request on this worker; None: no such session."""
        exchange = LocalExchange(request, asked)
        return exchange.response if self._handle(exchange) else None

    async def forward(
        self, request: web.Request, asked: HttpRequest, owner: str
    ) -> web.StreamResponse:
        """Let `owner` handle the request; what the door's handler returns. NotThere."""
        if self._pass_on is not None and "Upgrade" in request.headers:
            # A websocket would be passed on message by message for as long as it lasts.
            moved = self._pass_on(request, owner)
            if moved is not None:
                return moved
        return self._respond(request, asked, await self._ask(asked, owner))

    async def question(self, asked: HttpRequest, owner: str) -> HttpAnswer:
        """Return the owner's answer to a request that it answers at once. NotThere."""
        near = await self._ask(asked, owner)
        kind, payload = near.first
        if kind is not Kind.ANSWER:
            near.give_up()
            raise NotThere(gone=kind is not Kind.UNKNOWN)
        return HttpAnswer.decode(payload)

    async def _ask(self, asked: HttpRequest, owner: str) -> NearEnd:
        near = NearEnd(
            link=Link(next(self._numbers), owner, self._send),
            buffer_bytes=self._buffer_bytes,
            reaper=self._reaper,
            on_over=self._near_over,
        )
        self._near[near.link.number] = near
        self._probe_later()
        sent = near.link.send(Kind.ASK, asked.encode())
        sent.add_done_callback(lambda done: None if _arrived(done) else near.cut())
        try:
            async with asyncio.timeout(_ANSWER_S):
                await near.answered.wait()
        except TimeoutError:
            near.give_up()
            raise NotThere(gone=True) from None
        except BaseException:
            near.give_up()
            raise
        return near

    async def closed(self) -> None:
        """At stop: clients whose session is elsewhere are asked to come again, on another worker.

        Returns once none is left, or after a second: an owner may have gone too.
        """
        self._leaving = asyncio.Event()
        for near in list(self._near.values()):
            near.on_worker_stop()
        if self._near:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LEAVE_S):
                    await self._leaving.wait()

    def _respond(
        self, request: web.Request, asked: HttpRequest, near: NearEnd
    ) -> web.StreamResponse:
        kind, payload = near.first
        match kind:
            case Kind.ANSWER:
                return as_response(HttpAnswer.decode(payload))
            case Kind.HOLD | Kind.TAKE:
                if kind is Kind.HOLD:
                    hold(request, asked, near)
                response = take_over(request, b"", near)
                if self._leaving is not None:
                    near.on_worker_stop()
                return response
            case _:
                raise NotThere(gone=kind is not Kind.UNKNOWN)

    # ---- both sides -----------------------------------------------------------------------------

    def _send(self, link: Link, kind: Kind, payload: bytes) -> asyncio.Future[bool]:
        data = _HEAD.pack(kind, link.number, link.sent) + payload
        return self._bus.send(link.peer, self._topic, data)

    def _on_payload(self, peer: str, data: bytes) -> None:
        kind_number, number, count = _HEAD.unpack_from(data)
        kind, payload = Kind(kind_number), data[_HEAD.size :]
        match kind:
            case Kind.ASK:
                self._on_ask(peer, number, count, payload)
            case Kind.PROBE_NEAR | Kind.PROBE_FAR:
                self._on_probe(peer, kind, payload)
            case Kind.CREDIT_FAR | Kind.DATA | Kind.GONE | Kind.CLOSED | Kind.LEAVE:
                transport = self._far.get((peer, number))
                if transport is not None and self._in_order(transport.link, count, transport.cut):
                    transport.on_message(kind, payload)
            case _:
                near = self._near.get(number)
                if (
                    near is not None
                    and near.link.peer == peer
                    and self._in_order(near.link, count, near.cut)
                ):
                    near.on_message(kind, payload)

    def _in_order(self, link: Link, count: int, cut: Callable[[], None]) -> bool:
        if count == link.received + 1:
            link.received = count
            return True
        # Messages of one sender keep their order: one is lost.
        cut()
        return False

    def _near_over(self, near: NearEnd) -> None:
        self._near.pop(near.link.number, None)
        if not self._near and self._leaving is not None:
            self._leaving.set()

    # ---- the owner ------------------------------------------------------------------------------

    def _on_ask(self, peer: str, number: int, count: int, payload: bytes) -> None:
        link = Link(number, peer, self._send)
        link.received = count
        exchange = _RemoteExchange(self, link, HttpRequest.decode(payload))
        try:
            known = self._handle(exchange)
        except Exception:  # noqa: BLE001 - one client's request must not cost the others theirs
            _log.exception("a request from %s could not be handled", peer)
            exchange.fail()
            return
        if not known:
            link.send(Kind.UNKNOWN).add_done_callback(_arrived)

    def opened(self, link: Link, peer: str) -> RemoteTransport:
        """The owner's end of a link whose connection outlives the request."""
        transport = RemoteTransport(link, peer, self._far_over)
        self._far[link.peer, link.number] = transport
        self._probe_later()
        return transport

    def _far_over(self, transport: RemoteTransport) -> None:
        self._far.pop((transport.link.peer, transport.link.number), None)

    # ---- what got lost --------------------------------------------------------------------------

    def _probe_later(self) -> None:
        if self._probe_timer is None and (self._near or self._far):
            loop = asyncio.get_running_loop()
            self._probe_timer = loop.call_later(_PROBE_S, self._on_timer)

    def _on_timer(self) -> None:
        self._probe_timer = None
        self.probe()
        self._probe_later()

    def probe(self) -> None:
        """Tell every worker that shares links with this one which these are."""
        near: dict[str, list[Link]] = defaultdict(list)
        far: dict[str, list[Link]] = defaultdict(list)
        for end in self._near.values():
            near[end.link.peer].append(end.link)
        for transport in self._far.values():
            far[transport.link.peer].append(transport.link)
        for kind, peers in ((Kind.PROBE_NEAR, near), (Kind.PROBE_FAR, far)):
            for peer, links in peers.items():
                entries = b"".join(_ENTRY.pack(link.number, link.sent) for link in links)
                sent = self._bus.send(peer, self._topic, _HEAD.pack(kind, 0, 0) + entries)
                sent.add_done_callback(partial(self._probed, peer))

    def _probed(self, peer: str, sent: asyncio.Future[bool]) -> None:
        if sent.cancelled() or sent.exception() is not None or sent.result():
            # What was lost while the bus was away is found by the next probe.
            self._absent.discard(peer)
            return
        if peer not in self._absent:
            # After a failover of Redis a worker that lives may not listen again yet.
            self._absent.add(peer)
            return
        self._absent.discard(peer)
        for end in [each for each in self._near.values() if each.link.peer == peer]:
            end.cut()
        for transport in [each for each in self._far.values() if each.link.peer == peer]:
            transport.cut()

    def _on_probe(self, peer: str, kind: Kind, payload: bytes) -> None:
        for number, count in _ENTRY.iter_unpack(payload):
            end: NearEnd | RemoteTransport | None
            if kind is Kind.PROBE_NEAR:
                end, over = self._far.get((peer, number)), Kind.CUT
            else:
                end, over = self._near.get(number), Kind.GONE
                if end is not None and end.link.peer != peer:
                    end = None
            if end is None:
                # The other side has not heard that this link is over.
                data = _HEAD.pack(over, number, 0)
                self._bus.send(peer, self._topic, data).add_done_callback(_arrived)
            elif end.link.received != count:
                end.cut()


class _RemoteExchange(Exchange):
    """The request was read by another worker."""

    def __init__(self, handover: Handover, link: Link, asked: HttpRequest) -> None:
        self.request = asked
        self._handover = handover
        self._link = link

    def answer(self, answer: HttpAnswer) -> None:
        """See `Exchange`."""
        self._link.send(Kind.ANSWER, answer.encode()).add_done_callback(_arrived)

    def hold(self, held: HeldRequest) -> None:
        """See `Exchange`."""
        held.set_give_back(give_back if self.request.reusable else None)
        self._handover.opened(self._link, self.request.peer).begin(Kind.HOLD, held)

    def take(self, head: bytes, client: ClientSocket, *, duplex: bool = False) -> None:
        """See `Exchange`."""
        transport = self._handover.opened(self._link, self.request.peer)
        transport.begin(Kind.TAKE, client, duplex=duplex)
        transport.write(head)

    def fail(self) -> None:
        """The handler broke."""
        if not self._link.sent:
            self.answer(HttpAnswer(500, b"500 Internal Server Error\n"))


def _arrived(sent: asyncio.Future[bool]) -> bool:
    """Whether the receiver was there. What was lost is found by the count."""
    return not sent.cancelled() and sent.exception() is None and sent.result()
