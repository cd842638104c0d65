"""Names of groups, and the commands for the groups that carry a stream's incarnation.

Each worker is its own group on the streams that its clients follow. Two more groups are never read.
Their last-delivered-ids are replicated, persisted and deleted with the stream, and move with it to
another Redis Cluster node (tried on Redis 7.0, 8.2 and Valkey 9.1):

* `relay:epoch` is `<life>-<history * 2^32 + certificate>`. `life` is random and distinguishes this
  stream from an earlier one of the same name, before DEL or FLUSHALL. `certificate` is the hash of
  the replication ID under which the stream was last examined. `history` is the hash of the one
  under which entries may last have been lost (see `relay.stream.connection.primary`).
* `relay:failover` is the stream's last ID when that was detected; it does not exist before. A
  client with a position up to it, and of another history, may have missed entries that were lost.
"""

from __future__ import annotations

import secrets

from relay.core.model import EntryID, StreamState
from relay.stream.connection.scripts import Script

Command = tuple[bytes | str, ...]

MARKER_GROUP = b"relay:epoch"
FAILOVER_GROUP = b"relay:failover"
OWN_GROUPS = frozenset({MARKER_GROUP, FAILOVER_GROUP})
LOW = (1 << 32) - 1
# Changes the marker and the failover group, unless the marker has changed meanwhile: the stream may
# have been deleted and created again since it was examined, and must keep its new marker.
CERTIFY = Script("""\
local how = 'CREATE'
local is_same = false
for _, group in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
    if group[2] == 'relay:failover' then how = 'SETID' end
    if group[2] == 'relay:epoch' then is_same = group[8] == ARGV[1] end
end
if not is_same then return 0 end
if ARGV[3] ~= '' then redis.call('XGROUP', how, KEYS[1], 'relay:failover', ARGV[3]) end
redis.call('XGROUP', 'SETID', KEYS[1], 'relay:epoch', ARGV[2])
return 1
""")
_WORKER = b"relay:"


def group_of(instance: str) -> bytes:
    """Return the fan-out group of one worker."""
    return _WORKER + instance.encode()


def instance_of(group: bytes) -> str | None:
    """Return the worker whose fan-out group this is, or None for any other group."""
    if group in OWN_GROUPS or not group.startswith(_WORKER):
        return None
    return group[len(_WORKER) :].decode(errors="replace")


def new_marker() -> int:
    """Return a random life: 32 bits, never 0."""
    return secrets.randbits(32) or 1


def create_marker(key: bytes, life: int, certificate: int, *, make: bool = True) -> Command:
    """Return the command that gives a stream its incarnation.

    A stream that has one keeps it; the reply is then BUSYGROUP. `make`: create a missing stream.
    """
    marker = f"{life}-{certificate << 32 | certificate}"
    made = ("MKSTREAM",) if make else ()
    return ("XGROUP", "CREATE", key, MARKER_GROUP, marker, *made)


def certify_commands(key: bytes, state: StreamState, certificate: int) -> list[Command]:
    """Return the commands that store the certificate, and the failover position if entries may have
    been lost. Empty if the stream already has this certificate."""
    marker = state.marker
    if marker is None or state.incarnation is None or marker.id.seq & LOW == certificate:
        return []
    seq = (state.incarnation & LOW) << 32 | certificate
    failover = "" if marker.is_current else str(state.failover)
    certified = str(EntryID(marker.id.ms, seq))
    return [("EVALSHA", CERTIFY.sha, "1", key, str(marker.id), certified, failover)]
