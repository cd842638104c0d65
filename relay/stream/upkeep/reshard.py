"""Move keys to the servers of a changed list, with their contents, groups and times to live.

No worker may be running. Each key is copied with DUMP and RESTORE, compared, and only then deleted
on its old server, in a transaction that fails if the key has changed meanwhile. A repeated run
continues an interrupted one. The serialized form of equal hashes and sets depends on the server, so
their contents are compared if it differs.

A stream keeps its incarnation, so clients resume without a notice. Its certificate names the old
server's replication ID. It is replaced by that of the new server if it is the present one: then it
is proven that the stream has lost no entries. Otherwise workers notify clients of a reset, as after
a failover.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from relay.core.errors import RelayError
from relay.core.model import EntryID
from relay.stream.cluster.leases import Lease
from relay.stream.cluster.workers import live_workers
from relay.stream.connection import connect
from relay.stream.connection.primary import certificate_of
from relay.stream.format.keys import Keys
from relay.stream.read.groups import LOW, MARKER_GROUP
from relay.stream.shards.hash_map import HashMap, ServerShard
from relay.stream.shards.server_list import refuse_same
from relay.stream.shards.shard import SITE_TAG, tag_of

if TYPE_CHECKING:
    from relay.stream.connection.connect import RedisClient
    from relay.stream.shards.clients import ShardClients

_SCAN = 500
_ATTEMPTS = 5
# Keys that are moved at a time.
_AT_ONCE = 16
_LEASE_S = 30
# Keys of the site that cannot be created again. Workers create the others when they start.
_KEPT = (b"control", b"dead-letters", b"tap:", b"group:", b"store:")
# Keys with a tag that belong to their server, or to workers that have stopped.
_LEFT = (b"canary:", b"presence:", b"queue:", b"taken:")
# Reply to PTTL if there is no key.
_NO_KEY = -2
# Commands that return the whole contents of a key, by its type.
_READ = {
    "hash": ("HGETALL",),
    "set": ("SMEMBERS",),
    "string": ("GET",),
    "zset": ("ZRANGE", "0", "-1", "WITHSCORES"),
}
# Begin of the replies to RESTORE of a payload from another software or a newer version.
_UNREADABLE = ("ERR DUMP payload version", "ERR Bad data format")


class Move(NamedTuple):
    """One key, and where it belongs."""

    source: ServerShard
    target: ServerShard
    key: bytes
    new_key: bytes


@dataclass(slots=True)
class Resharded:
    """The result: numbers of moved keys and streams by servers, and the keys that stay.

    `conflicts` exist on both servers with different contents.
    """

    keys: Counter[tuple[str, str]] = field(default_factory=Counter)
    streams: Counter[tuple[str, str]] = field(default_factory=Counter)
    conflicts: list[Move] = field(default_factory=list)
    unproven: int = 0


class Reshard:
    """Moves the keys of `old` servers and of the new list to the new list."""

    def __init__(self, clients: ShardClients, old: Sequence[ShardClients], keys: Keys) -> None:
        shards = clients.shards
        if not isinstance(shards, HashMap):
            raise RelayError(
                "a Redis Cluster moves its keys itself: use redis-cli --cluster reshard"
            )
        if not all(isinstance(each.shards, HashMap) for each in old):
            raise RelayError("--removed: keys of a Redis Cluster cannot be moved to other servers")
        self._shards = shards
        self._keys = keys
        self._all = [clients, *old]
        self._clients: dict[str, RedisClient] = {}
        self._servers: dict[str, ServerShard] = {}
        self._certificates: dict[str, int] = {}
        # By server: its version, and its process and database. A removed name may be another name
        # of a server that stays.
        self._versions: dict[str, str] = {}
        self._databases: dict[str, tuple[str, int]] = {}
        self._leases: dict[str, Lease] = {}
        self._held_until = 0.0
        # Pairs of servers of which the second has accepted a key of the first.
        self._accepted: set[tuple[str, str]] = set()

    async def connect(self) -> None:
        """Connect to all servers. Call this first.

        Raises:
            RelayError: A server cannot be reached, one of the present list is missing, or two names
                of the new list are of the same server.
        """
        for clients in self._all:
            for shard, client in await clients.each():
                if isinstance(shard, ServerShard) and shard.id not in self._clients:
                    information = await connect.command(client, "INFO")
                    replid = str(information.get("master_replid", "")).encode()
                    self._certificates[shard.id] = certificate_of(replid)
                    self._clients[shard.id] = client
                    self._servers[shard.id] = shard
                    self._versions[shard.id] = _version(information)
                    process = str(information.get("run_id") or shard.id)
                    database = (await connect.discover(shard.settings)).db
                    self._databases[shard.id] = process, database
        alone = Keys(self._keys.prefix.decode())
        own = f"reshard:{secrets.token_hex(8)}"
        self._leases = {
            name: Lease(client=client, keys=alone, name="reshard", instance=own, ttl_s=_LEASE_S)
            for name, client in self._clients.items()
        }
        refuse_same({each.name: self._databases[each.id] for each in self._shards.shards})
        for name, client in self._clients.items():
            stored = await connect.command(client, "GET", self._keys.servers)
            names = (stored or b"").decode(errors="replace").split(", ")
            missing = [each for each in names if each and each not in self._servers]
            if missing:
                where = self._servers[name].name
                raise RelayError(
                    f"the present list of servers, stored on {where}, contains"
                    f" {', '.join(missing)}: add --removed with its URL, so that its keys are"
                    f" moved. If its data is lost, delete {self._keys.servers.decode()} on all"
                    " servers first"
                )

    async def live(self) -> list[str]:
        """Return the workers that are alive on any server."""
        prefix = self._keys.prefix.decode()
        names = (Keys(prefix), Keys(prefix, has_site_tag=True))
        found = [
            worker.instance
            for client in self._clients.values()
            for keys in names
            for worker in await live_workers(client, keys)
        ]
        return sorted(set(found))

    async def run(self, *, dry: bool, progress: Callable[[int], None]) -> Resharded:
        """Move all keys that are on another server than their own. `dry`: only count them."""
        result = Resharded()
        for name, client in self._clients.items():
            async for moves in self._moves(name, client):
                for move in moves:
                    await self._check_versions(move)
                for begin in range(0, len(moves), _AT_ONCE):
                    if not dry:
                        await self._hold()
                    chunk = moves[begin : begin + _AT_ONCE]
                    errors: list[RelayError] = []
                    async with asyncio.TaskGroup() as tasks:
                        for move in chunk:
                            tasks.create_task(self._process(move, result, dry, errors))
                    if errors:
                        raise errors[0]
                    progress(result.keys.total())
        return result

    async def _process(
        self, move: Move, result: Resharded, dry: bool, errors: list[RelayError]
    ) -> None:
        try:
            if not dry and not await self._move(move, result):
                return
        except RelayError as exc:
            # The other keys are completed before it is raised.
            errors.append(exc)
            return
        servers = move.source.name, move.target.name
        result.keys[servers] += 1
        if self._keys.channel_of_stream(move.key) is not None:
            result.streams[servers] += 1

    async def _hold(self) -> None:
        """Take or extend the lease on all servers. Two runs would delete each other's copies.

        Raises:
            RelayError: Another run has it.
        """
        now = asyncio.get_running_loop().time()
        if now < self._held_until:
            return
        # Not 0, so that `release` releases those that were taken before one is refused.
        self._held_until = now
        for name, lease in self._leases.items():
            if not await lease.hold():
                raise RelayError(
                    f"another relay reshard uses {self._servers[name].name}. If it was killed,"
                    f" repeat the command in {_LEASE_S} s"
                )
        self._held_until = now + _LEASE_S / 3

    async def release(self) -> None:
        """Call this at the end, so that the command can be repeated at once."""
        for lease in self._leases.values() if self._held_until else ():
            await lease.give_up()

    async def count_misplaced(self, result: Resharded) -> int:
        """Return how many keys are still on another server than their own, except conflicts."""
        known = {(move.source.id, move.key) for move in result.conflicts}
        return sum(
            [
                (move.source.id, move.key) not in known
                for name, client in self._clients.items()
                async for moves in self._moves(name, client)
                for move in moves
            ]
        )

    async def waiting_queues(self, names: Sequence[str]) -> list[str]:
        """Return a line for each queue that has, or may have, commands on a server that is not in
        the new list."""
        present = {self._databases[shard.id] for shard in self._shards.shards}
        keys = [name.encode() for name in names] + [self._keys.queue_taken(n) for n in names]
        found = []
        for name, client in self._clients.items():
            for key in keys if self._databases[name] not in present else ():
                where = f"{key.decode()} on {self._servers[name].name}"
                try:
                    if await connect.command(client, "EXISTS", key):
                        found.append(f"commands wait in {where}")
                except connect.CommandRefused as exc:
                    found.append(f"{where} may contain commands ({exc})")
        return found

    async def _moves(self, name: str, client: RedisClient) -> AsyncIterator[list[Move]]:
        source = self._servers[name]
        pattern = self._keys.pattern_of_all
        async for found in connect.scan(client, pattern, _SCAN):
            moves = []
            for key in dict.fromkeys(found):
                new_key = self._new_key(key)
                if new_key is None:
                    continue
                target = cast(ServerShard, self._shards.shard_of(new_key))
                if self._databases[target.id] != self._databases[name] or new_key != key:
                    moves.append(Move(source, target, key, new_key))
            yield moves

    def _new_key(self, key: bytes) -> bytes | None:
        """Return the name of the key in the new list, or None if it stays or is not needed."""
        rest = key.removeprefix(self._keys.prefix)
        name = rest.removeprefix(SITE_TAG)
        if name == rest and tag_of(key) != key:
            return None if rest.startswith(_LEFT) else key
        if not name.startswith(_KEPT):
            return None
        site = self._keys.prefix + (SITE_TAG if self._keys.has_site_tag else b"")
        return site + name

    async def _check_versions(self, move: Move) -> None:
        """Raise RelayError if the target cannot read keys of the source. Write nothing."""
        servers = move.source.id, move.target.id
        if servers in self._accepted:
            return
        payload = await connect.command(self._clients[move.source.id], "DUMP", move.key)
        if payload is None:
            return
        try:
            # Redis reads the payload, and discards it because its time to live is over.
            probe = self._keys.prefix + b"reshard"
            target = self._clients[move.target.id]
            await connect.command(target, "RESTORE", probe, 1, payload, "ABSTTL")
        except connect.CommandRefused as exc:
            if not exc.reply.startswith(_UNREADABLE):
                raise
            raise RelayError(
                f"{move.target.name} ({self._versions[move.target.id]}) cannot read keys of"
                f" {move.source.name} ({self._versions[move.source.id]}). Nothing was moved between"
                " them. Install a version there that reads keys of the other one, for example the"
                " same version, then repeat"
            ) from exc
        self._accepted.add(servers)

    async def _move(self, move: Move, result: Resharded) -> bool:
        source, target = self._clients[move.source.id], self._clients[move.target.id]
        for _ in range(_ATTEMPTS):
            async with connect.transaction(source) as pipeline:
                await pipeline.watch(move.key)
                payload = await connect.command(pipeline, "DUMP", move.key)
                if payload is None:
                    return False
                ttl_ms = await connect.command(pipeline, "PTTL", move.key)
                if ttl_ms in (0, _NO_KEY):
                    return False  # expired: RESTORE would create it without a time to live
                ttl_ms = max(0, ttl_ms)
                copied = await self._copy(source, target, move, payload, ttl_ms)
                if copied is None:
                    result.conflicts.append(move)
                    return False
                pipeline.multi()  # type: ignore[no-untyped-call]
                pipeline.execute_command("DEL", move.key)
                if await connect.executed(pipeline):
                    if self._keys.channel_of_stream(move.key) is not None:
                        is_certified = await self._certify(target, move)
                        result.unproven += not is_certified
                    return True
            if not await connect.command(source, "EXISTS", move.key):
                return False  # expired, or deleted: the copy may be the only one
            # The key was changed. Copy it again.
            if not await self.delete_copy(target, move, copied):
                result.conflicts.append(move)
                return False
        raise RelayError(f"{move.key.decode()} changes all the time: stop its producers")

    async def _copy(
        self, source: RedisClient, target: RedisClient, move: Move, payload: bytes, ttl_ms: int
    ) -> bytes | None:
        """Return the payload of the copy. None if the target has another key of this name."""

        async def is_equal(copy: bytes) -> bool:
            if copy == payload:
                return True
            contents = await _contents(target, move.new_key)
            return contents is not None and contents == await _contents(source, move.key)

        present: bytes | None = await connect.command(target, "DUMP", move.new_key)
        if present is not None:
            if await is_equal(present):
                return present  # of an interrupted run
            if not await self._is_empty_stream(target, move.new_key):
                return None
            if not await self.delete_copy(target, move, present):
                return None
        await connect.command(target, "RESTORE", move.new_key, ttl_ms, payload)
        copy: bytes | None = await connect.command(target, "DUMP", move.new_key)
        if copy is None or not await is_equal(copy):
            raise RelayError(
                f"the copy of {move.key.decode(errors='replace')} on {move.target.name} differs, so"
                f" the key was not deleted on {move.source.name}"
            )
        return copy

    async def delete_copy(self, target: RedisClient, move: Move, payload: bytes) -> bool:
        """Delete the key on the target. Return False if it has other contents meanwhile."""
        async with connect.transaction(target) as pipeline:
            await pipeline.watch(move.new_key)
            if await connect.command(pipeline, "DUMP", move.new_key) != payload:
                return False
            pipeline.multi()  # type: ignore[no-untyped-call]
            pipeline.execute_command("DEL", move.new_key)
            return await connect.executed(pipeline)

    async def _is_empty_stream(self, client: RedisClient, key: bytes) -> bool:
        """Return True for a stream that only workers or clients have created."""
        if self._keys.channel_of_stream(key) is None:
            return False
        found = await _stream(client, key)
        return found is not None and not found["entries-added"] and not found["length"]

    async def _certify(self, target: RedisClient, move: Move) -> bool:
        """Give the stream the certificate of its new server if that of the old one is present."""
        stream = await _stream(target, move.new_key)
        groups = cast("Mapping[bytes, str]", stream["groups"]) if stream else {}
        if MARKER_GROUP not in groups:
            return True  # no client has an incarnation
        marker = EntryID.parse(groups[MARKER_GROUP])
        if marker.seq & LOW != self._certificates[move.source.id]:
            return False
        seq = (marker.seq >> 32) << 32 | self._certificates[move.target.id]
        place = str(EntryID(marker.ms, seq))
        await connect.command(target, "XGROUP", "SETID", move.new_key, MARKER_GROUP, place)
        return True


async def _contents(client: RedisClient, key: bytes) -> object:
    """Return the contents of a key in a form that can be compared, or None if there is no key."""
    kind = _text(await connect.command(client, "TYPE", key))
    if kind == "stream":
        return await _stream(client, key)
    if kind in _READ:
        name, *range_of_all = _READ[kind]
        found = await connect.command(client, name, key, *range_of_all)
        # The order of a set is not part of its contents.
        return kind, sorted(found) if kind == "set" else found
    return None


async def _stream(client: RedisClient, key: bytes) -> dict[str, Any] | None:
    """Return what identifies the contents of a stream, or None if the key is another type."""
    try:
        stream: Mapping[Any, Any] = await connect.command(client, "XINFO", "STREAM", key)
        groups: Sequence[Any] = await connect.command(client, "XINFO", "GROUPS", key)
    except connect.CommandRefused:
        return None
    names = ("length", "entries-added", "last-generated-id", "max-deleted-entry-id")
    values = {_text(name): value for name, value in stream.items()}
    described: dict[str, Any] = {name: values.get(name) for name in names}
    described["first"] = values.get("first-entry")
    described["last"] = values.get("last-entry")
    described["groups"] = {
        each[b"name"]: _text(each[b"last-delivered-id"]) for each in cast("list[Any]", groups)
    }
    return described


def _version(information: Mapping[str, Any]) -> str:
    # Valkey reports in redis_version the version of Redis that it is compatible with.
    if version := information.get("valkey_version"):
        return f"Valkey {version}"
    return f"Redis {information.get('redis_version')}"


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
