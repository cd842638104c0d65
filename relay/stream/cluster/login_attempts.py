"""Limit for attempts to log in, over all workers of all hosts.

Each attempt is counted before its password is compared, so that simultaneous attempts are limited
too. There are two limits: one for attempts from similar addresses, which slows down one guesser
without locking out everybody else, and one for all attempts, which slows down guessers with many
addresses. Addresses share a fixed number of places, so that attempts cannot fill Redis.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING
from zlib import crc32

from relay.core.client_address import network_of
from relay.stream.connection import connect
from relay.stream.connection.connect import CommandRefused
from relay.stream.connection.scripts import Script

if TYPE_CHECKING:
    from relay.stream.format.keys import Keys
    from relay.stream.shards.clients import ShardClients

_PLACES = 256
# After `burst` attempts, one more is allowed per interval.
_ADDRESS_INTERVAL_MS, _ADDRESS_BURST = 12_000, 5
_ALL_INTERVAL_MS, _ALL_BURST = 1_000, 60
_ALL = "all"
_KEPT_MS = 600_000
# Each needs a connection of the client, which heartbeats and jobs use too.
_AT_ONCE = 4

# KEYS: the hash. ARGV: for each limit its field, interval and burst; then the hash's expiry time.
# A field has the time at which all its attempts are paid for (GCRA). Returns the milliseconds to
# wait, or 0 if the attempt is allowed; only then is it counted.
_ATTEMPT = Script("""\
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local wait, paid = 0, {}
for i = 1, #ARGV - 1, 3 do
  local until_ms = math.max(tonumber(redis.call('HGET', KEYS[1], ARGV[i]) or '0'), now)
  wait = math.max(wait, until_ms - now - ARGV[i + 1] * (ARGV[i + 2] - 1))
  paid[ARGV[i]] = until_ms + ARGV[i + 1]
end
if wait > 0 then return wait end
for field, until_ms in pairs(paid) do
  redis.call('HSET', KEYS[1], field, string.format('%.0f', until_ms))
end
redis.call('EXPIRE', KEYS[1], ARGV[#ARGV])
return 0
""")


class LoginAttempts:
    """Counts attempts in one hash of at most 257 fields."""

    def __init__(self, clients: ShardClients, keys: Keys) -> None:
        self._clients = clients
        self._key = keys.store("console:attempts")
        self._turns = asyncio.Semaphore(_AT_ONCE)

    async def begin(self, address: str) -> float:
        """Count an attempt from this address and return 0, or return the seconds to wait."""
        words = (
            *(_place(address), _ADDRESS_INTERVAL_MS, _ADDRESS_BURST),
            *(_ALL, _ALL_INTERVAL_MS, _ALL_BURST),
            _KEPT_MS // 1000,
        )
        try:
            wait_ms = await self._run(*words)
        except CommandRefused as exc:
            if exc.code != "NOSCRIPT":
                raise
            # To this server only: another one may be away.
            ((_, server, _),) = await self._clients.split([self._key])
            await connect.command(server, "SCRIPT", "LOAD", _ATTEMPT.text)
            wait_ms = await self._run(*words)
        return wait_ms / 1000

    async def succeeded(self, address: str) -> None:
        """Delete the attempts from this address."""
        await connect.command(self._clients.home, "HDEL", self._key, _place(address))

    async def _run(self, *words: str | int) -> int:
        sent = "EVALSHA", _ATTEMPT.sha, 1, self._key, *words
        async with self._turns:
            return int(await connect.command(self._clients.home, *sent))


def _place(address: str) -> str:
    """Return the field of an address."""
    return str(crc32(network_of(address).encode()) % _PLACES)
