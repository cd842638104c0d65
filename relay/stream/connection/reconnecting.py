"""Reconnect to Redis: the retry loop of every connection, and a connection that uses it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from typing import TYPE_CHECKING, cast

from redis.backoff import EqualJitterBackoff

from relay.core.errors import RedisUnavailable, Unavailable
from relay.stream.connection.cancellation import cancellation_kept
from relay.stream.connection.connect import CommandRefused, discover
from relay.stream.connection.pipeline_connection import PipelineConnection, ReplyError, unawaited
from relay.stream.connection.primary import Continued, Primary
from relay.stream.connection.refusals import Effect, rule_of

if TYPE_CHECKING:
    from relay.config.settings import RedisSettings
    from relay.stream.connection.connect import RedisEndpoint
    from relay.stream.connection.pipeline_connection import RedisCommand

_log = logging.getLogger(__name__)

_SUBSCRIBE_AGAIN_S = 5.0
_MESSAGES = (b"message", b"pmessage", b"smessage")
# A lost connection is usually open again after a tenth of this time.
_REOPENED_S = 1.0
# After a connection that has lasted this long, the first pause is short again.
_STABLE_S = 1.0


class Backoff:
    """Random pauses between attempts. They double up to `cap_s` with each failure."""

    def __init__(self, base_s: float = 0.05, cap_s: float = 2.0) -> None:
        self._delays = EqualJitterBackoff(cap=cap_s, base=base_s)
        self._failures = 0

    def reset(self) -> None:
        """Begin with a short pause again."""
        self._failures = 0

    def next_s(self) -> float:
        """Return the length of the next pause."""
        # The limit keeps the power of two small. The cap is reached long before.
        self._failures = min(self._failures + 1, 30)
        return self._delays.compute(self._failures - 1)

    async def pause(self) -> None:
        """Wait for the next pause."""
        await asyncio.sleep(self.next_s())


async def keep_connected(
    serve: Callable[[Callable[[], None]], Coroutine[object, object, None]],
    on_error: Callable[[BaseException], None],
    backoff: Backoff | None = None,
) -> None:
    """Call `serve` again after a pause whenever it fails with an error of Redis.

    Ends when `serve` returns.

    Args:
        serve: Connects, works and fails when the connection is lost. It calls its argument when
            the connection is established.
        on_error: Called with the first error of each failure.
        backoff: The pauses between two calls.
    """
    loop = asyncio.get_running_loop()
    backoff = backoff or Backoff()
    established_at: float | None = None

    def established() -> None:
        nonlocal established_at
        established_at = loop.time()

    while True:
        established_at = None
        # In a task of its own: a TaskGroup of Python 3.11 that fails leaves its task cancelled
        # (asyncio/taskgroups.py of 3.11.2), which looks like a cancellation of this loop.
        serving = loop.create_task(serve(established), name="connection")
        try:
            with cancellation_kept():
                await serving
        except* (RedisUnavailable, CommandRefused) as group:
            on_error(_first_of(group))
        else:
            return
        if established_at is not None and loop.time() - established_at > _STABLE_S:
            backoff.reset()
        await backoff.pause()


def loss_of_connection() -> tuple[asyncio.Future[None], Callable[[Exception | None], None]]:
    """Return a future that fails when a connection is lost, and the `on_lost` that sets it."""
    lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def on_lost(exc: Exception | None) -> None:
        if not lost.done():
            lost.set_exception(exc or RedisUnavailable("the connection was closed"))
            # A task that ends before it awaits the future leaves the exception unretrieved.
            lost.exception()

    return lost, on_lost


async def wait_for(future: asyncio.Future[None]) -> None:
    """Await the future, as a task of a TaskGroup."""
    await future


class ReconnectingConnection:
    """A connection for everything except reading and appending. `run` must be running.

    While Redis is unreachable, commands fail at once. `subscribe_to` and `patterns` are pub/sub
    channels; their messages are passed to `on_message` with the name of the pub/sub channel.
    """

    def __init__(
        self,
        redis: RedisSettings,
        *,
        subscribe_to: Sequence[bytes] = (),
        patterns: Sequence[bytes] = (),
        on_message: Callable[[bytes, bytes], None] | None = None,
        is_checked: bool = False,
        continued: Continued = lambda _: (),
        locate: Callable[[], Awaitable[RedisEndpoint]] | None = None,
        is_sharded: bool = False,
        on_moved: Callable[[], None] = lambda: None,
        on_invalidated: Callable[[Sequence[bytes] | None], None] | None = None,
    ) -> None:
        """`is_checked`: the stream reader reports missing rights, see `Refusals.checked`.
        `continued`: see `Primary`. `locate` returns the server of the next connection; without it,
        the settings name the server. `is_sharded`: the pub/sub channels have slots.
        `on_invalidated` is called with keys that have changed after they were read, and with None
        for a new connection. `on_moved` is called if their slot was moved to another server."""
        self._on_moved = on_moved
        self._on_invalidated = on_invalidated
        self._is_checked = is_checked
        self._redis = redis
        self._locate = locate or partial(discover, redis)
        self._subscribe_command = "SSUBSCRIBE" if is_sharded else "SUBSCRIBE"
        self._names = subscribe_to
        self._patterns = patterns
        self._on_message = on_message
        self._connection: PipelineConnection | None = None
        self.primary = Primary(continued=continued)
        self._open = asyncio.Event()
        # Called for each new connection, before it is used for other commands.
        self.on_open: list[Callable[[], None]] = []

    def execute(self, commands: Sequence[RedisCommand]) -> Awaitable[list[object]]:
        """Send one pipeline. Await its replies, which include error replies.

        Raises:
            RedisUnavailable: Redis is unreachable, or the connection was lost.
        """
        if self._connection is None:
            future: asyncio.Future[list[object]] = asyncio.get_running_loop().create_future()
            future.set_exception(RedisUnavailable("Redis is unreachable"))
            return future
        return self._connection.execute(commands)

    @property
    def connection(self) -> PipelineConnection | None:
        """The present connection, or None while Redis is unreachable."""
        return self._connection

    async def call(self, *command: bytes | str | int) -> object:
        """Send one command and return its reply.

        Raises:
            Unavailable: Redis is unreachable or refused the command.
        """
        (reply,) = await self.call_all([command])
        return reply

    async def call_all(
        self, commands: Sequence[RedisCommand], *, may_repeat: bool = False
    ) -> list[object]:
        """Send commands in one pipeline and return their replies. Errors as of `call`.

        Args:
            commands: The commands.
            may_repeat: Send all of them again on the next connection if this one is lost. Redis may
                have carried them out before.
        """
        if not commands:
            return []
        try:
            replies = await self.execute(commands)
        except RedisUnavailable as exc:
            if may_repeat and await self.is_reopened():
                return await self.call_all(commands)
            raise Unavailable(str(exc)) from exc
        for command, reply in zip(commands, replies, strict=True):
            if isinstance(reply, ReplyError):
                raise Unavailable(f"Redis refused {command[0]!s}: {reply}")
        return replies

    async def is_reopened(self) -> bool:
        """Wait for the next connection. Return False if that takes too long."""
        try:
            async with asyncio.timeout(_REOPENED_S):
                await self._open.wait()
        except TimeoutError:
            return False
        return True

    def post(self, *commands: RedisCommand) -> None:
        """Send commands whose replies are not needed. They are lost while Redis is unreachable."""
        unawaited(self.execute(commands))

    async def wait_open(self) -> None:
        """Wait until the connection is established and subscribed."""
        await self._open.wait()

    async def run(self) -> None:
        """Keep the connection open until cancelled."""
        await keep_connected(self._serve, lambda exc: _log.debug("Redis: %s", exc))

    async def _serve(self, established: Callable[[], None]) -> None:
        lost, report_loss = loss_of_connection()

        def on_lost(exc: Exception | None) -> None:
            # At once, so that `wait_open` waits for the next connection.
            self._open.clear()
            report_loss(exc)

        connection = await PipelineConnection.open(
            await self._locate(),
            settings=self._redis,
            on_push=self._on_push,
            on_lost=on_lost,
        )
        try:
            missing = not await self._subscribe(connection)
            if self._on_invalidated is not None:
                # If the user may not use it, the owner reads the keys periodically.
                await connection.execute([("CLIENT", "TRACKING", "ON")])
                self._on_invalidated(None)
            self.primary.connected(connection.run_id, connection.replication)
            self._connection = connection
            established()
            for on_open in self.on_open:
                on_open()
            self._open.set()
            while missing:
                # Everything else works without the subscriptions.
                await asyncio.wait([lost], timeout=_SUBSCRIBE_AGAIN_S)
                if lost.done():
                    break
                missing = not await self._subscribe(connection)
            await lost
        finally:
            self._connection = None
            self._open.clear()
            self.primary.disconnected()
            connection.close()

    async def _subscribe(self, connection: PipelineConnection) -> bool:
        """Subscribe. Return False if the user lacks the right, and others report that."""
        names = [(self._subscribe_command, name) for name in self._names]
        names += [("PSUBSCRIBE", pattern) for pattern in self._patterns]
        for reply in await connection.execute(names):
            if isinstance(reply, ReplyError):
                refused = CommandRefused("SUBSCRIBE", str(reply))
                if rule_of(refused.reply).effect is Effect.MISPLACED:
                    self._on_moved()
                    raise RedisUnavailable(f"the pub/sub channel was moved: {reply}")
                rule = rule_of(refused.reply)
                if rule.effect is not Effect.NO_RIGHT:
                    raise refused
                if not self._is_checked:
                    _log.error("%s: its messages are not received. %s", refused, rule.remedy)
                    raise refused
                return False
        return True

    def _on_push(self, push: list[object]) -> None:
        if push[0] == b"sunsubscribe":
            self._on_moved()
        elif push[0] == b"invalidate" and self._on_invalidated is not None:
            self._on_invalidated(cast("list[bytes] | None", push[1]))
        elif self._on_message is not None and push[0] in _MESSAGES:
            name, payload = push[-2:]
            if isinstance(name, bytes) and isinstance(payload, bytes):
                self._on_message(name, payload)


def _first_of(group: BaseExceptionGroup[Exception]) -> BaseException:
    """Return the first error in the group that is not itself a group."""
    first: BaseException = group
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    return first
