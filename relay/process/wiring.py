"""Parts of the composition that need more than their constructor."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from producers.registry import ProducerContext, Running, find_producers
from relay.core.errors import LimitExceeded
from relay.process.embedded import EmbeddedValkey
from relay.stream.format import entry

if TYPE_CHECKING:
    from relay.config.loading import Config
    from relay.config.settings import NamespaceSettings, RedisSettings
    from relay.core.metrics import Metrics
    from relay.core.model import Channel, EntryID, Principal
    from relay.doorkit.contract import OpenSession, Publish
    from relay.hub.encoding import Encoder
    from relay.hub.hub import Hub
    from relay.hub.session import Client, Session
    from relay.stream.cluster.connection_limits import ConnectionLimiter
    from relay.stream.format.keys import Keys
    from relay.stream.write.appender import Appender


async def reachable_redis(
    settings: RedisSettings, stack: contextlib.AsyncExitStack, *, starts_it: bool
) -> RedisSettings:
    """Return the settings of the Redis to use; start the embedded one if `starts_it`."""
    if settings.url != "embedded":
        return settings
    local = settings.model_copy(update={"url": f"redis://127.0.0.1:{settings.embedded_port}/0"})
    if not starts_it:
        return local
    folder = Path(settings.embedded_dir or "data")
    embedded = EmbeddedValkey(folder, settings.embedded_port)
    await embedded.start()
    stack.push_async_callback(embedded.stop)
    await stack.enter_async_context(_task(embedded.supervise()))
    return local


def opening(seats: ConnectionLimiter, hub: Hub) -> OpenSession:
    """What `DoorContext.open` is."""

    async def open_session(
        principal: Principal, encoder: Encoder, client: Client, *, limit: int | None = None
    ) -> Session:
        door = None if limit is None else principal.door
        async with seats.seat(principal.user, door, limit or 0):
            return hub.open(principal, encoder, client)

    return open_session


def publishing(appender: Appender, max_entry_bytes: int) -> Publish:
    """What `DoorContext.publish` is."""

    def publish(
        channel: Channel,
        data: bytes,
        *,
        client: str | None = None,
        uid: str | None = None,
        type: str | None = None,
        to: Iterable[str] | None = None,
        info: bytes | None = None,
        extra: Mapping[bytes, bytes] | None = None,
        unless_latest: bytes | None = None,
    ) -> asyncio.Future[EntryID]:
        fields = entry.encode(
            data, type=type, uid=uid, to=to, client=client, info=info, extra=extra
        )
        size = entry.size(fields)
        if size > max_entry_bytes:
            raise LimitExceeded(f"too large: {size} of {max_entry_bytes} bytes")
        return appender.append(channel, fields, uid, unless_latest=unless_latest)

    return publish


def producers(
    config: Config,
    metrics: Metrics,
    redis: RedisSettings,
    keys: Keys,
    instance: str,
    namespace_of: Callable[[Channel], NamespaceSettings],
) -> Iterator[tuple[str, Running]]:
    """Those that this process is to run itself, by name."""
    for name, producer in find_producers().items():
        settings = config.producers[f"producer:{name}"]
        if not producer.wanted(settings):
            continue
        context = ProducerContext(
            keys=keys,
            redis=redis,
            publish=config.publish,
            instance=instance,
            namespace_of=namespace_of,
            max_entry_bytes=config.stream.max_entry_bytes,
            count=partial(_count, metrics, name),
        )
        yield name, producer.build(context, settings)


def _count(metrics: Metrics, name: str, result: str, number: int) -> None:
    metrics.producer_items.labels(name, result).inc(number)


@contextlib.asynccontextmanager
async def _task(coroutine: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as group:
        task = group.create_task(coroutine, name="embedded Valkey")
        yield
        task.cancel()
