"""Command queues whose streams may be in other slots: several servers or a Redis Cluster.

No script may use the queue and the streams together there. A batch of commands is therefore
executed in three steps, each of which may be repeated by any worker:

1. TAKE moves the head of the queue to the list of taken commands, and gives the batch a number and
   a random ID. If there are taken commands already, it returns these: their worker has died or lost
   its lease, and this one completes the batch.
2. STEP appends the batch's entries for one stream. A mark beside the stream contains the batch and
   its last operation in this stream. Operations up to the mark are skipped, so each is executed
   once. A worker that was suspended still has an old batch. Its number is lower than the mark's,
   and nothing is done.
3. DONE removes the taken commands.

If Redis has lost the queue's newest batch numbers in a failover, a new batch may have a number that
a mark has already. TAKE shows then that the batch is the present one, and RENUMBER gives it a
higher number. A failover may also bring back commands that were executed already; those without a
uid are then appended twice.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple, cast

import orjson

from relay.core.slices import in_slices
from relay.stream.connection.connect import CommandRefused
from relay.stream.connection.pipeline_connection import ReplyError
from relay.stream.connection.scripts import Script
from relay.stream.write.append import APPEND_FUNCTION
from relay.stream.write.confirmations import confirm
from relay.stream.write.control import at_field
from relay.stream.write.dead_letters import KEEP
from relay.stream.write.queue import HOLD, Head, Operation

if TYPE_CHECKING:
    from relay.core.durability import Durability
    from relay.stream.format.keys import Keys
    from relay.stream.shards.links import Connections, ShardLinks
    from relay.stream.shards.shard import Shard
    from relay.stream.write.confirmations import Missing

_log = logging.getLogger(__name__)

# A mark is kept for this long after its last batch. A worker does not execute a batch that it took
# more than _OLD_S ago.
_MARK_S = 86_400
_OLD_S = 600.0
# Attempts to execute a batch that other workers change at the same time.
_ATTEMPTS = 5
_TEXT = 65_536

# KEYS: the queue, the taken commands, the state. ARGV: how many to take, a random ID. Returns the
# number and the ID of the present batch, and its commands.
TAKE = Script("""\
local items = redis.call('LRANGE', KEYS[2], 0, -1)
if #items == 0 then
  items = redis.call('LRANGE', KEYS[1], 0, ARGV[1] - 1)
  if #items == 0 then return {'0', '', items} end
  local before = tonumber(redis.call('HGET', KEYS[3], 'batch') or '0')
  redis.call('HSET', KEYS[3], 'batch', before + 1, 'id', ARGV[2])
  redis.call('RPUSH', KEYS[2], unpack(items))
  redis.call('LTRIM', KEYS[1], #items, -1)
end
return {redis.call('HGET', KEYS[3], 'batch') or '0', redis.call('HGET', KEYS[3], 'id') or '', items}
""")

# KEYS: the taken commands, the state. ARGV: the batch's number and ID. Returns 1, or 0 if this is
# not the present batch.
DONE = Script("""\
local state = redis.call('HMGET', KEYS[2], 'batch', 'id')
if (state[1] or '0') ~= ARGV[1] or (state[2] or '') ~= ARGV[2] then return 0 end
redis.call('DEL', KEYS[1])
return 1
""")

# KEYS: the state. ARGV: the batch's number and ID, a number that is in use. Gives the batch a
# higher number and returns 1, or 0 if this is not the present batch.
RENUMBER = Script("""\
local state = redis.call('HMGET', KEYS[1], 'batch', 'id')
if (state[1] or '0') ~= ARGV[1] or (state[2] or '') ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[1], 'batch', ARGV[3] + 1)
return 1
""")

# KEYS: the stream, the mark, and the key of each operation's uid. ARGV: the batch's number and ID,
# window of uids in ms, time to live of the mark in s; then for each operation its index, the number
# of entries to keep (0: all), 1 if it has a uid, the number of words, and the words.
# The mark is never deleted: if its slot is being moved, the script could not create it again.
# Returns a list with the index and the error of each operation that Redis has rejected. If the mark
# has a later batch, nothing is done and its number is returned.
STEP = Script(
    APPEND_FUNCTION
    + """\
local mark = redis.call('HMGET', KEYS[2], 'batch', 'id', 'last')
local last, is_same = -1, mark[2] == ARGV[2]
if is_same then last = tonumber(mark[3])
elseif mark[1] and tonumber(mark[1]) >= tonumber(ARGV[1]) then return tonumber(mark[1]) end
redis.call('HSET', KEYS[2], 'batch', ARGV[1], 'id', ARGV[2])
if not is_same then
  local old = redis.call('HGETALL', KEYS[2])
  for i = 1, #old, 2 do
    if string.sub(old[i], 1, 6) == 'error:' then redis.call('HDEL', KEYS[2], old[i]) end
  end
