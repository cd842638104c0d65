"""Publishes events from Python, without ever holding up or breaking the program that does.

`AsyncPublisher` is for asyncio, `Publisher` for everything else. Both go straight to Redis or, with
`http=`, to the relay's HTTP API. All network waits of one call together end after a limit. What
could not be sent is an error, or, with `spool=PATH`, waits in a local file for the next call that
gets through, in order and once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Coroutine, Iterable
from dataclasses import replace
from types import TracebackType
from typing import Any, Self, TypeVar
from uuid import uuid4

from pydantic import SecretStr

from producers.direct import DirectSender
from producers.http import HttpSender
from producers.outgoing import (
    SPOOL_BYTES,
    WINDOW_S,
    DestinationUnavailable,
    OutgoingEvent,
    PostponedEvent,
    PublishFailed,
    RejectedEvent,
    Sender,
    outgoing,
    send_until,
)
from producers.spool import Spool
from producers.spool_delivery import deliver
from relay.config.settings import RedisSettings
from relay.core.model import EntryID

_log = logging.getLogger(__name__)
T = TypeVar("T")

LIMIT_MS = 200

__all__ = ["AsyncPublisher", "PublishFailed", "Publisher"]


class AsyncPublisher:
    """For one event loop; calls may overlap.

    `url` is as `[redis] url`. Where `http` is the relay's address, `secret` is that of its API, and
    Redis is not asked. `window_s` (how long a uid is remembered) and `maxlen` (to about how many
    entries the stream is trimmed, 0: not at all) are for Redis; by HTTP the relay's settings hold.
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
        self._limit_s = limit_ms / 1000
        self._sender: Sender = (
            HttpSender(http, secret=secret)
            if http
            else DirectSender(
                RedisSettings(url=url, prefix=prefix, password=SecretStr(password)),
                window_s=window_s,
                maxlen=maxlen,
            )
        )
        self._spool = (
            None if spool is None else Spool(spool, limit_s=self._limit_s, limit_bytes=spool_bytes)
        )
        # With a spool one call at a time, first come first served, so that no event overtakes one
        # that has to be spooled. Nobody's network time is prolonged: each has its own deadline,
        # and whoever comes to its turn after it goes to the disk at once.
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
    ) -> EntryID | None:
        """Deliver one event; its ID.

        `data`: str and bytes as they are, anything else as JSON. `uid`: the caller's name for
        this event; the same one again is not appended again, and gives the first one's ID. `to`:
        the only recipients, `"anna, group:kitchen"` or an iterable of names. `client`: who caused
        it.

        None where the event is in the spool, or where the HTTP API took it without telling an ID,
        as Centrifugo's own does; that skips `type` and `to`.
        PublishFailed where it was not taken; ValueError or TypeError for what no relay could
        deliver.
        """
        event = outgoing(channel, data, uid=uid, type=type, to=to, client=client)
        deadline = asyncio.get_running_loop().time() + self._limit_s
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
                if not self._spooling:
                    # Once an outage: also a wrong password ends here, and somebody must be told.
                    _log.warning("events go to the spool %s: %s", self._spool.path, exc)
                    self._spooling = True
                await asyncio.to_thread(self._spool.append, event)
                return None

    async def flush(self, limit_ms: float = 10_000) -> None:
        """Deliver what is spooled, within its own limit; PublishFailed where some of it remains."""
        if self._spool is None:
            return
        deadline = asyncio.get_running_loop().time() + limit_ms / 1000
        async with self._turn:
            try:
                if self._spool.pending():
                    await self._deliver(self._spool, deadline)
            except DestinationUnavailable as exc:
                raise PublishFailed(f"spooled events remain: {exc}") from exc

    async def close(self) -> None:
        """Give up connections. What is spooled stays."""
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

    async def _send(self, event: OutgoingEvent, deadline: float) -> EntryID | RejectedEvent | None:
        (outcome,) = await send_until(deadline, self._sender, [event])
        if isinstance(outcome, PostponedEvent):
            raise DestinationUnavailable(outcome.reason)
        return outcome

    async def _deliver(self, spool: Spool, deadline: float) -> None:
        """Send what waits, oldest first; Away as soon as one cannot be sent."""
        while await deliver(spool, self._sender, deadline):
            pass
        if self._spooling:
            _log.warning("the spool %s is delivered", spool.path)
            self._spooling = False


def _id(outcome: EntryID | RejectedEvent | None) -> EntryID | None:
    if isinstance(outcome, RejectedEvent):
        raise PublishFailed(outcome.reason)
    return outcome


class Publisher:
    """The same for programs without asyncio; any thread may call it, also after a fork.

    Takes what `AsyncPublisher` takes. The network is served by a thread of its own, begun with
    the first call: only so can a name look-up be left behind when the limit is reached.
    """

    def __init__(self, url: str = "redis://127.0.0.1:6379/0", **options: Any) -> None:
        self._url = url
        self._options = options
        self._lock = threading.Lock()
        self._pid = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._publisher = AsyncPublisher(url, **options)  # a wrong argument shows here

    def publish(
        self,
        channel: str,
        data: object,
        *,
        uid: str | None = None,
        type: str | None = None,
        to: str | Iterable[str] | None = None,
        client: str | None = None,
    ) -> EntryID | None:
        """Deliver one event; everything as `AsyncPublisher.publish` says."""
        publisher, loop = self._running()
        return _result(
            publisher.publish(channel, data, uid=uid, type=type, to=to, client=client), loop
        )

    def flush(self, limit_ms: float = 10_000) -> None:
        """Deliver what is spooled; everything as `AsyncPublisher.flush` says."""
        publisher, loop = self._running()
        _result(publisher.flush(limit_ms), loop)

    def close(self) -> None:
        """Give up connections and the thread. What is spooled stays; a later call begins anew."""
        with self._lock:
            loop, self._loop = self._loop, None
            if loop is not None and self._pid == os.getpid():
                _result(self._publisher.close(), loop)
                loop.call_soon_threadsafe(loop.stop)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _running(self) -> tuple[AsyncPublisher, asyncio.AbstractEventLoop]:
        with self._lock:
            if self._loop is None or self._pid != os.getpid():
                # A forked child has neither the thread nor a right to the parent's connection.
                self._pid = os.getpid()
                self._publisher = AsyncPublisher(self._url, **self._options)
                self._loop = asyncio.new_event_loop()
                threading.Thread(
                    target=_serve, args=(self._loop,), name="relay-publisher", daemon=True
                ).start()
            return self._publisher, self._loop


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()


def _result(call: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop) -> T:
    return asyncio.run_coroutine_threadsafe(call, loop).result()
