"""Wait until Redis has confirmed the durability of appended entries: WAIT and WAITAOF."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

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


class Confirmations(NamedTuple):
    """What Redis has confirmed about the appends of one pipeline.

    `replicas` have received them. `fsynced` are the numbers of primaries (0 or 1) and of replicas
    that have written them to disk. `wait_ms` is the time that Redis was given. `problem` is an
    error reply.
    """

    replicas: int = 0
    fsynced: tuple[int, int] = (0, 0)
    wait_ms: int = 0
    problem: str = ""

    def missing(self, wanted: Durability) -> str:
        """Return what has not been confirmed, or an empty string."""
        within = f"within {wanted.wait_ms(self.wait_ms)} ms"
        if self.problem and wanted.waits:
            return f"Redis did not confirm it: {self.problem}"
        if wanted.level == "replicated" and self.replicas < wanted.replicas:
            return f"{self.replicas} of {wanted.replicas} replicas have confirmed it {within}"
        if wanted.level == "fsynced":
            local, others = self.fsynced
            if not local:
                return f"the primary has not written it to disk {within}"
            if others < wanted.replicas:
                return f"{others} of {wanted.replicas} replicas have written it to disk {within}"
        return ""


def confirming(wanted: Collection[Durability], most_ms: int) -> list[RedisCommand]:
    """Return the commands that wait for the strictest of these durabilities.

    They confirm the last write of their connection. Each wait takes at most `most_ms`.
    """
    commands: list[RedisCommand] = []
    for level, words in _COMMANDS.items():
        same = [each for each in wanted if each.level == level]
        if same:
            limit = max(each.wait_ms(most_ms) for each in same)
            commands.append((*words, max(each.replicas for each in same), limit))
    return commands


def parse_confirmations(
    commands: Sequence[RedisCommand],
    replies: Sequence[object],
    most_ms: int,
) -> Confirmations:
    """Return what the replies to the commands of `confirming` say. `most_ms`: the longest wait."""
    found = Confirmations(wait_ms=most_ms)
    for command, reply in zip(commands, replies, strict=True):
        if isinstance(reply, ReplyError):
            found = found._replace(problem=f"{command[0]!s}: {reply}")
        elif command[0] == "WAIT" and isinstance(reply, int):
            found = found._replace(replicas=reply)
        elif command[0] == "WAITAOF" and isinstance(reply, list):
            found = found._replace(fsynced=(reply[0], reply[1]))
    return found


async def confirm(
    written: Connections, wanted: Collection[Durability], most_ms: int
) -> Confirmations:
    """Wait until the last writes on these connections have these durabilities.

    `written`: of `ShardLinks.connections_of`. Return what the first server has confirmed that has
    not confirmed all, or else the last one.
    """
    waits = confirming(wanted, most_ms)
    found = Confirmations(wait_ms=most_ms)
    for connection in written.values():
        if connection is None:
            found = found._replace(problem="the connection was lost")
            break
        try:
            found = parse_confirmations(waits, await connection.execute(waits), most_ms)
        except RedisUnavailable as exc:
            found = found._replace(problem=str(exc))
            break
        if any(found.missing(each) for each in wanted):
            break
    return found


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

    def report(self, wanted: Iterable[Durability], confirmed: Confirmations) -> None:
        """Log the first of several batches that were appended but not confirmed."""
        missing = next(filter(None, map(confirmed.missing, wanted)), "")
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
