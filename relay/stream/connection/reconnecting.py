"""A connection beside reading and appending: what doors keep in Redis and tell other workers.

It is opened again whenever it is lost; what is sent meanwhile fails at once, and whoever sent it
decides. Commands of one loop turn leave in one write, as on every link.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

import hiredis

from relay.core.errors import RedisUnavailable, Unavailable
from relay.stream.connection.connect import CommandRefused, discover
from relay.stream.connection.pipeline_connection import PipelineConnection, unawaited
from relay.stream.connection.primary import Primary
from relay.stream.connection.task_groups import uncancel

if TYPE_CHECKING:
    from relay.config.settings import RedisSettings
    from relay.stream.connection.pipeline_connection import RedisCommand

_log = logging.getLogger(__name__)

_BACKOFF_S = (0.05, 2.0)


class ReconnectingConnection:
    """`run` must be running. `subscribe_to` and `patterns` are pub/sub channels whose messages go
    to `on_message` with the channel's name."""

    def __init__(
        self,
        redis: RedisSettings,
        *,
        subscribe_to: Sequence[bytes] = (),
        patterns: Sequence[bytes] = (),
        on_message: Callable[[bytes, bytes], None] | None = None,
    ) -> None:
        self._redis = redis
        self._names = subscribe_to
        self._patterns = patterns
        self._on_message = on_message
        self._link: PipelineConnection | None = None
        self.primary = Primary()
        self._open = asyncio.Event()
        # Called with each new connection, before anybody else can use it.
        self.on_open: list[Callable[[], None]] = []

    def execute(self, commands: Sequence[RedisCommand]) -> Awaitable[list[object]]:
        """The replies, error replies among them; RedisUnavailable where it is away."""
        if self._link is None:
            future: asyncio.Future[list[object]] = asyncio.get_running_loop().create_future()
            future.set_exception(RedisUnavailable("Redis is away"))
            return future
        return self._link.execute(commands)

    async def call(self, *command: bytes | str | int) -> object:
        """Send one command and return its reply. Unavailable where Redis is away or refuses it."""
        (reply,) = await self.call_all([command])
        return reply

    async def call_all(self, commands: Sequence[RedisCommand]) -> list[object]:
        """As `call`, for several in one pipeline; nothing is sent for none."""
        if not commands:
            return []
        try:
            replies = await self.execute(commands)
        except RedisUnavailable as exc:
            raise Unavailable(str(exc)) from exc
        for command, reply in zip(commands, replies, strict=True):
            if isinstance(reply, hiredis.ReplyError):
                raise Unavailable(f"Redis refuses {command[0]!s}: {reply}")
        return replies

    def post(self, *commands: RedisCommand) -> None:
        """Send what nobody waits for; while Redis is away it is lost."""
        unawaited(self.execute(commands))

    async def wait_open(self) -> None:
        """Until it is connected, and subscribed."""
        await self._open.wait()

    async def run(self) -> None:
        """Until cancelled; survives everything that Redis does."""
        backoff = _BACKOFF_S[0]
        while True:
            try:
                await self._connected()
                backoff = _BACKOFF_S[0]
            except (RedisUnavailable, CommandRefused) as exc:
                _log.debug("Redis: %s", exc)
            finally:
                self._link = None
                self._open.clear()
            uncancel()
            await asyncio.sleep(backoff * random.uniform(0.5, 1.0))  # noqa: S311  # no secret
            backoff = min(_BACKOFF_S[1], backoff * 2)

    async def _connected(self) -> None:
        lost = asyncio.Event()
        link = await PipelineConnection.open(
            await discover(self._redis),
            settings=self._redis,
            on_push=self._on_push,
            on_lost=lambda _: lost.set(),
        )
        try:
            names = [("SUBSCRIBE", name) for name in self._names]
            names += [("PSUBSCRIBE", pattern) for pattern in self._patterns]
            for reply in await link.execute(names):
                if isinstance(reply, hiredis.ReplyError):
                    raise CommandRefused("SUBSCRIBE", str(reply))
            self.primary.connected(link.run_id, link.replication)
            self._link = link
            for told in self.on_open:
                told()
            self._open.set()
            await lost.wait()
        finally:
            self.primary.disconnected()
            link.close()

    def _on_push(self, push: list[object]) -> None:
        if self._on_message is not None and push[0] in (b"message", b"pmessage"):
            name, payload = push[-2:]
            if isinstance(name, bytes) and isinstance(payload, bytes):
                self._on_message(name, payload)
