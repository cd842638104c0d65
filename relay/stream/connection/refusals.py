"""Tables of errors and commands that Redis can reject, and how relay reacts.

An error reply begins with a code. For each code the first table contains relay's reaction and the
advice to log. The second table lists the commands that relay needs, and the functions that do not
work without them; `relay.stream.connection.rights` tries them at each connection. `Refusals` stores
the current refusals: it logs the beginning and the end of each one once, and `/readyz` lists them.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Sequence
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from relay.core.model import Channel

if TYPE_CHECKING:
    from relay.stream.format.keys import Keys

_log = logging.getLogger(__name__)

WRITES = "writes"


class Effect(Enum):
    """The reaction to an error reply."""

    # This server cannot be used now. Close the connection, discover the address, connect again.
    RECONNECT = "reconnect"
    # Redis refuses writes for a while. Streams are read without writing; publishing is rejected
    # with an error that asks the client to try again. Writing is tried again every second.
    NO_WRITES = "no writes"
    # The same command works later. It is sent again after a pause.
    PAUSE = "pause"
    # The key is on another server of the cluster, or is being moved there. Read the slots again.
    MISPLACED = "misplaced"
    # The user lacks a right, or the command does not exist. Streams are read without groups and
    # transactions; everything else is tried again after a pause.
    NO_RIGHT = "no right"
    # The refusal concerns one key or one command. Everything else continues.
    ONE = "one"


class Rule(NamedTuple):
    """The reaction to one error code, and the remedy for operators."""

    effect: Effect
    remedy: str


_REMEDY = "Compare the ACL user with docs/redis.md, section 'Create Redis users'"
_OTHER = Rule(Effect.ONE, "")
_DENIED = Rule(Effect.NO_RIGHT, _REMEDY)
_LOGIN = Rule(Effect.NO_RIGHT, "Check user and password in [redis] url, password or password_file")
_RULES = {
    "LOADING": Rule(Effect.RECONNECT, "Redis is loading its data"),
    "READONLY": Rule(Effect.RECONNECT, "This server is a replica"),
    "MASTERDOWN": Rule(Effect.RECONNECT, "The replica has lost its primary"),
    "CLUSTERDOWN": Rule(Effect.RECONNECT, "The cluster is not complete"),
    "UNBLOCKED": Rule(Effect.RECONNECT, "The server has become a replica"),
    "OOM": Rule(Effect.NO_WRITES, "Free memory in Redis or raise maxmemory"),
    "MISCONF": Rule(Effect.NO_WRITES, "Redis cannot write to its disk: free space, see its log"),
    "NOREPLICAS": Rule(
        Effect.NO_WRITES, "Too few replicas are connected, see min-replicas-to-write"
    ),
    "BUSY": Rule(Effect.PAUSE, "A script is running in Redis; SCRIPT KILL ends it"),
    "TRYAGAIN": Rule(Effect.MISPLACED, "A slot of the cluster is being moved"),
    "ASK": Rule(Effect.MISPLACED, "A slot of the cluster is being moved"),
    "MOVED": Rule(
        Effect.MISPLACED,
        "The server is part of a Redis Cluster: if [redis] url is redis://, use redis+cluster://",
    ),
    "NOPERM": _DENIED,
    "NOAUTH": _LOGIN,
    "WRONGPASS": _LOGIN,
    "WRONGTYPE": Rule(
        Effect.ONE, "The key holds something else: rename or delete it, or change [redis] prefix"
    ),
}


def code_of(reply: str) -> str:
    """Return the code of an error reply."""
    return reply.partition(" ")[0]


def cause_of(reply: str) -> str:
    """Return the error that made Redis discard a transaction, or the reply if it is another one."""
    return reply.removeprefix("EXECABORT Transaction discarded because of: ")


def without_arguments(reply: str) -> str:
    """Return the reply to an unknown command without its arguments, which may be long or secret."""
    return reply.partition(", with args beginning with")[0]


def leaves_transaction(reply: str) -> bool:
    """Return True if EXEC does not exist, so that the connection's transaction never ends."""
    return reply.lower().startswith("err unknown command 'exec'")


def rule_of(reply: str) -> Rule:
    """Return the rule for an error reply."""
    if reply.startswith("ERR unknown command"):
        return _DENIED
    return _RULES.get(code_of(reply), _OTHER)


def codes(*effects: Effect) -> frozenset[str]:
    """Return the codes that have one of these effects."""
    return frozenset(code for code, rule in _RULES.items() if rule.effect in effects)


# The same command may be accepted later, by this server.
TEMPORARY_CODES = codes(Effect.NO_WRITES, Effect.PAUSE, Effect.MISPLACED)


class Need(NamedTuple):
    """A command that relay needs, in a form that the ACL rules of docs/redis.md accept.

    `loss` describes what does not work without it. `reading` is True if no stream can be read.
    """

    command: tuple[str | bytes, ...]
    loss: str
    reading: bool = False

    @property
    def name(self) -> str:
        """The command as in an ACL rule, such as `xinfo|stream`."""
        first, *rest = map(str, self.command)
        return f"{first}|{rest[0]}".lower() if first in _CONTAINERS else first.lower()

    @property
    def opens_transaction(self) -> bool:
        """True if the commands after this one are tried inside a transaction."""
        return self.command == ("MULTI",)

    @property
    def key(self) -> str:
        """The first key or pub/sub channel of the command."""
        return next((each.decode() for each in self.command if isinstance(each, bytes)), "")


