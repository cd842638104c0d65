"""The Redis side of command queues: read the head, apply it atomically, distribute the queues.

One script removes commands from the queue and appends their entries, so that each command is
applied once even if a worker dies. The script first checks that the head of the queue is still the
one that was read. It compares the number of commands ever removed, which each worker increments in
the same step, and the first and the last item, in case another program has changed the list.
Leases only avoid duplicate work; correctness does not depend on them.

As with streams, LRANGE arms the key for client tracking, and the next RPUSH sends an invalidation.
BLPOP would remove the command before it is applied and need one connection per queue.

On several servers or a Redis Cluster no script may use the queue and the streams together. See
`queue_steps.py` for these.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple, cast

from relay.core.durability import FAST, Durability
from relay.core.errors import RedisUnavailable
from relay.core.slices import in_slices
from relay.stream.connection.connect import CommandRefused
from relay.stream.connection.pipeline_connection import ReplyError
from relay.stream.connection.scripts import Script, is_missing, load
from relay.stream.write.append import APPEND_FUNCTION
from relay.stream.write.confirmations import execute
from relay.stream.write.control import at_field
from relay.stream.write.dead_letters import KEEP

if TYPE_CHECKING:
    from relay.core.model import Channel
    from relay.stream.connection.pipeline_connection import PipelineConnection
    from relay.stream.format.keys import Keys
    from relay.stream.write.confirmations import Missing


# KEYS: the participants, then the leases. ARGV: holder, time to live in ms (0: release all).
# Returns 1 or 0 for each lease: whether the holder has it now. It keeps its own leases first, then
# gets free ones, up to its fair share. An expiry later than `ttl` from now was set by the clock of
# another server before a failover. It is removed, so that dead workers do not count for the shares.
HOLD = Script("""\
local me, ttl, leases = ARGV[1], tonumber(ARGV[2]), #KEYS - 1
local time = redis.call('TIME')
local now, share, own, held, free = time[1] * 1000 + math.floor(time[2] / 1000), 0, 0, {}, {}
if ttl == 0 then redis.call('ZREM', KEYS[1], me)
else
  redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
  redis.call('ZREMRANGEBYSCORE', KEYS[1], '(' .. now + ttl, '+inf')
  redis.call('ZADD', KEYS[1], now + ttl, me)
  redis.call('EXPIRE', KEYS[1], math.ceil(ttl / 1000))
  share = math.ceil(leases / redis.call('ZCARD', KEYS[1]))
