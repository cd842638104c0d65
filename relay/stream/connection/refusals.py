"""The table of error replies of Redis and how relay reacts to them.

An error reply begins with a code. The table says for each code what continues and what pauses, and
which line is logged. `Refusals` stores what is refused at the moment: it logs the beginning and the
end of each refusal once, and `/readyz` shows the list.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from enum import Enum
from typing import NamedTuple

_log = logging.getLogger(__name__)

WRITES = "writes"


class Effect(Enum):
    """The reaction to an error reply."""

    # This server cannot be used now. Close the connection, ask where Redis is, and connect again.
    RECONNECT = "reconnect"
    # Redis refuses writes for a while. Streams are read without writing; publishing is rejected
    # with an error that asks the client to try again. Writing is tried again every second.
    NO_WRITES = "no writes"
    # The same command works later. It is sent again after a pause.
    PAUSE = "pause"
    # The user lacks a right, or the command does not exist. Streams are read without groups and
    # transactions; everything else is tried again after a pause.
    NO_RIGHT = "no right"
    # The refusal concerns one key or one command. Everything else continues.
    ONE = "one"


class Rule(NamedTuple):
    """The reaction to one error code, and the remedy for operators."""

    effect: Effect
    remedy: str


_OTHER = Rule(Effect.ONE, "")
_DENIED = Rule(
    Effect.NO_RIGHT,
    "Compare the ACL user with docs/redis.md, section 'Create Redis users'",
)
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
    "TRYAGAIN": Rule(Effect.PAUSE, "A slot of the cluster is being moved"),
    "NOPERM": _DENIED,
    "NOAUTH": _DENIED,
    "WRONGPASS": _DENIED,
    "WRONGTYPE": Rule(
        Effect.ONE, "The key holds something else: rename or delete it, or change [redis] prefix"
    ),
}


def code_of(reply: str) -> str:
    """Return the code of an error reply."""
    return reply.partition(" ")[0]


def rule_of(reply: str) -> Rule:
    """Return the rule for an error reply."""
    if reply.startswith("ERR unknown command"):
        return _DENIED
    return _RULES.get(code_of(reply), _OTHER)


def codes(*effects: Effect) -> frozenset[str]:
    """Return the codes that have one of these effects."""
    return frozenset(code for code, rule in _RULES.items() if rule.effect in effects)


# The same command may be accepted later, by this server.
TEMPORARY_CODES = codes(Effect.NO_WRITES, Effect.PAUSE)


class Refusals:
    """Stores what Redis refuses now, by area: all writes, or one function of relay."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._now: dict[str, tuple[str, float]] = {}
        self._notes: dict[str, str] = {}

    def refused(self, area: str, reply: str, consequence: str = "") -> None:
        """Store an error reply, and log it if it is new."""
        rule = rule_of(reply)
        if rule.effect is Effect.NO_WRITES:
            area = WRITES
            consequence = "events are still delivered, publishing is rejected"
        known = self._now.get(area)
        if known is not None and code_of(known[0]) == code_of(reply):
            return
        self._now[area] = (reply, known[1] if known else self._clock())
        _log.error(
            "Redis refuses %s (%s)%s%s",
            area,
            reply,
            f": {consequence}" if consequence else "",
            f". {rule.remedy}" if rule.remedy else "",
        )

    def accepted(self, area: str) -> None:
        """Remove the area's refusal, and log that it has ended."""
        known = self._now.pop(area, None)
        if known is not None:
            _log.warning("Redis accepts %s again after %.1f s", area, self._clock() - known[1])

    def note(self, name: str, text: str) -> None:
        """Store something else that is wrong in Redis, and log it if it is new; '' ends it."""
        if text and self._notes.get(name) != text:
            _log.warning("%s", text)
        self._notes[name] = text

    def has(self, area: str) -> bool:
        """Return True if the area is refused now."""
        return area in self._now

    def __str__(self) -> str:
        refused = [f"Redis refuses {area} ({reply})" for area, (reply, _) in self._now.items()]
        return "; ".join([*refused, *filter(None, self._notes.values())])
