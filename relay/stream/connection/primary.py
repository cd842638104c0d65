"""Identity of the Redis primary, used to detect that acknowledged entries may have been lost.

Redis does not report that it lost its newest entries: a promoted replica may have lagged behind,
and a server that restarted may have read an old RDB file or an incomplete AOF. Each of these
changes the replication ID (`master_replid`; tried on Redis 7.0 and Valkey 9.1, which also change it
at every start). Each stream therefore stores the replication ID under which it was last examined,
see `relay.stream.read.groups`. A new replication ID means that entries may be missing, with one
exception: a process that keeps all its data changes it as well when the first replica is attached,
and when the replication backlog is freed an hour after the last replica has left.
For the embedded server, relay can prove that a restart lost nothing, see
`relay.process.clean_stop`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import NamedTuple
from zlib import crc32

# A server that was disconnected for longer may have been a replica in between, and may no longer
# report it (`repl-backlog-ttl`, an hour by default).
_DISCONNECTED_S = 60.0


# Returns certificates of earlier replication IDs, by the present one.
Continued = Callable[[bytes], Iterable[int]]


class Replication(NamedTuple):
    """INFO replication: the server's role, its replication ID and the previous one.

    `previous` is empty unless the server was promoted, or started from an RDB file that has one.
    """

    role: bytes
    replid: bytes
    previous: bytes

    @classmethod
    def parse(cls, info: bytes) -> Replication:
        """Parse the reply to INFO replication."""
        lines = dict(line.partition(b":")[::2] for line in info.split(b"\r\n"))
        previous = lines.get(b"master_replid2", b"")
        # Forty zeros mean that there is no previous ID.
        previous = previous if previous.strip(b"0") else b""
        return cls(lines.get(b"role", b""), lines.get(b"master_replid", b""), previous)


def certificate_of(replid: bytes) -> int:
    """Return a 32-bit hash of a replication ID."""
    return crc32(replid)


class Primary:
    """Tracks across reconnects under which replication IDs the server has lost no data.

    `certificate` is the hash of its present replication ID.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        *,
        continued: Continued = lambda _: (),
    ) -> None:
        """`continued` returns the certificates whose data a replication ID has without loss."""
        self._continued = continued
        self.certificate = 0
        self._clock = clock
        self._run_id = b""
        self._without_loss: set[int] = set()
        self._disconnected_at: float | None = None

    def connected(self, run_id: bytes, replication: Replication) -> None:
        """Call for each new connection, before anything else is read from it."""
        since, self._disconnected_at = self._disconnected_at, None
        too_long = since is not None and self._clock() - since > _DISCONNECTED_S
        if run_id != self._run_id or too_long:
            self._without_loss.clear()
        self._run_id = run_id
        self.observe(replication)
        self._without_loss.update(self._continued(replication.replid))

    def observe(self, replication: Replication) -> None:
        """Call for each INFO replication that was read from the present connection."""
        self.certificate = certificate_of(replication.replid)
        if self.certificate not in self._without_loss and replication.previous:
            # The server was promoted. Entries that another primary acknowledged may be missing.
            self._without_loss.clear()
        self._without_loss.add(self.certificate)

    def disconnected(self) -> None:
        """Call when the connection is lost."""
        self._disconnected_at = self._clock()

    def is_without_loss_since(self, certificate: int) -> bool:
        """Return True if no entry was lost since a stream was given this certificate."""
        return certificate in self._without_loss
