"""Wait until Redis has confirmed the durability of appended entries: WAIT and WAITAOF."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, cast

from relay.core.durability import FAST, Durability
from relay.core.errors import RedisUnavailable, RelayError, StartError
from relay.stream.connection import connect
from relay.stream.connection.pipeline_connection import ReplyError
from relay.stream.connection.refusals import without_arguments

if TYPE_CHECKING:
    from relay.config.settings import NamespaceSettings
    from relay.stream.connection.connect import RedisClient
    from relay.stream.connection.pipeline_connection import PipelineConnection, RedisCommand
    from relay.stream.shards.links import Connections

_log = logging.getLogger(__name__)

# The numbers of replicas and of milliseconds follow.
_COMMANDS: dict[str, tuple[str | int, ...]] = {"replicated": ("WAIT",), "fsynced": ("WAITAOF", 1)}


# The longest command if a connection waits for confirmations of both levels. They take turns.
_TURN_MS = 20

# By durability: what has not been confirmed, or an empty string.
Missing = Mapping[Durability, str]


class Confirming:
    """Waits until the last write of a connection has these durabilities, which all wait.

    All of it takes at most `most_ms`. Call `step` while there are any `left`.
    """

    def __init__(
        self, connection: PipelineConnection, wanted: Collection[Durability], most_ms: int
    ) -> None:
        self.left = set(wanted)
        self._connection = connection
        self._most_ms = most_ms
        self._loop = asyncio.get_running_loop()
        self._begun = self._loop.time()
        self._waited_ms = 0.0
        levels = {each.level for each in self.left}
        self._levels = deque(level for level in _COMMANDS if level in levels)

    async def step(self) -> list[tuple[Durability, str]]:
        """Send one command. Return the durabilities whose outcome is known now.

        The text says what has not been confirmed within its time, or is empty.

        Raises:
            RedisUnavailable: The connection was lost.
        """
        level = self._levels[0]
        same = [each for each in self.left if each.level == level]
        limit = min(each.wait_ms(self._most_ms) for each in same) - self._waited_ms
        limit_ms = max(1, math.ceil(limit))
        if len(self._levels) > 1:
            limit_ms = min(limit_ms, _TURN_MS)
        # The lowest number, so that the others need no other command if it is the present one.
        command = (*_COMMANDS[level], min(each.replicas for each in same), limit_ms)
        (reply,) = await self._connection.execute([command])
        texts = [(each, _missing(each, each.wait_ms(self._most_ms), reply)) for each in same]
        # The clock of the server may differ by a millisecond.
        over_ms = self._waited_ms + limit_ms if all(text for _, text in texts) else 0.0
        self._waited_ms = max(over_ms, (self._loop.time() - self._begun) * 1000)
        is_over = isinstance(reply, ReplyError)
        known = [
            (each, text)
            for each, text in texts
            if not text or is_over or each.wait_ms(self._most_ms) <= self._waited_ms
        ]
        self.left.difference_update(each for each, _ in known)
        if len(known) == len(same):
            self._levels.popleft()
        else:
            self._levels.rotate()
        return known


def _missing(wanted: Durability, limit_ms: int, reply: object) -> str:
    """Return what the reply to WAIT or WAITAOF does not confirm."""
    if isinstance(reply, ReplyError):
        return f"Redis did not confirm it: {_COMMANDS[wanted.level][0]}: {reply}"
    within = f"within {limit_ms} ms"
    if wanted.level == "replicated":
        replicas = cast("int", reply)
        if replicas < wanted.replicas:
            return f"{replicas} of {wanted.replicas} replicas have confirmed it {within}"
        return ""
    local, replicas = cast("list[int]", reply)
    if not local:
        return f"the primary has not written it to disk {within}"
    if replicas < wanted.replicas:
        return f"{replicas} of {wanted.replicas} replicas have written it to disk {within}"
    return ""


async def execute(
    connection: PipelineConnection,
    commands: Sequence[RedisCommand],
    wanted: Collection[Durability],
    most_ms: int,
) -> tuple[list[object], Missing]:
    """Execute a pipeline and wait for the confirmations. Return the replies and what is missing.

    Raises:
        RedisUnavailable: The connection was lost. Redis may have executed the commands.
    """
    executed = cast("asyncio.Future[list[object]]", connection.execute(commands))
    try:
        missing: dict[Durability, str] = {}
        confirming = Confirming(connection, wanted, most_ms)
        while confirming.left:
            missing.update(await confirming.step())
    except RedisUnavailable:
        await executed  # raises the error that came first
        raise
    except asyncio.CancelledError:
        executed.cancel()
        raise
    return await executed, missing


async def confirm(written: Connections, wanted: Collection[Durability], most_ms: int) -> Missing:
    """Wait until the last writes on these connections have these durabilities.

    `written`: of `ShardLinks.connections_of`. Return what is missing on the first server that has
    not confirmed all, or else on the last one.
    """
    missing: Missing = {}
    for connection in written.values():
        problem = "the connection was lost"
        if connection is not None:
            try:
                _, missing = await execute(connection, [], wanted, most_ms)
                if any(missing.values()):
                    break
                continue
            except RedisUnavailable as exc:
                problem = str(exc)
        return dict.fromkeys(wanted, f"Redis did not confirm it: {problem}")
    return missing


def probe(level: str) -> RedisCommand:
    """Return a command that Redis rejects if it cannot confirm this level, and answers at once."""
    return (*_COMMANDS[level], 0, 1)


async def unconfirmable(connection: PipelineConnection, level: str) -> str:
    """Return the reason why this server cannot confirm the durability level, or ''."""
    if level == FAST.level:
        return ""
    (reply,) = await connection.execute([probe(level)])
    if not isinstance(reply, ReplyError):
        return ""
    return durability_problem(level, str(reply), f"{connection.server} {connection.version}")


def durability_problem(level: str, reply: str, server: str) -> str:
    """Return the text for the error reply to the command that the level needs."""
    head = f"durability {level} is not available"
    reply = without_arguments(reply)
    if reply.startswith("ERR unknown command"):
        return f"{head}: {server} has no WAITAOF; it needs Redis 7.2 or newer, or Valkey"
    if "appendonly" in reply:
        return f"{head}: Redis writes no append-only file; set appendonly yes in its configuration"
    name = "wait" if level == "replicated" else "waitaof"
    return f"{head}: Redis refuses {name.upper()} ({reply}); see +{name} in docs/redis.md"


async def check_namespaces(
    client: RedisClient, namespaces: Mapping[str, NamespaceSettings]
) -> None:
    """Raise StartError if Redis cannot confirm a namespace's durability. Ignore other errors."""
    for name, rules in namespaces.items():
        wanted = Durability.parse(rules.durability)
        if not wanted.waits:
            continue
        try:
            await connect.command(client, *probe(wanted.level))
        except connect.CommandRefused as exc:
            section = f"[namespace:{name}]" if name else "[namespace]"
            problem = durability_problem(wanted.level, exc.reply, "this Redis")
            raise StartError(f"{section} durability = {rules.durability}: {problem}") from exc
        except RelayError:
            return


class UnconfirmedLog:
    """Logs the beginning and the end of missing confirmations, for appends without an answer."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._count = 0

    def report(self, confirmed: Missing) -> None:
        """Log the first of several batches that were appended but not confirmed."""
        missing = next(filter(None, confirmed.values()), "")
        if missing:
            self._count += 1
            if self._count == 1:
                _log.warning(
                    "%s: appended events are less durable than configured: %s. They are delivered,"
                    " but a failover may lose them",
                    self._source,
                    missing,
                )
        elif self._count:
            _log.warning(
                "%s: appended events are confirmed again, after %d batches that were not",
                self._source,
                self._count,
            )
            self._count = 0
