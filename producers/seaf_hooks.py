"""The tap on the Redis channel `repo_update`, where seafevents tells of every commit.

No HTTP from Seafile is needed then. The taps of all processes listen and one of them appends, under
a lease. The others remember what they heard last, and whoever takes over begins with that: a commit
that is the library's latest already is not appended again (nor is one that came by `/events`).
Pub/sub keeps nothing: what is published while no relay listens is lost.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from typing import TYPE_CHECKING

from producers.settings import SeafHooksSettings
from relay.config.settings import RedisSettings
from relay.core.errors import ConfigError, RelayError
from relay.protocols.seafile import event_format
from relay.stream.cluster.leases import Lease
from relay.stream.connection import connect
from relay.stream.connection.connect import redis_client
from relay.stream.connection.reconnecting import ReconnectingConnection
from relay.stream.format import entry
from relay.stream.write.appender import Appender

if TYPE_CHECKING:
    from producers.registry import ProducerContext
    from relay.core.model import Channel, EntryID
    from relay.protocols.seafile.event_format import SeafEvent

_log = logging.getLogger(__name__)

_LEASE = "seaf_hooks"
_LEASE_S = 3.0
_RENEW_S = 0.5
# Longer than a lease: who takes over has heard what the one before may not have appended.
_REMEMBERED_S = 10.0
_REMEMBERED = 100_000
_CHANNEL = b"repo_update"


class SeafileHookListener:
    """See `producers.registry.Running`."""

    def __init__(self, context: ProducerContext, source: RedisSettings) -> None:
        self._context = context
        self._link = ReconnectingConnection(
            source, subscribe_to=[_CHANNEL], on_message=self._on_message
        )
        self._appender = Appender(
            keys=context.keys,
            redis=context.redis,
            settings=context.publish,
            namespace_of=context.namespace_of,
        )
        self._holds = False
        # The latest commit of each library: heard within the last seconds, or not yet appended.
        self._heard: OrderedDict[Channel, tuple[float, SeafEvent]] = OrderedDict()
        self._failed: dict[Channel, SeafEvent] = {}

    async def run(self) -> None:
        """Until cancelled; survives everything that both Redis do."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._appender.run(), name="tap appends")
            tasks.create_task(self._link.run(), name="tap link")
            tasks.create_task(self._hold(), name="tap lease")

    async def _hold(self) -> None:
        context = self._context
        async with redis_client(context.redis) as client:
            lease = Lease(
                client=client,
                keys=context.keys,
                name=_LEASE,
                instance=context.instance,
                ttl_s=_LEASE_S,
            )
            try:
                while True:
                    try:
                        self._set_holding(await lease.hold())
                    except RelayError as exc:
                        # Nobody can append while Redis is away: it stays as it is.
                        _log.debug("tap: %s", exc)
                    self._forget()
                    for channel in list(self._failed) if self._holds else ():
                        self._append(self._failed.pop(channel))
                    await asyncio.sleep(_RENEW_S)
            finally:
                self._holds = False
                try:
                    async with asyncio.timeout(1.0):
                        await lease.release()
                except (RelayError, TimeoutError) as exc:
                    _log.info("tap: the lease is left to expire: %s", exc)

    def _set_holding(self, holds: bool) -> None:
        if holds and not self._holds:
            _log.info("tap: this process appends what Seafile publishes")
            self._holds = True
            for _, event in self._heard.values():
                self._append(event)
        elif not holds and self._holds:
            _log.warning("tap: another process appends what Seafile publishes")
            self._failed.clear()
            self._holds = False

    def _forget(self) -> None:
        before = time.monotonic() - _REMEMBERED_S
        while self._heard:
            heard_at, _ = next(iter(self._heard.values()))
            if heard_at > before and len(self._heard) <= _REMEMBERED:
                break
            self._heard.popitem(last=False)

    def _on_message(self, _name: bytes, payload: bytes) -> None:
        try:
            event = event_format.read_line(payload)
        except event_format.Unaddressed as exc:
            _log.warning("tap: a message cannot be read: %s", exc)
            self._context.count("broken", 1)
            return
        if event is None:
            return
        self._heard[event.channel] = (time.monotonic(), event)
        self._heard.move_to_end(event.channel)
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
            _log.warning("tap: %s waits: %s", event.channel, exc)
            self._failed[event.channel] = event
            return

        def done(appended: asyncio.Future[EntryID]) -> None:
            if appended.cancelled():
                return
            exc = appended.exception()
            if exc is None:
                # A later commit is there: an earlier one is news to nobody.
                self._failed.pop(event.channel, None)
            else:
                _log.warning("tap: %s waits: %s", event.channel, exc)
                self._failed[event.channel] = event

        future.add_done_callback(done)


def build(context: ProducerContext, settings: SeafHooksSettings) -> SeafileHookListener:
    """Return the producer. Raise ConfigError if its settings cannot work."""
    if not settings.redis_url or settings.redis_url == "embedded":
        raise ConfigError("[producer:seaf_hooks] redis_url: needs the address of Seafile's Redis")
    source = context.redis.model_copy(
        update={"url": settings.redis_url, "password": settings.redis_password}
    )
    connect.check(source, "[producer:seaf_hooks] redis_url")
    return SeafileHookListener(context, source)
