"""Takes one user's right to one workspace away, at a place in its stream.

The hash says what holds from now on; the entry is the place after which nothing leaves, in live
delivery, replay and catch-up alike. One transaction, so that no reader sees one without the other.
"""

from __future__ import annotations

from redis.asyncio import Redis

from relay.model import Channel, EntryID
from relay.stream import entry
from relay.stream.connect import translated
from relay.stream.keys import Keys

# Beats every other rights source: the token's claims cannot be withdrawn, only overruled.
REFUSED = b"-"


async def revoke(client: Redis, keys: Keys, channel: Channel, user: str) -> EntryID:
    """Refuse `user` from the returned entry on, until their field in the rights hash says else."""
    fields = entry.encode_revocation(user)
    async with client.pipeline(transaction=True) as transaction:
        transaction.execute_command("HSET", keys.rights(channel), fields[1], REFUSED)
        transaction.execute_command("XADD", keys.stream(channel), "*", *fields)
        with translated():
            _, entry_id = await transaction.execute()
    return EntryID.parse(entry_id)
