"""Send events to Redis on one connection, which is kept between events and reopened if lost."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence

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
)
from relay.core.model import EntryID
from relay.stream.connection.connect import CommandRefused, discover
from relay.stream.connection.pipeline_connection import PipelineConnection
from relay.stream.connection.scripts import load
from relay.stream.format.keys import Keys
from relay.stream.write.append import APPEND_ONCE, WAIT_MS, AppendCommands, send


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
        namespace = NamespaceSettings(retention_count=maxlen)
        self._commands = AppendCommands(
            Keys(settings.prefix), lambda _: namespace, uid_window_s=window_s
        )
        self._load_script = load_script
        self._wait_ms = wait_ms
        self._connection: PipelineConnection | None = None
        # A restarted server has lost its scripts. The connection is lost as well, and reopening it
        # resets this.
        self._script_known = False
        self._opening = asyncio.Lock()

    @override
    async def send(
        self, events: Sequence[OutgoingEvent], on_sending: Callable[[], None]
    ) -> list[Outcome]:
        appends = [
            self._commands.build(each.channel, each.fields(), each.uid, durability=each.durability)
            for each in events
        ]
        try:
            connection = await self._connected()
        except RedisUnavailable as exc:
            raise DestinationUnavailable(str(exc)) from exc
        except ConfigError as exc:
            raise PublishFailed(str(exc).replace("[redis] ", "")) from exc
        script_known = self._script_known
        self._script_known = script_known or appends[0].script is not None
        on_sending()
        try:
            results = await send(
                connection, appends, script_known=script_known, wait_ms=self._wait_ms
            )
        except RedisUnavailable as exc:
            self._drop(connection)
            raise DestinationUnavailable(str(exc), sent=True) from exc
        except DurabilityUnavailable as exc:
            return [PostponedEvent(str(exc)) for _ in events]
        except asyncio.CancelledError:
            # The reply may arrive at any time, so the next event must use a new connection.
            self._drop(connection)
            raise
        return [_outcome(result) for result in results]

    @override
    async def close(self) -> None:
        self._drop(self._connection)

    async def _connected(self) -> PipelineConnection:
        async with self._opening:
            if self._connection is None:
                connection = await PipelineConnection.open(
                    await discover(self._settings),
                    settings=self._settings,
                    on_lost=lambda _: self._drop(connection),
                    name="relay-producer",
                    check_primary=False,
                )
                self._connection = connection
                self._script_known = False
                if self._load_script:
                    with contextlib.suppress(CommandRefused):
                        await load(connection, APPEND_ONCE)
                        self._script_known = True
            return self._connection

    def _drop(self, connection: PipelineConnection | None) -> None:
        if connection is not None and connection is self._connection:
            self._connection = None
            connection.close()


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
