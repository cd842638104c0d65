"""Publish events from Python. A call takes no longer than a time limit.

`AsyncPublisher` is for asyncio programs, `Publisher` for all others. Both append to Redis directly
or, with `http=`, use relay's HTTP API. An event that cannot be sent within the time limit raises an
error. With `spool=PATH` it is stored in a local file instead, and the next successful call delivers
the stored events, each once and in order.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import replace
from types import TracebackType
from typing import Any, Self, TypeVar
from uuid import uuid4

from pydantic import SecretStr

from producers.direct import DirectSender
from producers.http import HttpSender
from producers.network_thread import NetworkThread
from producers.outgoing import (
    SPOOL_BYTES,
    WINDOW_S,
    DestinationUnavailable,
    InvalidEvent,
    OutgoingEvent,
    PostponedEvent,
    PublishFailed,
    RejectedEvent,
    Sender,
    outgoing_event,
    send_until,
)
from producers.spool import Spool
from producers.spool_delivery import deliver
from relay.config.settings import RedisSettings
from relay.core.model import EntryID

_log = logging.getLogger(__name__)
T = TypeVar("T")

LIMIT_MS = 200
# The part of the time limit in which Redis may confirm the durability of an event.
_WAIT_SHARE = 0.8

__all__ = ["AsyncPublisher", "InvalidEvent", "PublishFailed", "Publisher"]


class AsyncPublisher:
    """Publisher for asyncio programs. Use one object per event loop; calls may overlap.

    Args:
        url: Address of Redis, as `[redis] url`.
        prefix: Prefix of relay's keys.
        password: Password of Redis, if `url` has none.
        http: Address of relay. If set, events are sent by HTTP and the settings of Redis are
            ignored.
        secret: Secret of the HTTP API.
        limit_ms: Time limit of a call for all network operations together.
        window_s: How long a uid is remembered. By HTTP, relay's setting applies.
        maxlen: Approximate number of entries to which a stream is trimmed (0: not trimmed). By
            HTTP, relay's setting applies.
        spool: File for events that cannot be sent.
        spool_bytes: Maximum size of that file.
    """

    def __init__(
        self,
        url: str = "redis://127.0.0.1:6379/0",
        *,
        prefix: str = "relay:",
        password: str = "",
        http: str = "",
        secret: str = "",
        limit_ms: float = LIMIT_MS,
        window_s: int = WINDOW_S,
        maxlen: int = 0,
        spool: str | os.PathLike[str] | None = None,
        spool_bytes: int = SPOOL_BYTES,
    ) -> None:
        if not 0 < limit_ms < float("inf"):
            raise ValueError("limit_ms must be a positive number")
        self._limit_s = limit_ms / 1000
        redis = RedisSettings(url=url, prefix=prefix, password=SecretStr(password))
        self._new_sender: Callable[[], Sender] = lambda: (
            HttpSender(http, secret=secret)
            if http
            else DirectSender(
                redis,
                window_s=window_s,
                maxlen=maxlen,
                wait_ms=int(limit_ms * _WAIT_SHARE),
            )
        )
        self._sender: Sender = self._new_sender()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._spool = (
            None if spool is None else Spool(spool, limit_s=self._limit_s, limit_bytes=spool_bytes)
        )
        # With a spool, calls are serialized, so that no event overtakes one that has to be spooled.
        # Each call keeps its own deadline. A call that gets the lock after its deadline writes to
        # the spool without another network operation.
        self._turn = asyncio.Lock()
        self._spooling = False

    async def publish(
        self,
        channel: str,
        data: object,
        *,
        uid: str | None = None,
        type: str | None = None,
        to: str | Iterable[str] | None = None,
        client: str | None = None,
        durability: str | None = None,
    ) -> EntryID | None:
        """Publish one event.

        Args:
            channel: Name of the channel.
            data: str and bytes are sent unchanged, other values as JSON.
            uid: ID chosen by the caller. An event with a known uid is not appended again; the call
                returns the ID of the first one.
            type: Type of the event.
            to: Recipients: `"anna, group:kitchen"`, or an iterable of names. Default: all.
            client: ID of the client that caused the event.
            durability: What must be true of the event before the call returns: `fast` (appended),
                `replicated:REPLICAS:MS` or `fsynced:REPLICAS:MS`, see docs/guarantees.md. Without
                MS, most of the time limit. Default: `fast`, or by HTTP the setting of the
                namespace.

        Returns:
            The entry's ID. None if the event was spooled, or if the HTTP API returned no ID.
            Centrifugo's own API returns none, and it ignores `type` and `to`.

        Raises:
            PublishFailed: The event was not accepted.
            InvalidEvent: Relay could not deliver such an event. A PublishFailed and a ValueError.
        """
        return await self.publish_event(
            outgoing_event(
                channel, data, uid=uid, type=type, to=to, client=client, durability=durability
            )
        )

    async def publish_event(self, event: OutgoingEvent) -> EntryID | None:
        """Publish an event that was checked already; see `publish()`."""
        deadline = self._running_loop().time() + self._limit_s
        if self._spool is None:
            try:
                return _id(await self._send(event, deadline))
            except DestinationUnavailable as exc:
                raise PublishFailed(str(exc), unknown=exc.sent) from exc
        if event.uid is None:
            event = replace(event, uid=uuid4().hex)
        async with self._turn:
            try:
                if self._spool.pending():
                    await self._deliver(self._spool, deadline)
                return _id(await self._send(event, deadline))
            except DestinationUnavailable as exc:
                await asyncio.to_thread(self.keep, event, str(exc))
                return None

    def keep(self, event: OutgoingEvent, reason: str) -> None:
        """Write an event that cannot be sent to the spool. Raise PublishFailed if there is none."""
        if self._spool is None:
            raise PublishFailed(reason)
        if not self._spooling:
            # Logged once per outage, because the cause may be permanent, such as a wrong password.
            _log.warning(
                "Could not publish an event (%s); writing events to the spool %s",
                reason,
                self._spool.path,
            )
            self._spooling = True
        self._spool.append(event if event.uid else replace(event, uid=uuid4().hex))

    async def flush(self, limit_ms: float = 10_000) -> None:
        """Deliver the spooled events. Raise PublishFailed if some are left after `limit_ms`."""
        if self._spool is None:
            return
        deadline = self._running_loop().time() + limit_ms / 1000
        async with self._turn:
            try:
                if self._spool.pending():
                    await self._deliver(self._spool, deadline)
            except DestinationUnavailable as exc:
                raise PublishFailed(f"not all spooled events were delivered: {exc}") from exc

    async def close(self) -> None:
        """Close connections. Spooled events stay in the file."""
        self._running_loop()
        await self._sender.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        loop = asyncio.get_running_loop()
        if self._loop not in (loop, None):
            # The program has ended its event loop, and the connections with it.
            self._sender, self._turn = self._new_sender(), asyncio.Lock()
        self._loop = loop
        return loop

    async def _send(self, event: OutgoingEvent, deadline: float) -> EntryID | RejectedEvent | None:
        (outcome,) = await send_until(deadline, self._sender, [event])
        if isinstance(outcome, PostponedEvent):
            raise DestinationUnavailable(outcome.reason, sent=outcome.sent)
        return outcome

    async def _deliver(self, spool: Spool, deadline: float) -> None:
        """Send all spooled events, oldest first.

        Raises:
            DestinationUnavailable: An event could not be sent. It and the following ones remain.
        """
        while await deliver(spool, self._sender, deadline):
            pass
        if self._spooling:
            _log.warning("Delivered all events from the spool %s", spool.path)
            self._spooling = False


def _id(outcome: EntryID | RejectedEvent | None) -> EntryID | None:
    if isinstance(outcome, RejectedEvent):
        raise PublishFailed(outcome.reason)
    return outcome


class Publisher:
    """Publisher for programs without asyncio. It is thread-safe and may be used after a fork.

    The arguments are those of `AsyncPublisher`. The first call starts a thread for the network.
    Without it, a slow DNS lookup could not be abandoned at the time limit.
    """

    def __init__(self, url: str = "redis://127.0.0.1:6379/0", **options: Any) -> None:
        self._url = url
        self._options = options
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._network: NetworkThread | None = None
        self._publisher = AsyncPublisher(url, **options)  # raises for invalid arguments

    def publish(
        self,
        channel: str,
        data: object,
        *,
        uid: str | None = None,
        type: str | None = None,
        to: str | Iterable[str] | None = None,
        client: str | None = None,
        durability: str | None = None,
    ) -> EntryID | None:
        """Publish one event; see `AsyncPublisher.publish()`."""
        event = outgoing_event(
            channel, data, uid=uid, type=type, to=to, client=client, durability=durability
        )
        try:
            result = self._begin(lambda publisher: publisher.publish_event(event))
        except (RuntimeError, OSError) as exc:
            # The process has no more threads or files, or the interpreter is about to exit.
            self._publisher.keep(event, f"the publisher's thread cannot be used: {exc}")
            return None
        return result()

    def flush(self, limit_ms: float = 10_000) -> None:
        """Deliver the spooled events; see `AsyncPublisher.flush()`."""
        try:
            result = self._begin(lambda publisher: publisher.flush(limit_ms))
        except (RuntimeError, OSError) as exc:
            raise PublishFailed(f"the publisher's thread cannot be used: {exc}") from exc
        result()

    def close(self) -> None:
        """Close connections and stop the thread. Spooled events stay; a later call starts again."""
        self._detect_fork()
        with self._lock:
            network, self._network = self._network, None
        if network is not None:
            network.close(self._publisher.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _begin(self, call: Callable[[AsyncPublisher], Coroutine[Any, Any, T]]) -> Callable[[], T]:
        self._detect_fork()
        with self._lock:
            if self._network is None:
                self._publisher = AsyncPublisher(self._url, **self._options)
                self._network = NetworkThread()
            # With the lock, so that the thread is not closed meanwhile.
            return self._network.begin(call(self._publisher))

    def _detect_fork(self) -> None:
        # A forked child does not have the thread and must not use the parent's connection. Another
        # thread of the parent may have held the lock.
        if self._pid != os.getpid():
            self._lock, self._abandoned = threading.Lock(), self._network
            self._network, self._pid = None, os.getpid()