end
for i = 1, leases do
  local holder = redis.call('GET', KEYS[i + 1])
  held[i] = 0
  if not holder then free[#free + 1] = i
  elseif holder == me and own < share then
    redis.call('SET', KEYS[i + 1], me, 'PX', ttl)
    held[i], own = 1, own + 1
  elseif holder == me then redis.call('DEL', KEYS[i + 1]) end
end
for _, i in ipairs(free) do
  if own == share then break end
  redis.call('SET', KEYS[i + 1], me, 'PX', ttl)
  held[i], own = 1, own + 1
end
return held
""")

# KEYS: the queue, its count, the dead letters; then for each operation the stream and, if it has a
# uid, the key of the uid. ARGV: the count as read, the number of items, the first and the last
# item, window in ms, the number of dead letters to keep, node, time; then for each operation the
# number of entries to keep (0: all), 1 if it has a uid, 2 if it is a command with a position, the
# index of its item, the number of words, and the words. A command with a position is followed in
# KEYS by another stream, whose newest ID becomes the value of the last field. Returns -1 if the
# head of the queue has changed; then nothing was done. Otherwise it returns the number of
# operations that became dead letters.
#
# INCRBY comes first because Redis checks memory, disk and replicas at a script's first write only.
# If that is accepted, no later write fails for such a reason. A key of another type or an ACL may
# still reject an operation; it must not stop the others.
APPLY = Script(
    APPEND_FUNCTION
    + """\
local queue, n = KEYS[1], tonumber(ARGV[2])
if (redis.call('GET', KEYS[2]) or '0') ~= ARGV[1]
  or redis.call('LINDEX', queue, 0) ~= ARGV[3]
  or redis.call('LINDEX', queue, n - 1) ~= ARGV[4] then return -1 end
redis.call('INCRBY', KEYS[2], n)
local k, a, failed, keys, argv = 4, 9, 0, #KEYS, ARGV
while k <= keys do
  local stream, uid = KEYS[k], nil
  local from, to = a + 4, a + 3 + argv[a + 3]
  k = k + 1
  local fields = {unpack(argv, from, to)}
  if argv[a + 1] == '1' then
    uid = KEYS[k]
    k = k + 1
  elseif argv[a + 1] == '2' then
    local newest = redis.pcall('XREVRANGE', KEYS[k], '+', '-', 'COUNT', 1)
    k = k + 1
    if newest.err then fields[#fields] = nil
    else fields[#fields + 1] = newest[1] and newest[1][1] or '0-0' end
  end
  local id = append(stream, argv[a], fields, uid, argv[5])
  if type(id) == 'table' then
    failed = failed + 1
    local item = redis.call('LINDEX', queue, argv[a + 2])
    append(KEYS[3], argv[6], {'queue', queue, 'reason', id.err, 'node', argv[7], 'at', argv[8],
      'fields', cjson.encode({{'command', string.sub(item, 1, 65536)}})})
  end
  a = to + 1
end
redis.call('LTRIM', queue, n, -1)
return failed
"""
)


class Operation(NamedTuple):
    """One entry to append to the stream `key`, at most once while `uid_key` exists.

    `keep` is the approximate limit of the stream (0: no limit), `item` the index of the command in
    the batch. `position_in` is a channel: a control command takes effect after its newest entry.
    `durability` is for `CommandQueues.confirm`.
    """

    key: bytes
    fields: Sequence[bytes]
    item: int
    keep: int = 0
    uid_key: bytes | None = None
    position_in: Channel | None = None
    durability: Durability = FAST


class Head(NamedTuple):
    """The first items of a queue, and the number of items removed before they were read."""

    taken: bytes
    items: list[bytes]


class CommandQueues:
    """Queue operations on one connection. Client tracking on it reports new commands."""

    def __init__(self, connection: PipelineConnection, keys: Keys, instance: str) -> None:
        self._connection = connection
        self._keys = keys
        self._instance = instance

    async def prepare(self) -> None:
        """Load the scripts. Call this first."""
        await load(self._connection, HOLD, APPLY)

    async def hold(self, queues: Sequence[str], ttl_ms: int) -> list[bool]:
        """Take or extend leases of queues. Return for each queue whether this worker holds it.

        A worker gets at most its fair share while other workers request leases as well. With 0 for
        `ttl_ms` it releases all of them.
        """
        keys = [self._keys.takers, *[self._keys.lease(f"queue:{queue}") for queue in queues]]
        words: list[bytes | str | int] = [HOLD.sha, len(keys), *keys, self._instance, ttl_ms]
        return [bool(held) for held in cast(list[int], await self._call("EVALSHA", *words))]

    async def head(self, queue: str, most: int) -> Head:
        """Return the first items of the queue, and arm the notification of later ones."""
        # Read the count first. If a batch is removed in between, `apply` finds an old count.
        count, items = await self._connection.execute(
            [("GET", self._keys.queue_count(queue)), ("LRANGE", queue, 0, most - 1)]
        )
        for reply in (count, items):
            if isinstance(reply, ReplyError):
                raise CommandRefused(f"queue {queue}", str(reply))
        return Head(cast(bytes | None, count) or b"0", cast(list[bytes], items))

    async def apply(
        self,
        queue: str,
        head: Head,
        operations: Sequence[Operation],
        *,
        window_ms: int,
    ) -> int | None:
        """Append all entries and remove the head of the queue in one step.

        Return None if the head has changed and nothing was done, else the number of entries that
        Redis rejected and that became dead letters.
        """
        keys: list[bytes | str] = [queue, self._keys.queue_count(queue), self._keys.dead_letters]
        words: list[bytes | str | int] = [head.taken, len(head.items), head.items[0]]
        words += head.items[-1], window_ms, KEEP, self._instance
        words.append(datetime.now(UTC).isoformat(timespec="milliseconds"))
        async for key, fields, item, keep, uid_key, channel, _ in in_slices(operations):
            keys.append(key)
            if channel is not None:
                keys.append(self._keys.stream(channel))
                words += keep, 2, item, len(fields) + 1, *fields, at_field(channel)
            elif uid_key is None:
                words += keep, 0, item, len(fields), *fields
            else:
                keys.append(uid_key)
                words += keep, 1, item, len(fields), *fields
        failed = await self._call("EVALSHA", APPLY.sha, len(keys), *keys, *words)
        return None if failed == -1 else cast(int, failed)

    async def confirm(self, _queue: str, wanted: Collection[Durability], most_ms: int) -> Missing:
        """Wait until the entries of the queue's last `apply` have these durabilities.

        Return what is missing. The wait takes at most `most_ms`.
        """
        _, missing = await execute(self._connection, [], wanted, most_ms)
        return missing

    async def _call(self, *words: bytes | str | int) -> object:
        (reply,) = await self._connection.execute([words])
        return _checked(str(words[0]), reply)


def _checked(name: str, reply: object) -> object:
    if isinstance(reply, ReplyError):
        if is_missing(reply):
            # SCRIPT FLUSH was called. The next connection loads the scripts again.
            raise RedisUnavailable("the scripts were removed from Redis")
        raise CommandRefused(name, str(reply))
    return reply