_REJECTED_COMMAND = re.compile(r"(?:the|unknown command) '([^' ]+)'")
_CONCERNS_KEY = re.compile(r"\b(?:key|channel)\b")
# Commands with subcommands that have rights of their own.
_CONTAINERS = frozenset({"CLIENT", "XINFO", "XGROUP", "SCRIPT", "PUBSUB", "MEMORY"})
_NO_READS = "no stream can be read"
_NO_GROUPS = "streams are read without consumer groups"
_NO_TRANSACTIONS = f"{_NO_GROUPS}; periodic jobs, limits per user and history do not work"
_NO_BUS = "no ephemeral events and no messages of other workers are received"
_NO_JOBS = "heartbeats, leases and polling sessions do not work"
_NO_PRESENCE = "presence does not work"
_NO_RETENTION = "streams are not trimmed"
_NO_UIDS = "publishing with a uid is rejected"
_NO_COMMANDS = "disconnect, unsubscribe and history do not work"


def needs(keys: Keys, instance: str, *, sharded: bool = False) -> list[Need]:
    """Return the commands that every relay needs. Optional producers need more.

    `sharded`: pub/sub channels have slots. Keys of other servers are checked as well, because Redis
    checks rights before it redirects.
    """
    channel = Channel("relay.rights")
    stream, group = keys.stream(channel), f"relay:{instance}"
    present, presence = keys.present(instance), keys.presence(channel)
    return [
        # These cannot be tried inside a transaction.
        *(
            [Need(("SSUBSCRIBE", keys.ephemeral(channel)), _NO_BUS)]
            if sharded
            else [
                Need(("SUBSCRIBE", keys.ephemeral(channel)), _NO_BUS),
                Need(("UNSUBSCRIBE", keys.ephemeral(channel)), _NO_BUS),
            ]
        ),
        Need(("WATCH", keys.lease(instance)), _NO_JOBS),
        Need(("UNWATCH",), _NO_JOBS),
        Need(("EXEC",), _NO_TRANSACTIONS),
        Need(("MULTI",), _NO_TRANSACTIONS),
        # These are tried inside one that is never executed.
        Need(("CLIENT", "TRACKING", "ON"), "streams are polled"),
        Need(("XINFO", "STREAM", stream), _NO_READS, reading=True),
        Need(("XINFO", "GROUPS", stream), _NO_READS, reading=True),
        Need(("XRANGE", stream, "-", "+"), _NO_READS, reading=True),
        Need(("HMGET", keys.rights(channel), "user"), _NO_READS, reading=True),
        Need(("MEMORY", "USAGE", stream, "SAMPLES", "0"), "clients catch up more slowly"),
        Need(("XREADGROUP", "GROUP", group, "c", "STREAMS", stream, ">"), _NO_GROUPS),
        Need(("XGROUP", "CREATE", stream, group, "0"), _NO_GROUPS),
        Need(("XGROUP", "SETID", stream, group, "0"), _NO_GROUPS),
        Need(("XGROUP", "DESTROY", stream, group), "consumer groups of stopped workers remain"),
        Need(("XADD", stream, "*", "data", "1"), "publishing is rejected"),
        Need(("XADD", keys.control, "*", "command", "none"), "commands to workers are rejected"),
        Need(("XREVRANGE", keys.control, "+", "-"), _NO_COMMANDS),
        Need(("EVALSHA", "0" * 40, "0"), _NO_UIDS),
        Need(("SCRIPT", "LOAD", "return 1"), _NO_UIDS),
        Need(
            ("SPUBLISH" if sharded else "PUBLISH", keys.ephemeral(channel), ""),
            "ephemeral events are not sent",
        ),
        Need(("GET", keys.node(instance)), _NO_JOBS),
        Need(("SET", keys.node(instance), ""), f"{_NO_JOBS}; {_NO_UIDS}"),
        Need(("EXPIRE", keys.node(instance), "1"), _NO_JOBS),
        Need(("DEL", keys.node(instance)), _NO_JOBS),
        Need(("SADD", keys.nodes, instance), "other workers and relay status miss this worker"),
        Need(("SREM", keys.nodes, instance), "stopped workers stay in the list of workers"),
        Need(("SMEMBERS", keys.nodes), "groups and limits across workers do not work"),
        Need(("HSET", presence, "client", ""), _NO_PRESENCE),
        Need(("HGETALL", presence), _NO_PRESENCE),
        Need(("HDEL", presence, "client"), _NO_PRESENCE),
        Need(("SCARD", present), _NO_PRESENCE),
        Need(("SCAN", "0"), _NO_RETENTION),
        Need(("TIME",), _NO_RETENTION),
        Need(("XLEN", stream), _NO_RETENTION),
        Need(("XTRIM", stream, "MAXLEN", "1"), _NO_RETENTION),
    ]


