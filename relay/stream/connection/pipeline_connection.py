"""One RESP3 connection to Redis that sends all commands of an event loop iteration in one write.

In a large pipeline redis-py takes 22 us of CPU per command, hiredis alone 2 us. The reader and the
appender therefore use this thin layer over hiredis. Replies are bytes. The connection does not
reconnect by itself; `relay.stream.connection.reconnecting` does.

The replies to a pipeline are one list in the order of its commands and may contain `ReplyError`.
Pushes (invalidations, pub/sub messages) are passed to `on_push` in the order in which Redis sent
them and the replies.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import cast

import hiredis
from typing_extensions import override

from relay.config.settings import RedisSettings
from relay.core.errors import RedisUnavailable
from relay.stream.connection import sentinel
from relay.stream.connection.addresses import try_addresses
from relay.stream.connection.connect import (
    UNAVAILABLE_CODES,
    CommandRefused,
    RedisEndpoint,
    discover,
    version_error,
)
from relay.stream.connection.primary import Replication
from relay.stream.connection.refusals import (
    Effect,
    leaves_transaction,
    rule_of,
    without_arguments,
)

RedisCommand = Sequence[bytes | str | int]
# An error reply in the list of replies to a pipeline.
ReplyError = hiredis.ReplyError

_log = logging.getLogger(__name__)

# Its stub allows for tuples of one element only.
_pack = cast(Callable[[tuple[bytes | str | int, ...]], bytes], hiredis.pack_command)
_MORE = object()
# A link that has been idle for this long is tested, because firewalls drop the packets of idle
# connections without notice. Keepalive of the kernel starts after two hours.
_IDLE_S = 5.0
_PING = (b"PING",)
# RESP3 answers these with a push instead of a reply. SUNSUBSCRIBE is not among them, because Redis
# also sends its push unasked when a slot moves to another server; see `end_sharded`.
_CONFIRMATIONS = frozenset(
    {b"subscribe", b"unsubscribe", b"psubscribe", b"punsubscribe", b"ssubscribe"}
)


class CannotServe(RedisUnavailable):
    """The connection was closed after a reply such as READONLY.

    Redis may have executed commands that were sent behind the rejected one.
    """


class _Pipeline:
    __slots__ = ("end", "future", "left", "replies", "sent_at")

    def __init__(self, future: asyncio.Future[list[object]], left: int, sent_at: float) -> None:
        self.future = future
        self.left = left
        self.sent_at = sent_at
        # If set, the number of replies is unknown, and this is the last one.
        self.end: bytes | None = None
        self.replies: list[object] = []


class PipelineConnection(asyncio.Protocol):
    """An authenticated connection. Use `open` to create one.

    `run_id` identifies the server process, `replication` its replication state at connect time.
    `server` and `version` are the server's own name and version.
    """

    def __init__(
        self,
        endpoint: RedisEndpoint,
        command_timeout_s: float,
        on_push: Callable[[list[object]], None] | None,
    ) -> None:
        self.endpoint = endpoint
        self.run_id = b""
        self.replication = Replication(b"", b"", b"")
        self.server = ""
        self.version = ""
        self._timeout_s = command_timeout_s
        self._on_push = on_push
        self._on_lost: Callable[[Exception | None], None] | None = None
        # Called instead of logging, if Redis rejects a command of `post` for a missing right.
        self.on_no_right: Callable[[str], None] | None = None
        # Called instead of logging, if the key of a command of `post` is on another server.
        self.on_misplaced: Callable[[], None] | None = None
        self._loop = asyncio.get_running_loop()
        self._reader = hiredis.Reader(notEnoughData=_MORE)
        self._transport: asyncio.Transport | None = None
        self._waiting: deque[_Pipeline] = deque()
        self._out: list[bytes] = []
        # The pipeline of this turn's `post` calls, and the error reply that it expects.
        self._posted: tuple[_Pipeline, str] | None = None
        self._answered_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._idle_timer: asyncio.TimerHandle | None = None
        self._closed = False

    @classmethod
    async def open(
        cls,
        endpoint: RedisEndpoint,
        *,
        settings: RedisSettings,
        on_push: Callable[[list[object]], None] | None = None,
        on_lost: Callable[[Exception | None], None] | None = None,
        name: str = "relay",
        check_primary: bool = True,
    ) -> PipelineConnection:
        """Connect and authenticate.

        Args:
            endpoint: The server.
            settings: Timeouts.
            on_push: Called with each push.
            on_lost: Called once when an open connection is lost, with None after `close`.
            name: The name in CLIENT LIST.
            check_primary: Reject replicas. This needs the right to use INFO. Without it
                `replication` stays empty, and a replica refuses the first write.

        Raises:
            RedisUnavailable: The connection failed. The text does not contain the password.
        """
        loop = asyncio.get_running_loop()
        connection = cls(endpoint, settings.command_timeout_s, on_push)

        async def connect(address: str) -> PipelineConnection:
            _, each = await loop.create_connection(
                lambda: cls(endpoint, settings.command_timeout_s, on_push),
                address,
                endpoint.port,
                ssl=endpoint.tls,
                server_hostname=endpoint.host if endpoint.tls else None,
            )
            return each

        try:
            async with asyncio.timeout(settings.connect_timeout_s):
                if endpoint.path:
                    await loop.create_unix_connection(lambda: connection, endpoint.path)
                else:
                    connection = await try_addresses(endpoint.host, endpoint.port, connect)
                await connection._greet(name, check_primary)
        except TimeoutError as exc:
            connection.close()
            raise RedisUnavailable(
                f"Redis at {endpoint} did not answer within {settings.connect_timeout_s:g} s"
            ) from exc
        except CommandRefused as exc:
            connection.close()
            remedy = rule_of(exc.reply).remedy
            raise RedisUnavailable(
                f"Redis at {endpoint} refused {exc.command}: {exc.reply}{remedy and f'. {remedy}'}"
            ) from exc
        except (OSError, UnicodeError) as exc:  # also ssl.SSLError and errors of name resolution
            connection.close()
            raise RedisUnavailable(f"Redis at {endpoint} cannot be reached: {exc}") from exc
        except BaseException:
            connection.close()
            raise
        if connection._closed:  # lost before this task continued after the handshake
            raise RedisUnavailable(f"Redis at {endpoint} closed the connection")
        connection._on_lost = on_lost
        connection._check_idle()
        if endpoint.site:
            sentinel.follow(endpoint.site, connection)
        return connection

    async def _greet(self, name: str, check_primary: bool) -> None:
        hello: list[bytes | str | int] = ["HELLO", 3]
        if self.endpoint.username or self.endpoint.password:
            hello += "AUTH", self.endpoint.username or "default", self.endpoint.password
        hello += "SETNAME", name
        greeting = await self.call(*hello)
        if isinstance(greeting, dict):
            self.server = str(greeting.get(b"server", b""), "ascii", "replace")
            self.version = str(greeting.get(b"version", b""), "ascii", "replace")
        if problem := version_error(self.server, self.version):
            raise RedisUnavailable(f"Redis at {self.endpoint} is {problem}")
        if self.endpoint.db:
            await self.call("SELECT", self.endpoint.db)
        if not check_primary:
            return
        for reply in (replies := await self.execute([("INFO", "server"), ("INFO", "replication")])):
            if isinstance(reply, ReplyError):
                raise CommandRefused("INFO", str(reply))
        server, replication = cast("list[bytes]", replies)
        self.replication = Replication.parse(replication)
        if self.replication.role != b"master":
            # Right after a failover Sentinel may still name the old primary (its clients
            # documentation asks for this check).
            raise RedisUnavailable(f"Redis at {self.endpoint} is a replica")
        self.run_id = server.partition(b"\nrun_id:")[2].partition(b"\r")[0]

    def execute(self, commands: Sequence[RedisCommand]) -> Awaitable[list[object]]:
        """Send `commands` as one pipeline. Await the result to get the list of their replies.

        A SUBSCRIBE or UNSUBSCRIBE must name one channel only, so that it has one reply whether
        Redis accepts it or not. The wait may be cancelled; the replies are then discarded.

        Raises:
            RedisUnavailable: The connection was lost before the last reply. It is unknown which of
                the commands Redis has executed.
        """
        future: asyncio.Future[list[object]] = self._loop.create_future()
        if self._closed or self._transport is None:
            future.set_exception(
                RedisUnavailable(f"the connection to Redis at {self.endpoint} is closed")
            )
            return future
        if not commands:
            future.set_result([])
            return future
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out += [*map(_pack, map(tuple, commands))]
        now = self._loop.time()
        self._waiting.append(_Pipeline(future, len(commands), now))
        if self._timer is None:
            self._timer = self._loop.call_at(now + self._timeout_s, self._on_timer)
        return future

    def post(self, command: RedisCommand, *, expected: str = "") -> None:
        """Send a command whose reply is not needed, in order with those of `execute`.

        Error replies are logged, except those that contain the text `expected`. Consecutive calls
        in one event loop iteration share one pipeline. If the connection is lost, so are they.
        """
        if self._posted is not None and self._waiting and not self._closed:
            pipeline, same = self._posted
            if same == expected and self._waiting[-1] is pipeline:
                self._out.append(_pack(tuple(command)))
                pipeline.left += 1
                return
        unawaited(
            self.execute([command]),
            expected=expected,
            on_no_right=self.on_no_right,
            on_misplaced=self.on_misplaced,
        )
        if not self._closed and self._waiting:
            self._posted = self._waiting[-1], expected

    def end_sharded(self, name: bytes) -> None:
        """Unsubscribe from a sharded pub/sub channel, without a reply.

        Redis confirms with a push. If the channel's slot has moved, it has ended the subscription
        itself, and may reply with an error. A PING shows where the replies end.
        """
        unawaited(self.execute([("SUNSUBSCRIBE", name), ("PING", name)]), expected="MOVED")
        if not self._closed and self._waiting:
            last = self._waiting[-1]
            last.left, last.end = 1, name

    async def call(self, *command: bytes | str | int) -> object:
        """Send one command and await its reply. An error reply raises CommandRefused."""
        (reply,) = await self.execute([command])
        if isinstance(reply, ReplyError):
            word = command[0]
            text = word.decode() if isinstance(word, bytes) else str(word)
            raise CommandRefused(text, str(reply))
        return reply

    def primary_is(self, host: str, port: int) -> None:
        """Close the connection if Sentinel has named another primary than its server."""
        if (self.endpoint.host, self.endpoint.port) != (host, port):
            reason = f"Redis at {self.endpoint} is no longer the primary: Sentinel has named"
            self._lose(RedisUnavailable(f"{reason} {host}:{port}"))

    def close(self) -> None:
        """Close the connection at once. Waiting calls raise RedisUnavailable."""
        self._lose(None)

    # asyncio.Protocol

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if self._closed:  # closed while connecting
            self._transport.abort()

    @override
    def data_received(self, data: bytes) -> None:
        if self._closed:
            return
        reader = self._reader
        waiting = self._waiting
        is_partial = True
        try:
            reader.feed(data)
            while (reply := reader.gets()) is not _MORE:
                is_partial = False
                if isinstance(reply, hiredis.PushNotification) and not (
                    reply and reply[0] in _CONFIRMATIONS and waiting
                ):
                    if self._on_push is not None:
                        self._on_push(reply)
                        if self._closed:
                            return
                    continue
                if type(reply) is ReplyError and self._ends_connection(reply):
                    return
                if not waiting:
                    self._on_invalid_reply("a reply without a command")
                    return
                pipeline = waiting[0]
                pipeline.replies.append(reply)
                if pipeline.end is not None and reply != pipeline.end:
                    continue
                pipeline.left -= 1
                if not pipeline.left:
                    waiting.popleft()
                    self._answered_at = self._loop.time()
                    if not pipeline.future.done():
                        pipeline.future.set_result(pipeline.replies)
        except hiredis.ProtocolError as exc:
            self._on_invalid_reply(exc)
        if is_partial:
            # A part of a large reply.
            self._answered_at = self._loop.time()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        reason = f": {exc}" if exc is not None else ""
        self._lose(RedisUnavailable(f"Redis at {self.endpoint} closed the connection{reason}"))

    def _ends_connection(self, error: ReplyError) -> bool:
        text = str(error)
        waiting = self._waiting
        if leaves_transaction(text) and waiting and b"QUEUED" in waiting[0].replies:
            self._lose(CannotServe(f"Redis at {self.endpoint} has no command EXEC"))
            return True
        if text.partition(" ")[0] not in UNAVAILABLE_CODES:
            return False
        self._lose(CannotServe(f"Redis at {self.endpoint} cannot serve now: {text}"))
        return True

    def _on_invalid_reply(self, problem: object) -> None:
        self._lose(
            RedisUnavailable(f"{self.endpoint} does not speak the Redis protocol: {problem}")
        )

    def _flush(self) -> None:
        self._posted = None
        if self._out and self._transport is not None and not self._closed:
            data = b"".join(self._out)
            self._out.clear()
            self._transport.write(data)

    def _on_timer(self) -> None:
        # One timer for the whole connection costs nothing per command. It may fire late by up to
        # one timeout if there are always waiting commands.
        self._timer = None
        if not self._waiting:
            return
        # A pipeline is not late while replies to it or to earlier ones are still arriving.
        due = max(self._waiting[0].sent_at, self._answered_at) + self._timeout_s
        if due <= self._loop.time():
            text = f"Redis at {self.endpoint} did not answer within {self._timeout_s:g} s"
            self._lose(RedisUnavailable(text))
        else:
            self._timer = self._loop.call_at(due, self._on_timer)

    def _check_idle(self) -> None:
        """Test the connection if Redis has not answered anything for some time.

        Pushes do not count: a subscriber would not notice a link whose other direction is dead.
        """
        now = self._loop.time()
        due = self._answered_at + _IDLE_S
        if due <= now:
            if not self._waiting:
                # Any reply will do, even that the user has no right to this command. `_on_timer`
                # closes the connection if there is none.
                pinged = cast("asyncio.Future[list[object]]", self.execute([_PING]))
                pinged.add_done_callback(lambda done: done.cancelled() or done.exception())
            due = now + _IDLE_S
        self._idle_timer = self._loop.call_at(due, self._check_idle)

    def _lose(self, reason: RedisUnavailable | None) -> None:
        if self._closed:
            return
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None
        if self._transport is not None:
            # close() would wait for a server that no longer reads.
            self._transport.abort()
        self._out.clear()
        waiting, self._waiting = self._waiting, deque()
        for pipeline in waiting:
            if not pipeline.future.done():
                lost = RedisUnavailable(f"the connection to Redis at {self.endpoint} is closed")
                if reason is not None:
                    lost = type(reason)(str(reason))
                pipeline.future.set_exception(lost)
        if self._on_lost is not None:
            on_lost, self._on_lost = self._on_lost, None
            on_lost(reason)


@asynccontextmanager
async def connected(
    settings: RedisSettings, *, name: str = "relay"
) -> AsyncIterator[PipelineConnection]:
    """Open a connection for one task, and close it at the end."""
    connection = await PipelineConnection.open(
        await discover(settings), settings=settings, name=name
    )
    try:
        yield connection
    finally:
        connection.close()


def unawaited(
    answer: Awaitable[list[object]],
    *,
    expected: str = "",
    on_no_right: Callable[[str], None] | None = None,
    on_misplaced: Callable[[], None] | None = None,
) -> None:
    """Log error replies to commands whose reply is not needed.

    Replies that contain the text `expected` are not logged. Replies about missing rights are passed
    to `on_no_right`, if there is one, and `on_misplaced` is called for keys of other servers. The
    owner logs a lost connection.
    """
    future = cast("asyncio.Future[list[object]]", answer)

    def done(finished: asyncio.Future[list[object]]) -> None:
        if finished.cancelled() or finished.exception() is not None:
            return
        for reply in finished.result():
            if not isinstance(reply, ReplyError) or (expected and expected in str(reply)):
                continue
            effect = rule_of(str(reply)).effect
            if on_no_right is not None and effect is Effect.NO_RIGHT:
                on_no_right(str(reply))
            elif on_misplaced is not None and effect is Effect.MISPLACED:
                on_misplaced()
            else:
                _log.error("Redis refused: %s", without_arguments(str(reply)))

    future.add_done_callback(done)
