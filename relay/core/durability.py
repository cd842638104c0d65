"""Durability: what must be true of an event before its publisher receives a success.

`fast`: Redis has appended the event. `replicated`: in addition, replicas have confirmed it (WAIT).
`fsynced`: in addition, the primary has written it to its disk (WAITAOF, Redis 7.2 or Valkey).

The text form is the same in settings, requests and on the command line: `fast`,
`replicated[:REPLICAS[:MS]]` or `fsynced[:REPLICAS[:MS]]`.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Literal, NamedTuple

_LIMIT = "(?::[1-9][0-9]{0,4})?"
_FORMAT = re.compile(f"fast|replicated(?::[1-9][0-9]?{_LIMIT})?|fsynced(?::[0-9]{{1,2}}{_LIMIT})?")
FORMS = "fast, replicated, replicated:REPLICAS:MS, fsynced or fsynced:REPLICAS:MS"


class Durability(NamedTuple):
    """One durability level.

    `replicas` must confirm the event: for `replicated` that they have received it, for `fsynced`
    that they have written it to disk. `limit_ms` is the longest wait for the confirmations; 0 means
    as long as the caller's own time limit permits.
    """

    level: Literal["fast", "replicated", "fsynced"]
    replicas: int = 0
    limit_ms: int = 0

    @staticmethod
    @lru_cache(256)
    def parse(text: str) -> Durability:
        """Parse the text form. Raise ValueError for anything else."""
        if not _FORMAT.fullmatch(text):
            raise ValueError(f"durability must be {FORMS}, not {text[:50]!r}")
        level, _, rest = text.partition(":")
        replicas, _, limit = rest.partition(":")
        if level == "fast":
            return FAST
        if level == "replicated":
            return Durability("replicated", int(replicas or 1), int(limit or 0))
        return Durability("fsynced", int(replicas or 0), int(limit or 0))

    @property
    def waits(self) -> bool:
        """Return True if a command has to wait for confirmations."""
        return self.level != "fast"

    def wait_ms(self, most_ms: int) -> int:
        """Return the time to wait for confirmations: `limit_ms`, but at most `most_ms`."""
        return min(self.limit_ms, most_ms) if self.limit_ms else most_ms

    def __str__(self) -> str:
        if not self.waits:
            return self.level
        limit = f":{self.limit_ms}" if self.limit_ms else ""
        return f"{self.level}:{self.replicas}{limit}"


FAST = Durability("fast")
