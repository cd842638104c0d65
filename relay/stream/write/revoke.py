"""Revoke a user's right to read a channel, and end a revocation.

Both change the rights hash and append an entry in one step, so that no reader sees one without the
other. The entry's ID is the position of the change in the stream. Revoke writes `-` to the hash,
which overrides all sources of rights. Grant restores the previous value, so that the sources of
rights decide again: tokens, protocols' own rules, the application, the hash.
"""

from __future__ import annotations

from typing import cast

from relay.core.model import Channel, EntryID
from relay.stream.connection import connect
from relay.stream.connection.scripts import Script
from relay.stream.format import entry
from relay.stream.format.keys import Keys
from relay.stream.shards.clients import ShardClients
from relay.stream.write import control
from relay.stream.write.control import DropRights

# Overrides all sources of rights. It is needed because a signed token cannot be changed.
REVOKED = b"-"

# KEYS: rights, revoked, stream. ARGV: `-`, the user, then the words of XADD after the key. Returns
# the entry's ID. A second revocation keeps the value from before the first one.
_REVOKE = Script("""\
local before = redis.call('HGET', KEYS[1], ARGV[2])
if not before then
  redis.call('HDEL', KEYS[2], ARGV[2])
elseif before ~= ARGV[1] then
  redis.call('HSET', KEYS[2], ARGV[2], before)
end
redis.call('HSET', KEYS[1], ARGV[2], ARGV[1])
return redis.call('XADD', KEYS[3], unpack(ARGV, 3))
""")

# The same keys and arguments. Returns the entry's ID, or nil if the user is not revoked.
_GRANT = Script("""\
if redis.call('HGET', KEYS[1], ARGV[2]) ~= ARGV[1] then return nil end
local id = redis.call('XADD', KEYS[3], unpack(ARGV, 3))
local before = redis.call('HGET', KEYS[2], ARGV[2])
if before then
  redis.call('HSET', KEYS[1], ARGV[2], before)
  redis.call('HDEL', KEYS[2], ARGV[2])
else
  redis.call('HDEL', KEYS[1], ARGV[2])
end
return id
""")


async def revoke(clients: ShardClients, keys: Keys, channel: Channel, user: str) -> EntryID:
    """Revoke the user's right from the returned entry on, until `grant` or a change of the hash."""
    entry_id = await _run(clients, keys, channel, _REVOKE, entry.encode_revocation(user))
    return EntryID.parse(cast(bytes, entry_id))


async def grant(clients: ShardClients, keys: Keys, channel: Channel, user: str) -> EntryID | None:
    """End a revocation from the returned entry on. Return None if the user is not revoked.

    Workers then check the sources of rights again. Protocols whose clients would not subscribe
    again by themselves notify them.
    """
    entry_id = await _run(clients, keys, channel, _GRANT, entry.encode_grant(user))
    if entry_id is None:
        return None
    await control.publish(clients, keys, DropRights(channel=channel, user=user))
    return EntryID.parse(cast(bytes, entry_id))


async def _run(
    clients: ShardClients, keys: Keys, channel: Channel, script: Script, fields: list[bytes]
) -> object:
    names = keys.rights(channel), keys.revoked(channel), keys.stream(channel)
    words = REVOKED, fields[1], b"*", *fields
    return await connect.command(
        clients.for_key(names[0]), "EVAL", script.text, len(names), *names, *words
    )
