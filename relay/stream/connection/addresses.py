"""Connect to a name that has several addresses, some of which may not answer."""

from __future__ import annotations

import asyncio
import socket
from asyncio.staggered import staggered_race
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeVar, cast

from redis.asyncio.connection import (
    AbstractConnection,
    Connection,
    SSLConnection,
    UnixDomainSocketConnection,
)
from redis.asyncio.sentinel import SentinelManagedConnection
from redis.exceptions import ConnectionError as RedisConnectionError
from typing_extensions import override

T = TypeVar("T")

# The shortest delay that RFC 8305 (Happy Eyeballs) recommends: a `Publisher` has 0.2 s for all.
_NEXT_S = 0.1


async def try_addresses(host: str, port: int, connect: Callable[[str], Awaitable[T]]) -> T:
    """Call `connect` with the addresses of `host` until one call succeeds, and return its result.

    The next address is tried as soon as a call fails, and if it takes longer than 0.1 s. All other
    calls are cancelled after a success.

    Raises:
        OSError: The name cannot be resolved, or no address can be reached.
    """
    # uvloop has no `happy_eyeballs_delay`. The sockets are left to the event loop, because gevent
    # and eventlet replace `socket.socket` in the programs that use a `Publisher`.
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(_address(*each[4]) for each in found))
    if len(addresses) == 1:
        return await connect(addresses[0])
    result, winner, errors = await staggered_race(
        [partial(_attempt, connect, address) for address in addresses], _NEXT_S
    )
    if winner is None or result is None:
        for error in errors:
            if not isinstance(error, OSError):
                raise error or OSError(f"{host} has no address")
        raise OSError("; ".join(dict.fromkeys(str(error) for error in errors if error)))
    return cast(tuple[T], result)[0]


async def _attempt(connect: Callable[[str], Awaitable[T]], address: str) -> tuple[T]:
    return (await connect(address),)


def _address(host: Any, _port: int, _flow: int = 0, scope: int = 0) -> str:
    return f"{host}%{scope}" if scope else host


class _Reopened(AbstractConnection):
    """A connection of redis-py that redis-py opens again if it is closed before a command is sent.

    The server, or another task of redis-py, may close it. redis-py 8.1 then raises AttributeError
    (its issues 3546, 3835 and 4287) or uvloop's RuntimeError, and does not repeat the command.
    """

    @override
    async def _send_packed_command(self, command: Iterable[bytes]) -> None:
        try:
            await super()._send_packed_command(command)
        except (AttributeError, RuntimeError) as exc:
            if self._writer is not None and not self._writer.is_closing():
                raise
            raise RedisConnectionError("the connection was closed") from exc


class UnixSocket(_Reopened, UnixDomainSocketConnection):
    """A connection over a Unix socket."""


class AnyAddress(_Reopened, Connection):
    """A connection of redis-py that tries all addresses of a name."""

    _address = ""

    @override
    async def _connect(self) -> None:
        connect = super()._connect

        async def attempt(address: str) -> None:
            # redis-py reads the address before it waits for anything.
            self._address = address
            await connect()  # type: ignore[no-untyped-call]

        async with asyncio.timeout(self.socket_connect_timeout):
            await try_addresses(self.host, self.port, attempt)

    @override
    def _connection_arguments(self) -> Mapping[str, Any]:
        arguments = {**super()._connection_arguments(), "host": self._address}
        return {**arguments, "server_hostname": self.host} if "ssl" in arguments else arguments


class AnyAddressTls(AnyAddress, SSLConnection):
    """The same with TLS."""


class AnyAddressOfPrimary(AnyAddress, SentinelManagedConnection):
    """The same to the primary that Sentinel names."""

    @override
    async def _connect(self) -> None:
        # redis-py 8.1 does not ask the Sentinels again when it repeats a command.
        self.host, self.port = await self.connection_pool.get_master_address()
        await super()._connect()


class AnyAddressOfPrimaryTls(AnyAddressOfPrimary, SSLConnection):
    """The same to the primary that Sentinel names, with TLS."""
