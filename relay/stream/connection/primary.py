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

A stream that is moved to another server (a slot of a Redis Cluster) keeps the certificate of the
server that it was on. It is complete if that server is still running and has lost nothing since,
and if the new server was not promoted or restarted after the stream had arrived; see `Primaries`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterable
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


class Primaries:
    """The primaries to which a worker is connected. Streams may be moved between them."""

    def __init__(self) -> None:
        # No stream has been read yet: a server that is found now was promoted before any stream
        # was certified by this worker.
        self.is_starting = True
        self._had_failover = False
        self._connected: set[Primary] = set()

    def connected(self, primary: Primary, *, has_failed_over: bool) -> None:
        """Add a primary. `has_failed_over`: it was promoted or restarted since the start."""
        self._connected.add(primary)
        # A stream that nobody followed meanwhile may have been on the server that has failed.
        self._had_failover |= has_failed_over

    def disconnected(self, primary: Primary) -> None:
        """Remove a primary: it may lose entries from now on."""
        self._connected.discard(primary)

    def are_without_loss_since(self, certificate: int) -> bool:
        """Return True if a primary gave this certificate, and no primary has lost entries since."""
        if self._had_failover:
            return False
        return any(primary.has_kept(certificate) for primary in self._connected)


class Primary:
    """Tracks across reconnects under which replication IDs the server has lost no data.

    `certificate` is the hash of its present replication ID.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        *,
        continued: Continued = lambda _: (),
        others: Primaries | None = None,
    ) -> None:
        """`continued` returns the certificates whose data a replication ID has without loss.
        `others` are the primaries from which streams may be moved to this one."""
        self._continued = continued
        self._others = others or Primaries()
        # No stream that was moved here can have lost entries in an earlier life of this server.
        self._is_original = False
        self.certificate = 0
        self._clock = clock
        self._run_id = b""
        self._without_loss: set[int] = set()
        self._disconnected_at: float | None = None

    def connected(self, run_id: bytes, replication: Replication) -> None:
        """Call for each new connection, before anything else is read from it."""
        since, self._disconnected_at = self._disconnected_at, None
        too_long = since is not None and self._clock() - since > _DISCONNECTED_S
        known, self._run_id = self._run_id, run_id
        if run_id != known or too_long:
            self._without_loss.clear()
        was_promoted = self._observe(replication)
        if not known:
            self._is_original = self._others.is_starting or not replication.previous
        elif run_id != known or was_promoted:
            self._is_original = False
        self._others.connected(self, has_failed_over=not self._is_original)
        self._without_loss.update(self._continued(replication.replid))

    def observe(self, replication: Replication) -> None:
        """Call for each INFO replication that was read from the present connection."""
        if self._observe(replication):
            self._is_original = False
            self._others.connected(self, has_failed_over=True)

    def _observe(self, replication: Replication) -> bool:
        """Return True if the server may have been promoted since the last call."""
        self.certificate = certificate_of(replication.replid)
        was_promoted = self.certificate not in self._without_loss and bool(replication.previous)
        if was_promoted:
            # Entries that another primary acknowledged may be missing.
            self._without_loss.clear()
        self._without_loss.add(self.certificate)
        return was_promoted

    def disconnected(self) -> None:
        """Call when the connection is lost."""
        self._disconnected_at = self._clock()
        self._others.disconnected(self)

    def has_kept(self, certificate: int) -> bool:
        """Return True if this server gave the certificate and has lost nothing since."""
        return certificate in self._without_loss

    def kept(self) -> frozenset[int]:
        """Return all certificates for which `has_kept` is true."""
        return frozenset(self._without_loss)

    def is_without_loss_since(self, certificate: int, moved_from: Container[int] = ()) -> bool:
        """Return True if no entry was lost since a stream was given this certificate.

        `moved_from` are certificates of the server from which the stream was moved to this one,
        while this worker was connected to both.
        """
        if certificate in self._without_loss or certificate in moved_from:
            return True
        return self._is_original and self._others.are_without_loss_since(certificate)
