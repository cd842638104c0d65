"""Identity of the Redis primary, used to detect that acknowledged entries may have been lost.

Redis does not report that it lost its newest entries: a promoted replica may have lagged behind,
and a server that restarted may have read an old RDB file or an incomplete AOF. Each of these
changes the replication ID (`master_replid`; tried on Redis 7.0 and Valkey 9.1, which also change it
at every start). So a stream stores under which replication ID it was last seen, see
`relay.stream.read.groups`. A new replication ID means "entries may be missing", with one exception:
attaching the first replica, and freeing the replication backlog an hour after the last one left,
change it while the process keeps all its data.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple
from zlib import crc32

# A process that was out of sight for longer may have been a replica in between, and may have
# dropped the traces of that (`repl-backlog-ttl`, an hour by default).
_OUT_OF_SIGHT_S = 60.0


class Replication(NamedTuple):
    """INFO replication: the server's role, its replication ID and the one before it.

    `previous` is empty unless the server was promoted, or began with an RDB file that names one.
    """

    role: bytes
    replid: bytes
    previous: bytes

    @classmethod
    def parse(cls, info: bytes) -> Replication:
        """Parse the reply to INFO replication."""
        lines = dict(line.partition(b":")[::2] for line in info.split(b"\r\n"))
        previous = lines.get(b"master_replid2", b"")
        # Forty zeros mean "none".
        previous = previous if previous.strip(b"0") else b""
        return cls(lines.get(b"role", b""), lines.get(b"master_replid", b""), previous)


def certificate_of(replid: bytes) -> int:
    """Return 32 bits that name a replication ID."""
    return crc32(replid)


class Primary:
    """The server behind one connection after another, as far as its data is known to be whole.

    `certificate` names its present replication ID.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.certificate = 0
        self._clock = clock
        self._run_id = b""
        self._whole: set[int] = set()
        self._left_at: float | None = None

    def connected(self, run_id: bytes, replication: Replication) -> None:
        """Call for each new connection, before anything else is read from it."""
        left_at, self._left_at = self._left_at, None
        away = left_at is not None and self._clock() - left_at > _OUT_OF_SIGHT_S
        if run_id != self._run_id or away:
            self._whole.clear()
        self._run_id = run_id
        self.observe(replication)

    def observe(self, replication: Replication) -> None:
        """Call for each INFO replication that was read from the present connection."""
        self.certificate = certificate_of(replication.replid)
        if self.certificate not in self._whole and replication.previous:
            # Promoted since: what another primary acknowledged meanwhile may be missing.
            self._whole.clear()
        self._whole.add(self.certificate)

    def disconnected(self) -> None:
        """Call when the connection is lost."""
        self._left_at = self._clock()

    def vouches_for(self, certificate: int) -> bool:
        """Return True if nothing was lost since a stream was given this certificate."""
        return certificate in self._whole