end
local k, a, argv = 3, 5, ARGV
while a <= #argv do
  local index, uid = tonumber(argv[a]), nil
  local from, to = a + 4, a + 3 + argv[a + 3]
  if argv[a + 2] == '1' then
    uid = KEYS[k]
    k = k + 1
  end
  if index > last then
    local id = append(KEYS[1], argv[a + 1], {unpack(argv, from, to)}, uid, argv[3])
    if type(id) == 'table' then redis.call('HSET', KEYS[2], 'error:' .. index, id.err) end
    last = index
  end
  a = to + 1
end
redis.call('HSET', KEYS[2], 'last', last)
redis.call('EXPIRE', KEYS[2], ARGV[4])
local failed, fields = {}, redis.call('HGETALL', KEYS[2])
for i = 1, #fields, 2 do
  if string.sub(fields[i], 1, 6) == 'error:' then
    failed[#failed + 1] = string.sub(fields[i], 7)
    failed[#failed + 1] = fields[i + 1]
  end
end
return failed
"""
)


Words = list[bytes | str | int]


class _Indexed(NamedTuple):
    """An operation with its index in the batch, and the beginning of its command."""

    at: int
    operation: Operation


class _Superseded(Exception):
    """The batch is no longer the present one, or has another number now."""


class QueuePlace(NamedTuple):
    """One queue: its list, and the server if each server has a list of this name.

    `label` identifies the queue in leases and marks.
    """

    label: str
    name: str
    shard: Shard | None


class SteppedQueues:
    """The operations of `CommandQueues` on several shards."""

    def __init__(
        self, links: ShardLinks, keys: Keys, instance: str, places: Sequence[QueuePlace]
    ) -> None:
        self._links = links
        self._keys = keys
        self._instance = instance
        self._places = {place.label: place for place in places}
        self._taken_at: dict[str, float] = {}
        # The connections that carried the last batch of each queue, for `confirm`.
        self._written: dict[str, Connections] = {}

    async def hold(self, queues: Sequence[str], ttl_ms: int) -> list[bool]:
        """See `CommandQueues.hold`."""
        keys = [self._keys.takers, *[self._keys.lease(f"queue:{queue}") for queue in queues]]
        (reply,) = await self._links.evaluate([(HOLD, keys, [self._instance, ttl_ms])])
        return [bool(held) for held in cast(list[int], _checked(reply))]

    async def head(self, queue: str, most: int) -> Head:
        """Take the first commands of the queue, and arm the notification of later ones."""
        place, loop = self._places[queue], asyncio.get_running_loop()
        keys = place.name.encode(), *self._state(place)
        (armed,) = await self._links.execute_at([("LRANGE", keys[0], 0, 0)], place.shard)
        if isinstance(armed, ReplyError):
            raise CommandRefused(f"queue {queue}", str(armed))
        taken_at = loop.time()
        (reply,) = await self._links.evaluate(
            [(TAKE, keys, [most, secrets.token_hex(8)])], place.shard
        )
        number, batch_id, items = cast("list[bytes | list[bytes]]", _checked(reply))
        self._taken_at[queue] = taken_at
        return Head(
            b"%b:%b" % (cast(bytes, number), cast(bytes, batch_id)), cast("list[bytes]", items)
        )

    async def apply(
        self, queue: str, head: Head, operations: Sequence[Operation], *, window_ms: int
    ) -> int | None:
        """Append all entries and remove the taken commands.

        Return None if another worker executes the batch, else the number of entries that Redis
        rejected and that became dead letters.
        """
        place = self._places[queue]
        number, _, batch_id = head.taken.partition(b":")
        self._written[queue] = {}
        for _ in range(_ATTEMPTS):
            if asyncio.get_running_loop().time() - self._taken_at[queue] > _OLD_S:
                return None
            batch = _Batch(self, place, number, batch_id, window_ms)
            try:
                failed = await batch.append(head.items, operations)
            except _Superseded:
                # A later batch has left a mark, or Redis has lost the numbers of batches.
                state = self._state(place)[1]
                words: Words = [number, batch_id, batch.number_in_use]
                (done,) = await self._links.evaluate([(RENUMBER, [state], words)], place.shard)
                if not _checked(done):
                    return None
                number = b"%d" % (batch.number_in_use + 1)
                continue
            words = [number, batch_id]
            (done,) = await self._links.evaluate([(DONE, self._state(place), words)], place.shard)
            return failed if _checked(done) else None
        return None

    async def confirm(self, queue: str, wanted: Collection[Durability], most_ms: int) -> Missing:
        """See `CommandQueues.confirm`."""
        return await confirm(self._written[queue], wanted, most_ms)

    def _state(self, place: QueuePlace) -> tuple[bytes, bytes]:
        return self._keys.queue_taken(place.name), self._keys.queue_state(place.name)


class _Batch:
    """The entries of one batch."""

    def __init__(
        self,
        queues: SteppedQueues,
        place: QueuePlace,
        number: bytes,
        batch_id: bytes,
        window_ms: int,
    ) -> None:
        self._links, self._keys = queues._links, queues._keys  # one unit
        self._written = queues._written[place.label]
        self._node = queues._instance
        self._label = place.label
        self._head: list[bytes | str | int] = [number, batch_id, window_ms, _MARK_S]
        self.number_in_use = 0
        self._failed: dict[int, bytes] = {}

    async def append(self, items: Sequence[bytes], operations: Sequence[Operation]) -> int:
        """Append everything. Return how many entries Redis has rejected.

        Raises:
            _Superseded: A stream has the mark of a batch with a higher number.
        """
        letters: list[_Indexed] = []
        part: list[_Indexed] = []
        async for index, operation in in_slices(enumerate(operations)):
            indexed = _Indexed(index, operation)
            if operation.key == self._keys.dead_letters:
                letters.append(indexed)
            elif operation.position_in is None:
                part.append(indexed)
            else:
                # The command takes effect after the entries before it.
                await self._append(part)
                await self._append([await self._with_position(indexed)])
                part = []
        await self._append(part)
        for index, error in self._failed.items():
            operation = operations[index]
            letters.append(_Indexed(index, self._letter(items, operation, error)))
        # All at once and in order: a worker that repeats this step finds the same errors.
        await self._append(sorted(letters, key=lambda each: each.at))
        return len(self._failed)

    async def _with_position(self, indexed: _Indexed) -> _Indexed:
        operation = indexed.operation
        channel = operation.position_in
        if channel is None:
            return indexed
        stream = self._keys.stream(channel)
        (found,) = await self._links.execute([("XREVRANGE", stream, "+", "-", "COUNT", 1)])
        if isinstance(found, ReplyError):
            return indexed
        entries = cast("list[list[bytes]]", found)
        position = [at_field(channel), entries[0][0] if entries else b"0-0"]
        return _Indexed(indexed.at, operation._replace(fields=[*operation.fields, *position]))

    def _letter(self, items: Sequence[bytes], operation: Operation, error: bytes) -> Operation:
        text = items[operation.item][:_TEXT].decode(errors="replace")
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        fields = [b"queue", self._label.encode(), b"reason", error, b"node", self._node.encode()]
        fields += b"at", at.encode(), b"fields", orjson.dumps([["command", text]])
        return Operation(self._keys.dead_letters, fields, operation.item, KEEP)

    async def _append(self, operations: Sequence[_Indexed]) -> None:
        by_stream: dict[bytes, list[_Indexed]] = {}
        for each in operations:
            by_stream.setdefault(each.operation.key, []).append(each)
        if not by_stream:
            return
        calls: list[tuple[Script, Sequence[bytes], Sequence[bytes | str | int]]] = []
        async for stream, own in in_slices(by_stream.items()):
            keys = [stream, self._mark(stream)]
            words = [*self._head]
            for index, operation in own:
                fields, uid = operation.fields, operation.uid_key
                words += index, operation.keep, int(uid is not None), len(fields), *fields
                if uid is not None:
                    keys.append(uid)
            calls.append((STEP, keys, words))
        for stream, reply in zip(by_stream, await self._links.evaluate(calls), strict=True):
            found = _checked(reply)
            if isinstance(found, int):
                self.number_in_use = max(self.number_in_use, found)
                continue
            self._written |= self._links.connections_of([stream])
            pairs = cast("list[bytes]", found)
            self._failed |= {
                int(index): error for index, error in zip(pairs[::2], pairs[1::2], strict=True)
            }
        if self.number_in_use:
            raise _Superseded

    def _mark(self, stream: bytes) -> bytes:
        channel = self._keys.channel_of_stream(stream)
        if channel is None:
            return self._keys.site_applied(stream, self._label)
        return self._keys.applied(channel, self._label)


def _checked(reply: object) -> object:
    if isinstance(reply, ReplyError):
        raise CommandRefused("EVALSHA", str(reply))
    return reply
