"""Listen to the Redis channel `repo_update`, where seafevents publishes every commit.

Seafile then needs no HTTP connection to relay. All processes listen, and the one that holds a lease
appends. The others keep the messages of the last seconds and append them if they take over. A
commit that is already the library's latest is not appended again, even if it arrived by `/events`.
Redis does not store pub/sub messages: those published while no relay process listens are lost.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from typing import TYPE_CHECKING

from typing_extensions import override

from producers.registry import RunningProducer
from producers.settings import SeafHooksSettings
from relay.config.settings import RedisSettings
from relay.core.errors import ConfigError, RelayError
from relay.protocols.seafile import event_format
from relay.stream.cluster.leases import Lease
from relay.stream.connection import connect
from relay.stream.connection.reconnecting import ReconnectingConnection
from relay.stream.format import entry
from relay.stream.shards.clients import shard_clients
from relay.stream.write.appender import Appender

if TYPE_CHECKING:
    from producers.registry import ProducerContext
    from relay.core.model import Channel, EntryID
    from relay.protocols.seafile.event_format import SeafEvent

_log = logging.getLogger(__name__)

_LEASE = "seaf_hooks"
_LEASE_S = 3.0
_RENEW_S = 0.5
# Longer than the lease, so that a process that takes over has all messages that its predecessor may
# not have appended.
_KEEP_S = 10.0
_KEEP_MOST = 100_000
_CHANNEL = b"repo_update"


class SeafileHookListener(RunningProducer):
    """Appends an entry for every commit that Seafile publishes."""

    def __init__(self, context: ProducerContext, source: RedisSettings) -> None:
        self._context = context
        self._subscriber = ReconnectingConnection(
            source, subscribe_to=[_CHANNEL], on_message=self._on_message
        )
        self._appender = Appender(
            shards=context.shards,
            keys=context.keys,
            redis=context.redis,
            settings=context.publish,
            namespace_of=context.namespace_of,
        )
        self._holds = False
        # The latest commits of the libraries: those received within the last seconds, and those
        # that could not be appended yet.
        self._recent: OrderedDict[Channel, tuple[float, SeafEvent]] = OrderedDict()
        self._failed: dict[Channel, SeafEvent] = {}

    @override
    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._appender.run(), name="repo_update appender")
            tasks.create_task(self._subscriber.run(), name="repo_update subscriber")
            tasks.create_task(self._keep_lease(), name="repo_update lease")

    async def _keep_lease(self) -> None:
        context = self._context
        async with shard_clients(context.redis) as clients:
            lease = Lease(
                client=clients.home,
                keys=context.keys,
                name=_LEASE,
                instance=context.instance,
                ttl_s=_LEASE_S,
            )
            try:
                while True:
                    if (held := await lease.renew()) is not None:
                        self._set_holding(held)
                    self._remove_old()
                    for channel in list(self._failed) if self._holds else ():
                        self._append(self._failed.pop(channel))
                    await asyncio.sleep(_RENEW_S)
            finally:
                self._holds = False
                await lease.give_up()

    def _set_holding(self, holds: bool) -> None:
        if holds and not self._holds:
            _log.info("This process appends the commits of repo_update")
            self._holds = True
            for _, event in self._recent.values():
                self._append(event)
        elif not holds and self._holds:
            _log.warning("Another process has taken over appending the commits of repo_update")
            self._failed.clear()
            self._holds = False

    def _remove_old(self) -> None:
        oldest = time.monotonic() - _KEEP_S
        while self._recent:
            received_at, _ = next(iter(self._recent.values()))
            if received_at > oldest and len(self._recent) <= _KEEP_MOST:
                break
            self._recent.popitem(last=False)

    def _on_message(self, _name: bytes, payload: bytes) -> None:
        try:
            event = event_format.read_line(payload)
        except event_format.Unaddressed as exc:
            _log.warning("Ignored an unreadable message on repo_update: %s", exc)
            self._context.count("broken", 1)
            return
        if event is None:
            return
        self._recent[event.channel] = (time.monotonic(), event)
        self._recent.move_to_end(event.channel)
        if self._holds:
            self._context.count("taken", 1)
            self._append(event)

    def _append(self, event: SeafEvent) -> None:
        fields = entry.encode(
            event.content, type=event.type, extra={event_format.COMMIT: event.commit.encode()}
        )
        try:
            future = self._appender.append(event.channel, fields, unless_latest=event_format.COMMIT)
        except RelayError as exc:
            self._retry_later(event, exc)
            return

        def done(appended: asyncio.Future[EntryID]) -> None:
            if appended.cancelled():
                return
            exc = appended.exception()
            if exc is None:
                # Clients don't need an earlier commit once a later one has been appended.
                self._failed.pop(event.channel, None)
            else:
                self._retry_later(event, exc)

        future.add_done_callback(done)

    def _retry_later(self, event: SeafEvent, error: BaseException) -> None:
        _log.warning(
            "Could not append the commit of %s: %s; retrying in %g s",
            event.channel,
            error,
            _RENEW_S,
        )
        self._failed[event.channel] = event


def build(context: ProducerContext, settings: SeafHooksSettings) -> SeafileHookListener:
    """Create the producer. Raise ConfigError if its settings are incomplete."""
    if not settings.redis_url or settings.redis_url == "embedded":
        raise ConfigError("[producer:seaf_hooks] redis_url must be the address of Seafile's Redis")
    source = context.redis.model_copy(
        update={"url": settings.redis_url, "password": settings.redis_password}
    )
    connect.check(source, "[producer:seaf_hooks] redis_url")
    return SeafileHookListener(context, source)
