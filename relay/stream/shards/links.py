"""Connections to all shards for everything except reading streams and appending to them.

A command is sent to the shard of its key. If the key was moved, the command is sent again to the
server that has it now.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import TYPE_CHECKING, cast

from relay.core.errors import RedisUnavailable, RelayError, Unavailable
from relay.stream.connection.connect import CommandRefused
from relay.stream.connection.pipeline_connection import PipelineConnection, ReplyError, unawaited
from relay.stream.connection.reconnecting import ReconnectingConnection
from relay.stream.connection.scripts import is_missing
from relay.stream.shards.shard import SITE_TAG, is_misplaced

if TYPE_CHECKING:
    from relay.config.settings import RedisSettings
    from relay.stream.connection.connect import RedisEndpoint
    from relay.stream.connection.pipeline_connection import RedisCommand
    from relay.stream.connection.primary import Continued, Primary
    from relay.stream.connection.scripts import Script
    from relay.stream.shards.shard import Shard, ShardMap

_log = logging.getLogger(__name__)

# The connection of each link at a moment, or None if there was none.
Connections = dict[ReconnectingConnection, PipelineConnection | None]

# Limits of the pauses before a command is sent again whose key is being moved.
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.01, 0.2
# Interval between checks for new shards, in case no reply reports the change.
_CHECK_S = 1.0
# Commands wait this long for the first connection to a shard that was found while running, such as
# a primary that was promoted just now.
_FOUND_S = 3.0
_SECOND_WORD = frozenset({"XINFO", "XGROUP", "PUBSUB"})
_SCRIPTS = frozenset({"EVAL", "EVALSHA"})


def key_of(command: RedisCommand) -> bytes:
    """Return the key that decides which shard gets the command."""
    name = command[0]
    index = 2 if name in _SECOND_WORD else 3 if name in _SCRIPTS else 1
    key = command[index]
    return key if isinstance(key, bytes) else str(key).encode()


class ShardLinks:
    """One connection to each shard. `run` must be running.

    Commands fail at once while their shard is unreachable, except for a moment after a promotion.
    Commands of one call that are sent to the same shard are executed in order.
    """

    def __init__(
        self,
        shards: ShardMap,
        redis: RedisSettings,
        *,
        subscribe_to: bytes = b"",
        on_message: Callable[[bytes, bytes], None] | None = None,
        is_checked: bool = False,
        continued: Continued = lambda _: (),
        on_invalidated: Callable[[Sequence[bytes] | None], None] | None = None,
    ) -> None:
        """`subscribe_to` is a pub/sub channel with the tag of the site; its messages are passed to
        `on_message`. For the other arguments see `ReconnectingConnection`."""
        self.shards = shards
        self._redis = redis
        self._subscribe_to = subscribe_to
        self._on_message = on_message
        self._is_checked = is_checked
        self._continued = continued
        self._on_invalidated = on_invalidated
        self._links: dict[Shard, ReconnectingConnection] = {}
        self._tasks: dict[Shard, asyncio.Task[None]] = {}
        # Until when commands wait for the first connection to a shard.
        self._found_until: dict[Shard, float] = {}
        self._group: asyncio.TaskGroup | None = None
        self._subscribed: Shard | None = None
        self._opened = asyncio.Event()
        # The slot of the pub/sub channel was moved.
        self._moved = asyncio.Event()
        # Called for each new connection, before it is used for other commands.
        self.on_open: list[Callable[[], None]] = []
        self._only: ReconnectingConnection | None = None

    # ---- connections ------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep the connections open until cancelled."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            try:
                while True:
                    await self._match()
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(_CHECK_S):
                            await self._moved.wait()
                            await asyncio.sleep(_FIRST_PAUSE_S)
                            self._moved.clear()
                            await self._refresh()
            finally:
                self._group = None

    async def _match(self) -> None:
        """Open connections to new shards, and close those to shards that are gone."""
        group = self._group
        if group is None:
            return
        try:
            if not self.shards.shards:
                await self.shards.refresh()
            home = self.shards.home
        except RedisUnavailable as exc:
            _log.debug("Redis: %s", exc)
            return
        present = list(self.shards.shards)
        for shard in [*self._tasks]:
            moved = self._subscribe_to and (shard is self._subscribed) != (shard is home)
            if shard not in present or moved:
                self._tasks.pop(shard).cancel()
                del self._links[shard]
                self._found_until.pop(shard, None)
        self._subscribed = home
        for shard in present:
            if shard not in self._links:
                link = self._links[shard] = self._new_link(shard, is_home=shard is home)
                self._tasks[shard] = group.create_task(link.run(), name=f"link {shard.name}")
                if self._opened.is_set():
                    now = asyncio.get_running_loop().time()
                    self._found_until[shard] = now + _FOUND_S
        if present:
            self._opened.set()
        self._only = next(iter(self._links.values())) if len(present) == 1 else None

    async def _refresh(self) -> None:
        try:
            await self.shards.refresh()
        except RedisUnavailable as exc:
            _log.debug("Redis: %s", exc)

    def _new_link(self, shard: Shard, *, is_home: bool) -> ReconnectingConnection:
        async def locate() -> RedisEndpoint:
            return await shard.locate()

        link = ReconnectingConnection(
            shard.settings,
            subscribe_to=[self._subscribe_to] if is_home and self._subscribe_to else [],
            on_message=self._on_message,
            is_checked=self._is_checked,
            continued=self._continued,
            locate=locate,
            is_sharded=shard.uses_sharded_pubsub,
            on_moved=self._moved.set,
            on_invalidated=self._on_invalidated,
        )
        link.on_open += self.on_open
        return link

    async def wait_open(self) -> None:
        """Wait until the connections to all shards are established."""
        await self._opened.wait()
        for link in list(self._links.values()):
            await link.wait_open()

    async def wait_home_open(self) -> None:
        """Wait until the connection to the shard of keys that belong to no channel is established.

        It has the bus and the journals. Other servers may be away.
        """
        await self._opened.wait()
        while True:
            with contextlib.suppress(RedisUnavailable):
                await self.link_of(SITE_TAG).wait_open()
                return
            await asyncio.sleep(_LAST_PAUSE_S)

    def link_of(self, key: bytes) -> ReconnectingConnection:
        """Return the connection to the shard of a key.

        Raises:
            RedisUnavailable: No server has the key now.
        """
        if self._only is not None:
            return self._only
        return self._link_to(self.shards.shard_of(key))

    def _link_to(self, shard: Shard) -> ReconnectingConnection:
        link = self._links.get(shard)
        if link is None:
            raise RedisUnavailable(f"there is no connection to {shard.name} yet")
        return link

    def connections_of(self, keys: Iterable[bytes]) -> Connections:
        """Return the present connections to the shards of these keys, for `confirm`.

        Call it directly after the replies to writes: WAIT confirms the writes of its own connection
        only, which may be replaced later.

        Raises:
            RedisUnavailable: No server has one of the keys now.
        """
        return {link: link.connection for link in {self.link_of(key) for key in keys}}

    def each(self) -> list[ReconnectingConnection]:
        """Return the connections to all shards."""
        return list(self._links.values())

    # ---- commands ---------------------------------------------------------------------------

    def execute(self, commands: Sequence[RedisCommand]) -> Awaitable[list[object]]:
        """Send commands, and await the replies in their order, which include error replies.

        Raises:
            RedisUnavailable: A shard is unreachable, or its connection was lost.
        """
        if self._only is not None and not self.is_sharded:
            return self._only.execute(commands)
        return self._in_background(self._execute(commands, may_repeat=False))

    def _in_background(
        self, work: Coroutine[object, object, list[object]]
    ) -> asyncio.Future[list[object]]:
        future: asyncio.Future[list[object]] = asyncio.get_running_loop().create_future()

        async def run() -> None:
            try:
                replies = await work
            except RelayError as exc:
                if not future.done():
                    future.set_exception(exc)
            else:
                if not future.done():
                    future.set_result(replies)

        def ended(_: object = None) -> None:
            # A task that was cancelled before its first step has not begun the work.
            work.close()
            if not future.done():
                # The connections are closed, but the caller may be waiting.
                future.set_exception(RedisUnavailable("Redis is unreachable"))

        if self._group is None:
            ended()
        else:
            self._group.create_task(run(), name="commands").add_done_callback(ended)
        return future

    @property
    def is_sharded(self) -> bool:
        """True in a Redis Cluster, where keys may be moved and pub/sub channels have slots."""
        return any(shard.uses_sharded_pubsub for shard in self.shards.shards[:1])

    async def evaluate(
        self,
        calls: Sequence[tuple[Script, Sequence[bytes], Sequence[bytes | str | int]]],
        shard: Shard | None = None,
    ) -> list[object]:
        """Run scripts with their keys and arguments, and load them where they are missing.

        A script that is missing is run after the others: calls for one key may change their order.

        `shard`: see `execute_at`. Replies as of `execute`.

        Raises:
            RedisUnavailable: As of `execute`, or the scripts are removed again and again.
        """
        commands: list[RedisCommand] = [
            ("EVALSHA", script.sha, len(keys), *keys, *words) for script, keys, words in calls
        ]
        loop = asyncio.get_running_loop()
        until = loop.time() + self._redis.command_timeout_s
        replies = await self.execute_at(commands, shard)
        while missing := [index for index, reply in enumerate(replies) if is_missing(reply)]:
            refused = await self._load([calls[index][:2] for index in missing], shard)
            again = await self.execute_at([commands[index] for index in missing], shard)
            for index, reply in zip(missing, again, strict=True):
                # Without the right to load scripts, Redis still replies NOSCRIPT.
                replies[index] = refused if refused and is_missing(reply) else reply
            if loop.time() >= until and any(map(is_missing, replies)):
                raise RedisUnavailable("the scripts were removed from Redis again and again")
        return replies

    async def _load(
        self, calls: Sequence[tuple[Script, Sequence[bytes]]], shard: Shard | None
    ) -> ReplyError | None:
        """Load each script once on each server that needs it. Return the error of one, if any."""
        wanted = {
            (self.link_of(keys[0]) if shard is None else self._link_to(shard), script)
            for script, keys in calls
        }
        loading = [
            (link, part, link.execute(part))
            for link, script in wanted
            for part in [[("SCRIPT", "LOAD", script.text)]]
        ]
        replies = await _replies(loading, may_repeat=False)
        return next((each for (each,) in replies if isinstance(each, ReplyError)), None)

    async def execute_at(
        self, commands: Sequence[RedisCommand], shard: Shard | None
    ) -> list[object]:
        """Call `execute`. If `shard` is given, send the commands there, whatever their keys are."""
        if shard is None:
            return await self.execute(commands)
        return await self._link_to(shard).execute(commands)

    async def call(self, *command: bytes | str | int) -> object:
        """Send one command and return its reply. Errors as of `call_all`."""
        (reply,) = await self.call_all([command])
        return reply

    async def call_all(
        self, commands: Sequence[RedisCommand], *, may_repeat: bool = False
    ) -> list[object]:
        """Send commands and return their replies.

        `may_repeat`: see `ReconnectingConnection.call_all`.

        Raises:
            Unavailable: A shard is unreachable or refused a command.
        """
        if not commands:
            return []
        try:
            replies = await self._execute(commands, may_repeat=may_repeat)
        except RedisUnavailable as exc:
            raise Unavailable(str(exc)) from exc
        for command, reply in zip(commands, replies, strict=True):
            if isinstance(reply, ReplyError):
                raise Unavailable(f"Redis refused {command[0]!s}: {reply}")
        return replies

    def execute_in_turn(self, *steps: Sequence[RedisCommand]) -> asyncio.Future[list[object]]:
        """Call `execute` for each step after the replies to the step before."""
        if self._only is not None:
            together = [command for step in steps for command in step]
            return cast("asyncio.Future[list[object]]", self.execute(together))
        return self._in_background(self._execute_in_turn(steps))

    async def _execute_in_turn(self, steps: Sequence[Sequence[RedisCommand]]) -> list[object]:
        return [reply for step in steps for reply in await self.execute(step)]

    def publish(self, name: bytes, payload: bytes) -> None:
        """Publish a pub/sub message. It is lost if the shard of `name` is unreachable."""
        command = "SPUBLISH" if self.is_sharded else "PUBLISH"
        self.post((command, name, payload))

    def post(self, *commands: RedisCommand) -> None:
        """Send commands whose replies are not needed. They are lost while Redis is unreachable."""
        if self._only is not None and not self.is_sharded:
            self._only.post(*commands)
            return
        unawaited(self.execute(commands))

    async def transaction(
        self,
        key: bytes,
        commands: Callable[[Primary], Sequence[RedisCommand]],
        before: Sequence[RedisCommand] = (),
    ) -> tuple[list[object], list[object], Primary]:
        """Execute commands for keys with the tag of `key` in one transaction.

        `before` is sent in the same pipeline. Return its replies, those of the transaction, and
        the state of the server that has executed it.

        Raises:
            RedisUnavailable: The shard is unreachable, or the transaction was discarded.
            CommandRefused: Redis refused the transaction.
        """
        until = asyncio.get_running_loop().time() + self._redis.command_timeout_s
        while True:
            await self._wait_found([key], until)
            link = self.link_of(key)
            words = commands(link.primary)
            replies = await link.execute([*before, ("MULTI",), *words, ("EXEC",)])
            done = replies[-1]
            if done is None:
                raise RedisUnavailable("Redis discarded the transaction")
            if isinstance(done, list):
                return replies[: len(before)], done, link.primary
            # EXECABORT does not give the reason. The reply to the rejected command does.
            errors = [each for each in replies if isinstance(each, ReplyError)]
            is_moving = any(is_misplaced(str(each)) for each in errors)
            if not is_moving or not await self._may_repeat(until):
                raise CommandRefused("EXEC", str(errors[0]))

    async def _execute(self, commands: Sequence[RedisCommand], *, may_repeat: bool) -> list[object]:
        replies: list[object] = [None] * len(commands)
        left = list(range(len(commands)))
        until = asyncio.get_running_loop().time() + self._redis.command_timeout_s
        while True:
            await self._wait_found([key_of(commands[index]) for index in left], until)
            by_link: dict[ReconnectingConnection, list[int]] = {}
            for index in left:
                by_link.setdefault(self.link_of(key_of(commands[index])), []).append(index)
            sent = [
                (link, part, link.execute(part))
                for link, own in by_link.items()
                for part in [[commands[index] for index in own]]
            ]
            found = await _replies(sent, may_repeat)
            left = []
            for own, theirs in zip(by_link.values(), found, strict=True):
                for index, reply in zip(own, theirs, strict=True):
                    replies[index] = reply
                    if isinstance(reply, ReplyError) and is_misplaced(str(reply)):
                        left.append(index)
            if not left or not await self._may_repeat(until):
                return replies
            left.sort()

    async def _wait_found(self, keys: Iterable[bytes], until: float) -> None:
        """Wait for the first connections to those shards of these keys that were found just now."""
        if any(shard not in self._links for shard in self.shards.shards):
            await self._match()
        if not self._found_until:
            return
        loop = asyncio.get_running_loop()
        for shard in {self.shards.shard_of(key) for key in keys}:
            link, found_until = self._links.get(shard), self._found_until.get(shard)
            if link is None or found_until is None:
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(min(until, found_until)):
                    await link.wait_open()
                    self._found_until.pop(shard, None)
            if loop.time() >= found_until:
                self._found_until.pop(shard, None)

    async def _may_repeat(self, until: float) -> bool:
        """Pause, and find the present servers of keys that are being moved. False after `until`."""
        left_s = until - asyncio.get_running_loop().time()
        if left_s <= 0:
            return False
        # As long as all attempts have taken together.
        pause_s = self._redis.command_timeout_s - left_s
        await asyncio.sleep(min(max(pause_s, _FIRST_PAUSE_S), _LAST_PAUSE_S))
        await self.shards.refresh()
        await self._match()
        return True


async def _replies(
    sent: Sequence[tuple[ReconnectingConnection, Sequence[RedisCommand], Awaitable[list[object]]]],
    may_repeat: bool,
) -> list[list[object]]:
    """Await all replies, then raise the first error."""
    found: list[list[object]] = []
    error: RedisUnavailable | None = None
    for link, commands, replies in sent:
        try:
            try:
                found.append(await replies)
            except RedisUnavailable:
                if not (may_repeat and await link.is_reopened()):
                    raise
                found.append(await link.execute(commands))
        except RedisUnavailable as exc:
            error = error or exc
    if error is not None:
        raise error
    return found