class Refusals:
    """Stores current refusals of Redis by area: all writes, or one function of relay."""

    def __init__(self, server: str = "") -> None:
        """`server` is named in each line, if there are several."""
        self._redis = f"Redis at {server}" if server else "Redis"
        self._now: dict[str, tuple[str, float]] = {}
        self._notes: dict[str, str] = {}
        # Areas whose refusal is stored as one of all writes.
        self._writing: set[str] = set()
        # The commands that were rejected at the last check, and the line about them.
        self.rejected: tuple[Need, ...] = ()
        self._rejected_text = ""
        self.cannot_read = False
        # Called for a rejection that the last check of rights does not explain. None: no checks.
        self.on_unknown: Callable[[], None] | None = None
        # Rejections that the next check may explain: area and consequence.
        self._unexplained: dict[str, str] = {}

    def checked(self, server: str, rejected: Sequence[tuple[Need, str]], *, log: bool) -> None:
        """Store the needed commands that Redis rejects, with its replies.

        Log them in one line if they have changed, or if `log` is set: after a new connection.
        """
        losses: dict[str, list[str]] = {}
        for need, reply in rejected:
            names = losses.setdefault(need.loss, [])
            name = f"{need.name} (key {need.key})" if _CONCERNS_KEY.search(reply) else need.name
            if name not in names:
                names.append(name)
        known = self._rejected_text
        self.rejected = tuple(need for need, _ in rejected)
        self.cannot_read = any(need.reading for need, _ in rejected)
        text = "; ".join(f"{', '.join(names)}: {loss}" for loss, names in losses.items())
        self._rejected_text = f"{self._redis} rejects commands of relay ({text})" if text else ""
        if text and (log or self._rejected_text != known):
            _log.error(
                "Redis at %s rejects commands of relay (%s). Everything else continues. %s",
                server,
                text,
                _REMEDY,
            )
        elif known and not text:
            _log.warning("Redis at %s accepts all commands of relay again", server)
        for area, (reply, _) in list(self._now.items()):
            found = _REJECTED_COMMAND.search(reply)
            if rule_of(reply).effect is Effect.NO_RIGHT and found and not self.explains(reply):
                # The command is accepted now. Its next use may be far away.
                self.accepted(area)
        unexplained, self._unexplained = self._unexplained, {}
        for area, consequence in unexplained.items():
            if area in self._now and not self.explains(self._now[area][0]):
                self._log_refused(area, consequence)

    def lacks(self, name: str) -> bool:
        """Return True if the last check found this command, or a subcommand of it, rejected."""
        return any(name in (need.name, need.name.partition("|")[0]) for need in self.rejected)

    def explains(self, reply: str) -> bool:
        """Return True if the last check has logged this rejection."""
        found = _REJECTED_COMMAND.search(reply)
        return found is not None and self.lacks(found[1].lower())

    def refused(self, area: str, reply: str, consequence: str = "") -> None:
        """Store an error reply, and log it if it is new."""
        reply = without_arguments(reply)
        rule = rule_of(reply)
        if rule.effect is Effect.NO_WRITES:
            self._writing.add(area)
            area = WRITES
            consequence = "events are still delivered, publishing is rejected"
        known = self._now.get(area)
        if known is not None and code_of(known[0]) == code_of(reply):
            return
        self._now[area] = (reply, known[1] if known else time.monotonic())
        if rule.effect is Effect.NO_RIGHT and self.on_unknown is not None:
            if not self.explains(reply):
                self._unexplained[area] = consequence
                self.on_unknown()
            return
        self._log_refused(area, consequence)

    def _log_refused(self, area: str, consequence: str) -> None:
        reply, _ = self._now[area]
        remedy = rule_of(reply).remedy
        _log.error(
            "%s refuses %s (%s)%s%s",
            self._redis,
            area,
            reply,
            f": {consequence}" if consequence else "",
            f". {remedy}" if remedy else "",
        )

    def accepted(self, area: str) -> None:
        """Remove the area's refusal, and log that it has ended."""
        if area in self._writing:
            # The same writes were refused, so writes are accepted now.
            self._writing.clear()
            self.accepted(WRITES)
        known = self._now.pop(area, None)
        if known is not None and not self.explains(known[0]):
            lasted_s = time.monotonic() - known[1]
            _log.warning("%s accepts %s again after %.1f s", self._redis, area, lasted_s)

    def note(self, name: str, text: str) -> None:
        """Store another problem of Redis, and log it if it is new. An empty text removes it."""
        if text and self._notes.get(name) != text:
            _log.warning("%s", text)
        self._notes[name] = text

    def has(self, area: str) -> bool:
        """Return True if the area is refused now."""
        return area in self._now

    def __str__(self) -> str:
        refused = [
            f"{self._redis} refuses {area} ({reply})"
            for area, (reply, _) in self._now.items()
            if not self.explains(reply)
        ]
        parts = [self._rejected_text, *refused, *self._notes.values()]
        return "; ".join(filter(None, parts))
