"""Send events to Redis on one connection to each server. It is kept, and reopened if lost."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from functools import cached_property
from operator import itemgetter

from typing_extensions import override

from producers.outgoing import (
    DestinationUnavailable,
    Outcome,
    OutgoingEvent,
    PostponedEvent,
    PublishFailed,
    RejectedEvent,
    Sender,
)
from relay.config.settings import NamespaceSettings, RedisSettings
from relay.core.errors import (
    ConfigError,
    DurabilityUnavailable,
    NotDurable,
    RedisUnavailable,
    RelayError,
    StartError,
)
from relay.core.model import EntryID
from relay.stream.connection.connect import CommandRefused, RefusedForNow
from relay.stream.connection.pipeline_connection import PipelineConnection
from relay.stream.connection.scripts import load
from relay.stream.shards.making import keys_of, shard_map
from relay.stream.shards.shard import Shard, ShardMap, is_misplaced
from relay.stream.write.append import APPEND_ONCE, WAIT_MS, Append, AppendCommands, send

# Pause before an event is sent again whose slot is being moved.
_PAUSE_S = 0.02


class DirectSender(Sender):
    """A `Sender` that appends to Redis. Needs only the ACL user `producer` of docs/redis.md.

    Args:
        settings: Address and credentials of Redis.
        window_s: How long Redis remembers uids.
        maxlen: Approximate maximum of entries in a stream (0: no limit).
        load_script: Load the script with SCRIPT LOAD first. Needed for the ACL user `relay`, which
            may not use EVAL.
        wait_ms: Longest wait for the confirmations of a durability. Must be shorter than the
            caller's time limit.
    """

    def __init__(
        self,
        settings: RedisSettings,
        *,
        window_s: int,
        maxlen: int = 0,
        load_script: bool = False,
        wait_ms: int = WAIT_MS,
    ) -> None:
        # The caller's time limit covers connecting and sending together. It must be reached first.
        self._settings = settings.model_copy(
            update={"connect_timeout_s": 60.0, "command_timeout_s": 300.0}
        )
        self._namespace = NamespaceSettings(retention_count=maxlen)
        self._window_s = window_s
        self._load_script = load_script
        self._wait_ms = wait_ms
        self._connections: dict[Shard, PipelineConnection] = {}
        # A restarted server has lost its scripts. The connection is lost as well, and reopening it
        # resets this.
        self._scripted: set[PipelineConnection] = set()
        self._opening = asyncio.Lock()

    # An invalid URL is an error of `send`, as for an event with an invalid channel.
    @cached_property
    def _shards(self) -> ShardMap:
        return shard_map(self._settings)

    @cached_property
    def _commands(self) -> AppendCommands:
        return AppendCommands(
            keys_of(self._settings), lambda _: self._namespace, uid_window_s=self._window_s
        )

    @override
    async def send(
        self, events: Sequence[OutgoingEvent], on_sending: Callable[[], None]
    ) -> list[Outcome]:
        sent = False

        def sending() -> None:
            nonlocal sent
            sent = True
            on_sending()

        try:
            appends = [
                self._commands.build(
                    each.channel, each.fields(), each.uid, durability=each.durability
                )
                for each in events
            ]
            outcomes: list[Outcome] = [None] * len(appends)
            left = list(range(len(appends)))
            if not self._shards.shards:
                await self._shards.refresh()
            while True:
                results = await self._send(left, appends, sending)
                for index, result in results:
                    outcomes[index] = _outcome(result)
                left = [index for index, result in results if _is_misplaced(result)]
                if not left:
                    return outcomes
                # The slot is being moved to another server.
                await asyncio.sleep(_PAUSE_S)
                await self._shards.refresh()
        except RedisUnavailable as exc:
            raise DestinationUnavailable(str(exc), sent=sent) from exc
        except DurabilityUnavailable as exc:
            return [PostponedEvent(str(exc)) for _ in events]
        except (ConfigError, StartError) as exc:
            raise PublishFailed(str(exc).replace("[redis] ", "")) from exc

    async def _send(
        self, indexes: Sequence[int], appends: Sequence[Append], on_sending: Callable[[], None]
    ) -> list[tuple[int, EntryID | RelayError]]:
        """Send these appends, those of each server in order. Return the results, sorted."""
        by_shard: dict[Shard, list[int]] = {}
        for index in indexes:
            by_shard.setdefault(self._shards.shard_of(appends[index].stream), []).append(index)
        results: list[tuple[int, EntryID | RelayError]] = []
        for shard, own in by_shard.items():
            connection = await self._connected(shard)
            parts = [appends[index] for index in own]
            script_known = connection in self._scripted
            if parts[0].script is not None:
                self._scripted.add(connection)
            on_sending()
            try:
                found = await send(
                    connection, parts, script_known=script_known, wait_ms=self._wait_ms
                )
            except (RedisUnavailable, asyncio.CancelledError):
                # After a cancellation the reply may arrive at any time, so the next event must use
                # a new connection.
                self._drop(shard, connection)
                raise
            results += zip(own, found, strict=True)
        return sorted(results, key=itemgetter(0))

    @override
    async def close(self) -> None:
        for shard, connection in list(self._connections.items()):
            self._drop(shard, connection)

    async def _connected(self, shard: Shard) -> PipelineConnection:
        async with self._opening:
            if (known := self._connections.get(shard)) is not None:
                return known
            connection = await PipelineConnection.open(
                await shard.locate(),
                settings=self._settings,
                on_lost=lambda _: self._drop(shard, connection),
                name="relay-producer",
                check_primary=False,
            )
            self._connections[shard] = connection
            if self._load_script:
                with contextlib.suppress(CommandRefused):
                    await load(connection, APPEND_ONCE)
                    self._scripted.add(connection)
            # It may be lost by now. Then the caller's commands fail.
            return connection

    def _drop(self, shard: Shard, connection: PipelineConnection) -> None:
        self._scripted.discard(connection)
        if self._connections.get(shard) is connection:
            del self._connections[shard]
            connection.close()


def _is_misplaced(result: EntryID | RelayError) -> bool:
    return isinstance(result, RefusedForNow) and is_misplaced(result.reply)


def _outcome(result: EntryID | RelayError) -> Outcome:
    if isinstance(result, EntryID):
        return result
    reason = str(result)
    if isinstance(result, NotDurable):
        return PostponedEvent(reason, sent=True)
    if not isinstance(result, CommandRefused):
        return PostponedEvent(reason)
    # If the user may not run scripts, all events fail: rejecting them would empty a whole spool.
    # A forbidden key may be the key of this event only.
    unusable = result.code == "NOSCRIPT" or (result.code == "NOPERM" and " to run " in reason)
    return PostponedEvent(reason) if unusable else RejectedEvent(reason)
