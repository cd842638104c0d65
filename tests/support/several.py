"""Several servers as one, for tests: a client that sends each command to the server of its key.

Tests name keys as they are on a single server. In a topology whose keys of the site have a tag, the
client adds it: `relay:control` becomes `relay:{site}control`. Replies are not changed.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import redis
import redis.asyncio
from typing_extensions import override

from relay.config.settings import RedisSettings
from relay.stream.connection.connect import RedisEndpoint
from relay.stream.shards.making import shard_map
from tests.support.valkey import Flavour, Server, User

Word = bytes | str | int | float
PREFIX = b"relay:"
SITE = b"{site}"
# Keys of each server, and keys that are not valid streams.
_SAME_EVERYWHERE = b"relay:servers", b"relay:canary:", b"relay:stream"
# Commands without a key, for every server. Their replies are added up.
_OF_EACH_SERVER = frozenset(
    b"ACL CLIENT COMMAND CONFIG DBSIZE DEBUG FLUSHALL INFO KEYS PING PUBSUB SCRIPT TIME".split()
)
# Commands whose first argument is a subcommand.
_WITH_SUBCOMMAND = frozenset(b"XGROUP XINFO OBJECT MEMORY".split())
_OF_SEVERAL_KEYS = frozenset(b"DEL EXISTS UNLINK".split())
_SCRIPTS = frozenset(b"EVAL EVALSHA FCALL".split())


async def shard_at(settings: RedisSettings, key: bytes) -> tuple[RedisEndpoint, RedisSettings]:
    """Return the address and the settings of the server that has this key, for one connection."""
    shards = shard_map(settings)
    await shards.refresh()
    shard = shards.shard_of(key)
    return await shard.locate(), shard.settings


class SeveralServers(Server):
    """Servers that relay uses together. Everything without a key happens on all of them."""

    # Relay uses SPUBLISH.
    is_cluster = False

    def __init__(self, folder: Path, flavour: Flavour, servers: Sequence[Server]) -> None:
        super().__init__(folder, flavour)
        self.servers = list(servers)
        self.port = servers[0].port
        self._cross_slot: list[str] = []

    @abstractmethod
    def server_of(self, key: bytes) -> Server:
        """Return the server that has this key."""

    def note_errors(self) -> None:
        """Keep the errors that CONFIG RESETSTAT is going to delete."""
        for server in self.servers:
            with server.client() as admin:
                found: Any = admin.info("errorstats")
            self._cross_slot += [f"{server.port}: {name}" for name in found if "CROSSSLOT" in name]

    def check_slots(self) -> None:
        """Fail if a command named keys of two slots since the last time."""
        self.note_errors()
        found, self._cross_slot = self._cross_slot, []
        if found:
            with self.client() as admin:
                admin.config_resetstat()
            self._cross_slot.clear()
        assert not found, found

    @override
    def client(self, user: User = "admin") -> redis.Redis:
        return RoutedClient(self, user)

    @override
    def start(self) -> Self:
        for server in self.servers:
            server.start()
        return self

    @override
    def stop(self) -> None:
        for server in self.servers:
            server.stop()

    @override
    def kill(self) -> None:
        for server in self.servers:
            server.kill()

    @override
    def freeze(self) -> None:
        for server in self.servers:
            server.freeze()

    @override
    def thaw(self) -> None:
        for server in self.servers:
            server.thaw()

    def routes(self, words: Sequence[Word]) -> Iterator[tuple[Server, tuple[Word, ...]]]:
        """Split a command into commands for single servers."""
        name, *more = _bytes(words[0]).upper().split()
        if name == b"PUBSUB" and words[1] == "NUMSUB":
            command = "SHARDNUMSUB" if self.is_cluster else "NUMSUB"
            yield self._routed(name, ["PUBSUB", command, *words[2:]], 2)
        elif name in _OF_EACH_SERVER:
            for server in self.servers:
                yield server, tuple(words)
                if name == b"KEYS":
                    # The pattern may match keys of channels and keys of the site.
                    yield server, (words[0], self.named(words[1]))
        elif name in _OF_SEVERAL_KEYS:
            for word in words[1:]:
                yield self._routed(name, [words[0], word], 1)
        elif name in {b"XREAD", b"XREADGROUP"}:
            upper = [_bytes(word).upper() for word in words]
            yield self._routed(name, words, upper.index(b"STREAMS") + 1)
        elif name in _SCRIPTS:
            yield self._routed(name, words, 3)
        elif name == b"PUBLISH" and self.is_cluster:
            yield self._routed(name, ["SPUBLISH", *words[1:]], 1)
        else:
            yield self._routed(name, words, 2 if name in _WITH_SUBCOMMAND and not more else 1)

    def _routed(
        self, name: bytes, words: Sequence[Word], place: int
    ) -> tuple[Server, tuple[Word, ...]]:
        assert len(words) > place, f"no key in {name.decode()}: is it for each server?"
        key = self.named(words[place])
        return self.server_of(key), (*words[:place], key, *words[place + 1 :])

    def named(self, word: Word) -> bytes:
        """Return the name that a key of a single server has here."""
        key = _bytes(word)
        is_of_site = key.startswith(PREFIX) and b"{" not in key
        if not is_of_site or key.startswith(_SAME_EVERYWHERE):
            return key
        return PREFIX + SITE + key.removeprefix(PREFIX)


class RoutedClient(redis.Redis):
    """A blocking client of several servers. A pipeline is not one transaction."""

    def __init__(self, servers: SeveralServers, user: User) -> None:
        super().__init__(driver_info=None, protocol=3)
        self._servers = servers
        self._clients = {each: each.client(user) for each in servers.servers}
        self._waiting: list[tuple[Any, ...]] | None = None

    @override
    def execute_command(self, *words: Any, **options: Any) -> Any:
        if self._waiting is not None:
            self._waiting.append(words)
            return self
        if b"RESETSTAT" in _bytes(b" ".join(map(_bytes, words))).upper():
            self._servers.note_errors()
        routes = self._servers.routes(words)
        return merged(
            [
                self._clients[one].execute_command(*own, **options)  # type: ignore[no-untyped-call]
                for one, own in routes
            ]
        )

    @override
    def pipeline(self, transaction: Any = True, shard_hint: Any = None) -> Any:
        batch = RoutedClient.__new__(RoutedClient)
        batch.__dict__.update(self.__dict__)
        batch._waiting = []
        return batch

    def execute(self) -> list[Any]:
        """Execute the commands of a pipeline, with one pipeline for each server."""
        waiting, self._waiting = self._waiting or [], []
        parts: dict[Server, Any] = {}
        replies: list[list[Any]] = []
        places: dict[Server, list[list[Any]]] = {}
        for words in waiting:
            replies.append([])
            for server, own in self._servers.routes(words):
                if server not in parts:
                    parts[server] = self._clients[server].pipeline(transaction=False)
                parts[server].execute_command(*own)
                places.setdefault(server, []).append(replies[-1])
        for server, part in parts.items():
            for place, reply in zip(places[server], part.execute(), strict=True):
                place.append(reply)
        return [merged(each) for each in replies]

    @override
    def close(self) -> None:
        if self._waiting is None:
            for client in self._clients.values():
                client.close()


class AsyncRoutedClient(redis.asyncio.Redis):
    """The same for an event loop."""

    def __init__(self, servers: SeveralServers, user: User) -> None:
        super().__init__(driver_info=None, protocol=3)
        self._blocking = RoutedClient(servers, user)

    @override
    async def execute_command(self, *words: Any, **options: Any) -> Any:
        return await asyncio.to_thread(self._blocking.execute_command, *words, **options)

    @override
    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> Any:
        return _AsyncBatch(self._blocking.pipeline())

    @override
    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        self._blocking.close()


class _AsyncBatch:
    def __init__(self, batch: Any) -> None:
        self._batch = batch

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batch, name)

    async def execute(self) -> list[Any]:
        replies: list[Any] = await asyncio.to_thread(self._batch.execute)
        return replies


def merged(replies: Sequence[Any]) -> Any:
    """Add up the replies of all servers: numbers, and lists. Of other replies, return the first."""
    first = replies[0]
    if len(replies) == 1 or isinstance(first, bool):
        return first
    if isinstance(first, int | float | list):
        return sum(replies, start=type(first)())
    if isinstance(first, dict):
        names = dict.fromkeys(name for reply in replies for name in reply)
        return {name: merged([each[name] for each in replies if name in each]) for name in names}
    return first


def _bytes(word: Word) -> bytes:
    return word if isinstance(word, bytes) else str(word).encode()
