"""Presence: the clients of a channel on all workers, without periodic writes per client.

One hash per channel contains each client with its worker. An entry is valid while the worker has a
heartbeat, so nothing is refreshed per client. If a worker is killed, another worker removes its
entries and notifies the protocols. Changes of one event loop iteration share one pipeline.

    HSET <p>presence:{C} <client> (<instance> LF <info>)
    SADD <p>present:<instance> <C>

The set lists the channels of one worker, so that its entries can be found after its death. Every
CHECK_S the worker compares the size of the set with its own state. If Redis has lost data or
another worker has removed the entries, the worker writes all of its clients again, as it does after
each reconnect.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, TypeVar, cast

from relay.core.errors import RelayError, Unavailable
from relay.core.model import Channel, parse_channel
from relay.core.slices import in_slices
from relay.stream.cluster.workers import DEAD_AFTER_S, EXPIRY_S, HEARTBEAT_S
from relay.stream.connection.pipeline_connection import ReplyError
from relay.stream.shards.server_errors import ServerErrors

if TYPE_CHECKING:
    from relay.stream.connection.pipeline_connection import RedisCommand
    from relay.stream.format.keys import Keys
    from relay.stream.shards.links import ShardLinks

CHECK_S = 5.0
# Other workers remove the clients of a frozen worker after this time at the earliest. Two seconds
# less, because the beginning of a freeze is not known exactly.
_REMOVED_AFTER_S = EXPIRY_S - HEARTBEAT_S + DEAD_AFTER_S - 2
# Fields of one command, so that no command blocks Redis for long.
_BATCH = 500

_log = logging.getLogger(__name__)

ClientsLost = Callable[[Channel, Mapping[str, bytes]], None]
OwnRemoved = Callable[[set[str]], None]
_T = TypeVar("_T")


class ClusterPresence:
    """Implements `relay.doorkit.contract.Presence`.

    Changes are sent on `links`, reads on `long`, because their replies may be large. `dead`
    returns True for a worker that is known to have died, before its heartbeat expires.
    """

    def __init__(
        self,
        *,
        links: ShardLinks,
        long: ShardLinks,
        keys: Keys,
        instance: str,
        dead: Callable[[str], bool],
        spawn: Callable[..., object],
    ) -> None:
        self._links = links
        self._long = long
        self._keys = keys
        self._instance = instance
        self.is_dead = dead
        self._spawn = spawn
        self._own: dict[Channel, dict[str, bytes]] = {}
        # Clients whose entries in Redis may differ from `_own`.
        self._changed: dict[Channel, set[str]] = {}
        self._planned = False
        self._requested: dict[Channel, list[asyncio.Future[dict[str, bytes]]]] = {}
        self._reading: set[Channel] = set()
        self._on_clients_lost: list[ClientsLost] = []
        self._on_own_removed: list[OwnRemoved] = []
        links.on_open.append(self._write_all)

    @property
    def in_use(self) -> bool:
        """Return whether clients of this worker are present in any channel."""
        return bool(self._own)

    # ---- for protocols --------------------------------------------------------------------------

    def add(self, channel: Channel, client: str, info: bytes) -> None:
        """Add the client to the channel, or change its `info`."""
        self._own.setdefault(channel, {})[client] = info
        self._change(channel, client)

    def remove(self, channel: Channel, client: str) -> None:
        """Remove the client from the channel. Do nothing if it is not present."""
        own = self._own.get(channel)
        if own is None or own.pop(client, None) is None:
            return
        if not own:
            del self._own[channel]
        self._change(channel, client)

    def on_clients_lost(self, notify: ClientsLost) -> None:
        """Register a callback for the clients of dead workers. One worker calls it."""
        self._on_clients_lost.append(notify)

    def on_own_removed(self, removed: OwnRemoved) -> None:
        """Register a callback for clients of this worker that other workers have removed."""
        self._on_own_removed.append(removed)

    def read(self, channel: Channel) -> asyncio.Future[dict[str, bytes]]:
        """Return the clients of the channel with their info, or fail with Unavailable."""
        result: asyncio.Future[dict[str, bytes]] = asyncio.get_running_loop().create_future()
        self._requested.setdefault(channel, []).append(result)
        if channel not in self._reading:
            self._reading.add(channel)
            self._spawn(self._serve(channel), name=f"presence {channel}")
        return result

    async def _serve(self, channel: Channel) -> None:
        try:
            # Let all requests of this event loop iteration share one read.
            await asyncio.sleep(0)
            while waiting := self._requested.pop(channel, None):
                try:
                    found = await self._read(channel)
                except RelayError as exc:
                    for result in waiting:
                        if not result.done():
                            result.set_exception(Unavailable(str(exc)))
                    continue
                for result in waiting:
                    if not result.done():
                        result.set_result(found)
        finally:
            self._reading.discard(channel)

    async def _read(self, channel: Channel) -> dict[str, bytes]:
        by_instance = await self._entries(channel)
        others = [each for each in by_instance if each != self._instance and not self.is_dead(each)]
        lives = await self._long.call_all(
            [("EXISTS", self._keys.node(instance)) for instance in others]
        )
        found: dict[str, bytes] = {}
        for instance, is_alive in zip(others, lives, strict=True):
            if is_alive:
                found |= by_instance[instance]
        return found | self._own.get(channel, {})

    async def _entries(self, channel: Channel) -> dict[str, dict[str, bytes]]:
        """Return the entries of the hash, grouped by instance."""
        (reply,) = await self._long.call_all([("HGETALL", self._keys.presence(channel))])
        found: dict[str, dict[str, bytes]] = {}
        async for client, value in in_slices(cast("dict[bytes, bytes]", reply).items()):
            instance, _, info = value.partition(b"\n")
            theirs = found.setdefault(instance.decode(errors="replace"), {})
            theirs[client.decode(errors="replace")] = info
        return found

    # ---- to Redis -------------------------------------------------------------------------------

    def _change(self, channel: Channel, client: str) -> None:
        self._changed.setdefault(channel, set()).add(client)
        if not self._planned:
            self._planned = True
            asyncio.get_running_loop().call_soon(self._write)

    def _write_all(self) -> None:
        for channel, clients in self._own.items():
            self._changed.setdefault(channel, set()).update(clients)
        self._write()

    def _write(self) -> None:
        self._planned = False
        changed, self._changed = self._changed, {}
        if not changed:
            return
        sent = self._links.execute_in_turn(*self._commands(changed))

        def written(finished: asyncio.Future[list[object]]) -> None:
            if not finished.cancelled() and finished.exception() is None:
                errors = [each for each in finished.result() if isinstance(each, ReplyError)]
                if not errors:
                    return
                _log.error("Could not write presence (%s); retrying", errors[0])
            # Written after the next reconnect or at the next check.
            for channel, clients in changed.items():
                self._changed.setdefault(channel, set()).update(clients)

        sent.add_done_callback(written)

    def _commands(self, changed: Mapping[Channel, set[str]]) -> list[list[RedisCommand]]:
        """Return the commands in three steps: the set must contain a channel as long as its hash
        has clients of this worker."""
        head = self._instance.encode() + b"\n"
        add: list[RedisCommand] = []
        remove: list[RedisCommand] = []
        channels = self._keys.present(self._instance)
        begun: list[bytes] = []
        ended: list[bytes] = []
        for channel, clients in changed.items():
            key, own = self._keys.presence(channel), self._own.get(channel, {})
            present = [client for client in clients if client in own]
            absent = [client for client in clients if client not in own]
            for some in _batches(present):
                fields = [part for client in some for part in (client, head + own[client])]
                add.append(("HSET", key, *fields))
            remove += [("HDEL", key, *some) for some in _batches(absent)]
            (begun if own else ended).append(channel.encode())
        first: list[RedisCommand] = [("SADD", channels, *some) for some in _batches(begun)]
        last: list[RedisCommand] = [("SREM", channels, *some) for some in _batches(ended)]
        return [first, [*add, *remove], last]

    def on_wake(self, frozen_s: float) -> None:
        """After a freeze in which other workers may have removed this worker's clients, let these
        clients connect again.

        This happens before anything else is read: leave messages about these clients may be waiting
        in the socket.
        """
        if not self._own or frozen_s < _REMOVED_AFTER_S:
            return
        lost, self._own = self._own, {}
        clients = {client for theirs in lost.values() for client in theirs}
        _log.warning("Other workers may have removed %d clients from presence", len(clients))
        for removed in self._on_own_removed:
            removed(clients)
        self._spawn(self._remove_lost(lost), name="presence after a freeze")

    async def _remove_lost(self, lost: Mapping[Channel, dict[str, bytes]]) -> None:
        """Remove those clients that other workers have not removed."""
        for channel, clients in lost.items():
            try:
                await self._remove(channel, clients)
            except RelayError as exc:
                _log.info("Could not remove clients from presence (%s); retrying", exc)
                self._changed.setdefault(channel, set()).update(clients)
            # Update the set of channels.
            self._changed.setdefault(channel, set())
        self._write()

    async def check(self) -> None:
        """Write the presence of this worker's clients again if Redis has lost it."""
        self._write()
        expected = len(self._own)
        if not expected:
            return
        try:
            count = await self._links.call("SCARD", self._keys.present(self._instance))
        except RelayError as exc:
            _log.debug("Could not check presence: %s", exc)
            return
        if count != expected and len(self._own) == expected:
            _log.info("Writing presence again: Redis has %s of %d channels", count, expected)
            self._write_all()

    async def leave(self) -> None:
        """Remove the entries of this worker at shutdown, after its last client."""
        for channel, clients in self._own.items():
            self._changed.setdefault(channel, set()).update(clients)
        self._own.clear()
        self._write()
        (_,) = await self._links.call_all([("DEL", self._keys.present(self._instance))])

    # ---- entries of dead workers ----------------------------------------------------------------

    async def clear(self, instance: str, errors: ServerErrors | None = None) -> None:
        """Remove the entries of a dead worker and notify the protocols.

        If several workers do so at the same time, each client is reported once. Channels of servers
        that fail are kept for the next call.

        Raises:
            RelayError: A server has failed. Not raised with `errors`, which collects it then.
        """
        found = ServerErrors() if errors is None else errors
        key = self._keys.present(instance)
        with found.collect(self._links.shards.shard_of(key)):
            (members,) = await self._long.call_all([("SMEMBERS", key)])
            for raw in cast("set[bytes]", members):
                if await self._is_cleared(raw, instance, found):
                    await self._long.call_all([("SREM", key, raw)])
        if errors is None:
            found.finish()

    async def _is_cleared(self, raw: bytes, instance: str, errors: ServerErrors) -> bool:
        """Remove the worker's entries in one channel. Return False if its server fails."""
        try:
            channel = parse_channel(raw.decode())
        except ValueError:
            _log.warning("Ignored invalid channel %r of dead worker %s", raw[:50], instance)
            return True
        shard = self._links.shards.shard_of(self._keys.presence(channel))
        if shard not in errors:
            with errors.collect(shard):
                await self._clear_channel(channel, instance)
        return shard not in errors

    async def _clear_channel(self, channel: Channel, instance: str) -> None:
        await self._remove(channel, (await self._entries(channel)).get(instance, {}))

    async def _remove(self, channel: Channel, clients: Mapping[str, bytes]) -> None:
        """Remove clients, and notify the protocols of those that nobody else has removed."""
        key = self._keys.presence(channel)
        for some in _batches(list(clients)):
            removed = await self._long.call_all([("HDEL", key, client) for client in some])
            lost = {
                client: clients[client]
                for client, count in zip(some, removed, strict=True)
                if count == 1
            }
            if lost:
                for notify in self._on_clients_lost:
                    notify(channel, lost)


def _batches(items: list[_T]) -> Iterator[list[_T]]:
    for start in range(0, len(items), _BATCH):
        yield items[start : start + _BATCH]
