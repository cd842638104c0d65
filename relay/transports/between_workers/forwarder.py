"""Passes a request to the worker that has its session.

| the other worker | the client's connection          | how                                    |
| ---------------- | -------------------------------- | -------------------------------------- |
| on this host     | plain                            | its socket is passed (`balance`)       |
| on this host     | TLS, or an answer is being sent  | spliced with a socket pair (`splice`)  |
| on another host  | any                              | spliced with a connection (`internal`) |
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Protocol, cast

from aiohttp import web

from relay.core.errors import WorkerUnreachable
from relay.transports.between_workers.balance import PassedConnection
from relay.transports.between_workers.internal import Introduction, connect
from relay.transports.between_workers.splice import ClientEnd, OwnerEnd, splice
from relay.transports.socket.take_over import read_on, read_raw, release

if TYPE_CHECKING:
    from relay.transports.between_workers.balance import Balance
    from relay.transports.socket.http_connection import HttpConnection

# A registration may be outdated at the first worker, and change again on the way.
_MAX_HOPS = 3
_FULL_S = 0.05


class Forward(Protocol):
    """Passes a request, with its connection, to the worker that has its session."""

    async def __call__(
        self, request: web.Request, owner: str, limit_bytes: int
    ) -> web.StreamResponse | None:
        """Let the worker with the address `owner` handle the request.

        The aiohttp handler must return the result immediately. The result is None if there is no
        such worker. In this case nothing has been carried out.

        Args:
            request: The request. A chunked body is read before the request is passed on.
            owner: The address of the worker.
            limit_bytes: The maximum size of a chunked body.

        Raises:
            WorkerUnreachable: The worker is alive, but the request cannot be passed on. Reply to
                the client as if its session was unknown.
            BodyRejected: As in `read_body`.
        """


def was_forwarded(request: web.Request) -> bool:
    """Return True if another worker has passed on the request to this worker."""
    return cast("HttpConnection", request.protocol).hops > 0


class Forwarder:
    """One worker's way to the others."""

    def __init__(
        self,
        *,
        balance: Balance | None,
        listener_of: Callable[[web.Request], tuple[int, str] | None],
        address_of: Callable[[str], Awaitable[tuple[str, int] | None]],
        key: Callable[[], bytes],
    ) -> None:
        """Create the forwarder.

        Args:
            balance: Passes sockets to the other workers of this host, if there are any.
            listener_of: Returns the index and the name of the listener that a request came to.
            address_of: Returns the internal address of a worker.
            key: Returns the key that the workers of all hosts share.
        """
        self._balance = balance
        self._listener_of = listener_of
        self._address_of = address_of
        self._key = key
        # The worker on the other side of each spliced connection.
        self._splices: dict[OwnerEnd, str] = {}

    def __len__(self) -> int:
        return len(self._splices)

    async def forward(
        self, request: web.Request, owner: str, limit_bytes: int
    ) -> web.StreamResponse | None:
        """Let the worker with the address `owner` handle the request. See `Forward`."""
        listener = self._listener_of(request)
        hops = cast("HttpConnection", request.protocol).hops + 1
        if listener is None or hops > _MAX_HOPS:
            raise WorkerUnreachable("the request has been passed on too often")
        index, name = listener
        # The address of a Unix socket is unknown.
        peer = request.remote or "-"
        if self._balance is not None and self._balance.is_sibling(owner):
            raw = await read_raw(request, limit_bytes)
            passed = PassedConnection(
                connection=_socket_of(request), listener=index, early=raw.data, hops=hops
            )
            if _can_pass(request):
                given = await self._give(self._balance, request, owner, passed)
                return _finish(request, given)
            passed = replace(passed, peer=peer)
            other = await self._give_pair(self._balance, request, owner, passed)
        else:
            address = await self._address_of(owner)
            if address is None:
                return None
            raw = await read_raw(request, limit_bytes)
            introduction = Introduction(receiver=owner, listener=name, hops=hops, peer=peer)
            try:
                other = await connect(address, introduction, self._key(), raw.data)
            except WorkerUnreachable:
                _finish(request, False)
                raise
        if other is None:
            return _finish(request, False)
        self._splices[other] = owner
        return splice(request, ClientEnd(request, raw.left, partial(self._ended, other)), other)

    async def gather(self, request: web.Request) -> web.StreamResponse | None:
        """Let the first worker of this host whose listeners are open handle a request without body.

        Return None if this is that worker, or if the connection cannot be passed.
        """
        listener = self._listener_of(request)
        balance = self._balance
        if balance is None or listener is None or balance.is_first() or not _can_pass(request):
            return None
        passed = PassedConnection(
            connection=_socket_of(request),
            listener=listener[0],
            early=(await read_raw(request, 0)).data,
            hops=cast("HttpConnection", request.protocol).hops + 1,
        )
        return _finish(request, balance.pass_to_first(passed))

    def on_death(self, instance: str) -> None:
        """Close the clients' connections that are spliced with a worker that has died."""
        for other, owner in list(self._splices.items()):
            if instance.endswith(f":{owner}"):
                other.abort()

    def _ended(self, other: OwnerEnd) -> None:
        self._splices.pop(other, None)

    async def _give(
        self, balance: Balance, request: web.Request, owner: str, passed: PassedConnection
    ) -> bool:
        """Pass the connection; wait while the other worker's inbox is full.

        Return False if that worker has died or the client has disconnected.
        """
        while request.transport is not None and not request.transport.is_closing():
            if balance.pass_on(owner, passed):
                return True
            if not balance.is_sibling(owner):
                break
            await asyncio.sleep(_FULL_S)
        return False

    async def _give_pair(
        self, balance: Balance, request: web.Request, owner: str, passed: PassedConnection
    ) -> OwnerEnd | None:
        """Pass one end of a socket pair and return the other one, or None as `_give`."""
        near, far = socket.socketpair()
        with far:
            given = await self._give(balance, request, owner, replace(passed, connection=far))
        if not given:
            near.close()
            return None
        near.setblocking(False)
        loop = asyncio.get_running_loop()
        _, other = await loop.create_unix_connection(lambda: OwnerEnd(is_accepted=True), sock=near)
        return other


def _socket_of(request: web.Request) -> socket.socket:
    found: socket.socket = request.protocol.transport.get_extra_info("socket")  # type: ignore[union-attr]
    return found


def _can_pass(request: web.Request) -> bool:
    """Return True if the socket is the whole connection: no TLS, and no answer waits to be sent."""
    transport = request.transport
    return (
        transport is not None
        and not transport.get_extra_info("sslcontext")
        and not transport.get_write_buffer_size()
    )


def _finish(request: web.Request, is_passed: bool) -> web.StreamResponse | None:
    """Close this process's descriptor of a connection that was passed on, and return the response.

    Otherwise read on from the connection, and return None.
    """
    transport = request.transport
    if is_passed:
        response = release(request, asyncio.Protocol())
        if transport is not None:
            transport.abort()
        return response
    read_on(request)
    return None
